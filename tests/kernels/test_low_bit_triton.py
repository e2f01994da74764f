"""The Triton kernels of 16-bit floats and of Adam in the interpreter: against the definition, inside their buffers."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import low_bit as door
from kernels import low_bit_reference as reference
from kernels.low_bit_reference import AdamStep, Format, Overflow
from tests.kernels.low_bit_cases import (
    CODES,
    FORMATS,
    KINDS,
    STEPS,
    Case,
    after,
    assert_same_update,
    make,
    trying_numbers,
)

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's, of Inf


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The door takes CPU tensors to Triton, all but those that torch itself updates."""
    monkeypatch.setattr(door, "_is_fused", lambda tensor: True)
    return importlib.import_module("kernels.low_bit_triton")


@pytest.mark.parametrize("format", FORMATS)
def test_decoding_equals_the_definition_for_every_code(format: Format) -> None:
    fast, defined = door.decode(CODES, format), reference.decode(CODES, format)
    is_nan = defined.isnan()
    assert torch.equal(fast.isnan(), is_nan)
    assert torch.equal(fast[~is_nan].view(torch.int32), defined[~is_nan].view(torch.int32))


@pytest.mark.parametrize("overflow", ["saturate", "infinity"])
@pytest.mark.parametrize("format", FORMATS)
def test_encoding_equals_the_definition(format: Format, overflow: Overflow) -> None:
    """Among the numbers: all values of the format, all midpoints, their neighbours, NaN and infinity."""
    numbers = trying_numbers(format)
    assert torch.equal(door.encode(numbers, format, overflow), reference.encode(numbers, format, overflow))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 2049)], ids=str)
def test_any_shape_will_do(shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes = door.encode(numbers, "1-6-9")
    assert codes.shape == shape and torch.equal(codes, reference.encode(numbers, "1-6-9"))
    assert torch.equal(door.decode(codes, "1-6-9"), reference.decode(codes, "1-6-9"))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("how", STEPS, ids=["first step", "clipped", "later"])
def test_an_update_equals_the_definition(how: AdamStep, kinds: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    case = make(60, 47, 3, kinds)  # 2 blocks, the second cut
    got = after(door.adam_update, case, how)
    assert_same_update(got, after(reference.adam_update, case, how, exact=True), case, how)


@pytest.mark.parametrize("shape", [(70, 130, 45), (64, 64, 32), (1, 1, 1), (3, 65, 7)], ids=str)
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("how", STEPS, ids=["first step", "clipped", "later"])
def test_an_update_by_factors_equals_the_definition(
    how: AdamStep, kinds: tuple[torch.dtype, torch.dtype, torch.dtype], shape: tuple[int, int, int]
) -> None:
    """Rows, columns and rank that fill tiles, and that do not."""
    case = make(*shape, kinds)
    got = after(door.decompressed_adam_update, case, 4, how)
    assert_same_update(got, after(reference.decompressed_adam_update, case, 4, how, exact=True), case, how)


def test_nothing_to_update_is_no_error() -> None:
    case = make(0, 5, 2, KINDS[0])
    assert after(door.adam_update, case, STEPS[0]).w.shape == (0, 5)
    assert after(door.decompressed_adam_update, case, 4, STEPS[0]).w.shape == (0, 5)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_a_gradient_that_is_not_a_number_stays_visible(kinds: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    case = make(2, 3, 1, kinds)
    case.g[0, 1] = torch.nan
    got = after(door.adam_update, case, STEPS[1])
    for values in (got.w, reference.read(got.m, "1-6-9"), reference.read(got.v, "0-6-10")):
        assert values.isnan().nonzero().tolist() == [[0, 1]]


def test_the_same_bits_every_time() -> None:
    case = make(70, 50, 9, KINDS[0])
    first, second = (after(door.decompressed_adam_update, case, 2, STEPS[1]) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("w", "m", "v", "error"))


@pytest.mark.parametrize("factors", [False, True])
def test_kernels_touch_their_own_memory_only(guarded: Callable[[Tensor], Tensor], factors: bool) -> None:
    """All buffers lie between NaN. Codes are guarded as bfloat16, whose NaN is one of 1-6-9 too."""

    def between_nan(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.int16:
            return guarded(tensor)
        return guarded(tensor.view(torch.bfloat16)).view(torch.int16)

    case = make(67, 33, 5, KINDS[0])
    want = after(door.decompressed_adam_update if factors else door.adam_update, case, *([4] * factors), STEPS[1])
    got = Case(**{name: between_nan(tensor) for name, tensor in vars(case).items()})
    if factors:
        door.decompressed_adam_update(got.p, got.q, got.error, 4, got.w, got.m, got.v, STEPS[1])
    else:
        door.adam_update(got.w, got.g, got.m, got.v, STEPS[1])
    assert all(torch.equal(getattr(got, name), tensor) for name, tensor in vars(want).items())
    assert torch.equal(door.encode(between_nan(case.g), "1-6-9"), reference.encode(case.g, "1-6-9"))
    assert torch.equal(door.decode(between_nan(case.m), "1-6-9"), reference.decode(case.m, "1-6-9"))
