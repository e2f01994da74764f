"""Registers functions of tensors as torch operators, without loading torch's compiler as torch's own decorator does.

An operator with its shapes and its gradient is one node to torch.compile and to activation checkpointing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import library

Function = Callable[..., Any]


def operator(name: str) -> Callable[[Function], Any]:
    """Decorator: the function, annotated with types that a schema can have, as torch.ops.smalti.NAME.

    It may not write to what it is given nor return it. Loading the compiler takes a second at start.
    """

    def register(function: Function) -> Any:
        library.define(f"smalti::{name}", library.infer_schema(function, mutates_args=()))
        library.impl(f"smalti::{name}", ("cpu", "cuda"))(function)
        return getattr(torch.ops.smalti, name).default

    return register


def shapes_of(name: str) -> Callable[[Function], Function]:
    """Decorator: the function that makes the operator's results, empty, for the compiler."""
    return library.register_fake(f"smalti::{name}")


def gradient_of(name: str, remember: Function, differentiate: Function) -> None:
    """The operator's gradient: remember(ctx, inputs, output) after it, differentiate(ctx, *d_outputs) backward."""
    library.register_autograd(f"smalti::{name}", differentiate, setup_context=remember)
