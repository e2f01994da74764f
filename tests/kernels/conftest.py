"""How Triton kernels are tested without a GPU: in the interpreter, or as machine code; and guarded buffers.

TRITON_INTERPRET is read when a kernel is decorated, so one process does one of the two: tests
marked `interpreter` run by `TRITON_INTERPRET=1 pytest -m interpreter`, all others by `pytest`.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import interpreter_bf16

    interpreter_bf16.patch()


@pytest.fixture
def guarded() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies tensors into NaN-filled arenas: a read outside gives NaN, a write outside is found at the end."""
    arenas = []
    pad = 4096

    def make(tensor: Tensor) -> Tensor:
        arena = torch.full((tensor.numel() + 2 * pad,), torch.nan, dtype=tensor.dtype)
        arenas.append(arena)
        return arena[pad:-pad].view(tensor.shape).copy_(tensor)

    yield make
    for arena in arenas:
        assert arena[:pad].isnan().all() and arena[-pad:].isnan().all(), "a kernel wrote outside its tensor"
