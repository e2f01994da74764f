"""Where an Inf or NaN came from: the first module, the rank, the samples.

Looked for only after one was found, by a second forward pass that watches every module's output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 4  # names in a message


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """A list to which the names of modules are added, in the order of the forward pass, whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(one, Tensor) and not bool(one.isfinite().all()) for one in tensors):
                found.append(name or "the model")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def bad_weights(model: nn.Module) -> list[str]:
    """Names of the parameters on this rank, whole or in part, that are not finite."""
    shards = {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        return [name for name, shard in shards.items() if not bool(shard.isfinite().all())]


def told(rank: int, modules: Sequence[str], weights: Sequence[str], gradients: Sequence[str], keys: list[str]) -> str:
    """What a rank has to say, or nothing: the first bad module, or what else of its was bad."""
    if weights:
        return f"rank {rank}: weights {some(weights)} are not finite"
    if modules:
        return f"rank {rank}: first in {modules[0]}, samples {some(keys)}"
    if gradients:  # in the order of the model, so the last one is where the backward pass met it first
        return f"rank {rank}: the forward pass is clean, the gradients of {some(gradients[::-1])} are not finite"
    return ""


def some(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
