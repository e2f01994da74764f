"""The Triton kernels of relaxed codes in the interpreter: against the definition, inside their buffers."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import relaxed_codes as door
from tests.kernels.relaxed_codes_cases import assert_relaxed_codes, make, run

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The door takes CPU tensors to Triton."""
    monkeypatch.setattr(door, "_is_fused", lambda logits: True)
    return importlib.import_module("kernels.relaxed_codes_triton")


@pytest.mark.parametrize("temperature", [1.0, 0.0625])
@pytest.mark.parametrize("shape", [(2,), (5, 7), (2, 3, 1000), (2, 2, 8192)], ids=str)
def test_kernels_equal_the_definition(shape: tuple[int, ...], temperature: float) -> None:
    assert_relaxed_codes(make(shape, torch.float32, temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits(dtype: torch.dtype) -> None:
    assert_relaxed_codes(make((2, 3, 3, 40), dtype, 0.7))


def test_a_single_code_is_certain_and_no_rows_give_none() -> None:
    results = run(door.relaxed_codes, make((3, 1), torch.float32, 0.5))
    assert results["weights"].eq(1).all() and results["kl"].eq(0).all() and results["d_logits"].eq(0).all()
    assert run(door.relaxed_codes, make((0, 5), torch.float32, 0.5))["d_logits"].shape == (0, 5)


def test_the_same_bits_every_time() -> None:
    case = make((6, 130), torch.float32, 0.3)
    first, second = run(door.relaxed_codes, case), run(door.relaxed_codes, case)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_kernels_touch_their_own_memory_only(kernels: Any, guarded: Callable[[Tensor], Tensor]) -> None:
    """All buffers lie between NaN; outputs start as NaN, so what is left unwritten shows."""
    rows, codebook = 5, 37
    case = make((rows, codebook), torch.float32, 0.5)
    logits = guarded(case.logits)
    weights, d_logits = (guarded(torch.full((rows, codebook), torch.nan)) for _ in range(2))
    kl, lse, mean = (guarded(torch.full((rows,), torch.nan)) for _ in range(3))
    kernels.forward_kernel[(rows,)](
        logits, guarded(case.uniform), weights, kl, lse, mean, codebook, math.log(codebook), 2.0, 64
    )
    kernels.backward_kernel[(rows,)](
        guarded(case.d_weights), weights, logits, guarded(case.d_kl), lse, mean, d_logits, codebook, 2.0, 64
    )
    for tensor in (weights, kl, lse, mean, d_logits):
        assert tensor.isfinite().all()
