"""Registers functions of tensors as torch operators, without loading torch's compiler as `custom_op` does.

An operator with a fake (its shapes) and a gradient is one node to torch.compile and to checkpointing.
"""

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function, annotated with the types that torch.library knows, as torch.ops.smalti.NAME.

    It may not write to what it is given nor return it. Loading the compiler takes a second at start.
    """

    def register(function: Callable[..., Any]) -> Any:
        full_name = f"smalti::{name}"
        torch.library.define(full_name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(full_name, ("cpu", "cuda"))(function)
        return getattr(torch.ops.smalti, name).default

    return register
