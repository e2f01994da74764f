"""16-bit floats against their definition on every code and round every tie; Adam's updates against float64."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import low_bit
from kernels import low_bit_reference as reference
from kernels.low_bit_reference import BITS, AdamStep, Format, Overflow
from tests.kernels.low_bit_cases import (
    CODES,
    FORMATS,
    KINDS,
    STEPS,
    after,
    assert_same_update,
    finite_values,
    make,
    trying_numbers,
)

Encode = Callable[[Tensor, Format, Overflow], Tensor]
ENCODERS = pytest.mark.parametrize("encode", [reference.encode, low_bit.encode], ids=["definition", "fast"])
DECODERS = pytest.mark.parametrize("decode", [reference.decode, low_bit.decode], ids=["definition", "fast"])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small tensor has several chunks, the last of them cut."""
    monkeypatch.setattr(low_bit, "CHUNK", 100)


@pytest.fixture
def no_subnormals() -> Iterator[None]:
    """The CPU takes every subnormal float32 for 0."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@DECODERS
def test_the_formats_have_the_papers_range_and_precision(decode: Callable[[Tensor, Format], Tensor]) -> None:
    def values(format: Format, *codes: int) -> list[float]:
        return decode(torch.tensor(codes).to(torch.int32).to(torch.int16), format).tolist()

    assert values("1-6-9", 0, 1, 0x1FF, 0x200, 0x201) == [0, 2**-67, 511 * 2**-67, 2**-58, 2**-58 + 2**-67]
    assert values("1-6-9", 59 << 9, 0x7DFF, 0x7E00, 0xFE00) == [1.0, 15.984375, torch.inf, -torch.inf]
    assert values("1-6-9", 0x8001, 0xFDFF) == [-(2**-67), -15.984375]
    assert values("0-6-10", 0, 1, 0x3FF, 0x400) == [0, 2**-68, 1023 * 2**-68, 2**-58]
    assert values("0-6-10", 59 << 10, 0xFBFF, 0xFC00) == [1.0, 15.9921875, torch.inf]


@pytest.mark.parametrize("format", FORMATS)
def test_decoding_equals_the_definition_for_every_code(format: Format) -> None:
    fast, defined = low_bit.decode(CODES, format), reference.decode(CODES, format)
    is_nan = defined.isnan()
    assert torch.equal(fast.isnan(), is_nan) and same_bits(fast[~is_nan], defined[~is_nan])
    assert is_nan.sum() == (2 * 511 if format == "1-6-9" else 1023)


@ENCODERS
@DECODERS
@pytest.mark.parametrize("format", FORMATS)
def test_every_code_comes_back(encode: Encode, decode: Callable[[Tensor, Format], Tensor], format: Format) -> None:
    """All but those of NaN become themselves, and those the one NaN, whose sign means nothing."""
    values = decode(CODES, format)
    back = encode(values, format, "infinity")
    is_nan = values.isnan()
    assert torch.equal(back[~is_nan], CODES[~is_nan])
    assert set((back[is_nan].int() & 0xFFFF).tolist()) <= ({0x7F00, 0xFF00} if format == "1-6-9" else {0xFE00})


@ENCODERS
@pytest.mark.parametrize("format", FORMATS)
def test_ties_go_to_the_even_code_and_all_else_to_the_nearest(encode: Encode, format: Format) -> None:
    values = finite_values(format)
    below = torch.arange(len(values) - 1)
    even = below + below % 2
    middle = ((values[1:] + values[:-1]) / 2).float()
    assert torch.equal(middle.double() * 2, values[1:] + values[:-1])  # exact in float32 too
    for numbers, codes in [
        (middle, even),
        (middle.nextafter(torch.tensor(0.0)), below),
        (middle.nextafter(torch.tensor(99.0)), below + 1),
        (values.float()[1:].nextafter(torch.tensor(0.0)), below + 1),
        (values.float()[:-1].nextafter(torch.tensor(99.0)), below),
    ]:
        assert torch.equal(encode(numbers, format, "saturate").int() & 0xFFFF, codes.int())


@ENCODERS
@pytest.mark.parametrize("format", FORMATS)
def test_overflow_saturates_or_becomes_infinity(encode: Encode, format: Format) -> None:
    bits = BITS[format]
    half = torch.tensor((bits.largest + 16) / 2)  # a tie of an odd code and of infinity, which is even
    numbers = torch.stack([half, half.nextafter(torch.tensor(0.0)), torch.tensor(1e30), torch.tensor(torch.inf)])
    largest, infinity = bits.infinity - 1, bits.infinity
    assert (encode(numbers, format, "saturate").int() & 0xFFFF).tolist() == [largest] * 4
    assert (encode(numbers, format, "infinity").int() & 0xFFFF).tolist() == [infinity, largest, infinity, infinity]
    negative = [0x8000 | largest, 0x8000 | infinity] if bits.signed else [0, 0]
    assert (encode(-numbers, format, "saturate").int() & 0xFFFF).tolist() == [negative[0]] * 4
    assert (encode(-numbers[2:], format, "infinity").int() & 0xFFFF).tolist() == [negative[1]] * 2


@ENCODERS
def test_what_is_negative_becomes_zero_where_there_is_no_sign(encode: Encode) -> None:
    numbers = torch.tensor([-0.0, -1e-30, -1.0, -16.0, -torch.inf])
    assert encode(numbers, "0-6-10", "infinity").tolist() == [0] * 5


@pytest.mark.parametrize("overflow", ["saturate", "infinity"])
@pytest.mark.parametrize("format", FORMATS)
def test_encoding_equals_the_definition(format: Format, overflow: Overflow) -> None:
    numbers = trying_numbers(format)
    assert torch.equal(low_bit.encode(numbers, format, overflow), reference.encode(numbers, format, overflow))


@pytest.mark.usefixtures("no_subnormals")
@pytest.mark.parametrize("format", FORMATS)
def test_a_cpu_without_subnormal_numbers_gets_the_same(format: Format) -> None:
    numbers = trying_numbers(format)
    codes, values = low_bit.encode(numbers, format), low_bit.decode(CODES, format)
    torch.set_flush_denormal(False)
    assert torch.equal(codes, reference.encode(numbers, format))
    assert torch.equal(values.nan_to_num(), reference.decode(CODES, format).nan_to_num())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(), (0,), (1,), (100,), (7, 43)], ids=str)
def test_any_shape_and_stride_will_do(shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for tensor in (numbers, numbers.T if numbers.ndim == 2 else numbers):
        codes = low_bit.encode(tensor, "1-6-9")
        assert codes.shape == tensor.shape and torch.equal(codes, reference.encode(tensor, "1-6-9"))
        decoded = low_bit.decode(codes.T if codes.ndim == 2 else codes, "1-6-9")
        assert torch.equal(decoded, reference.decode(codes, "1-6-9").T if codes.ndim == 2 else decoded)


def test_what_is_not_float32_or_a_code_is_refused() -> None:
    with pytest.raises(ValueError, match="only float32 is encoded, not torch.float64"):
        low_bit.encode(torch.zeros(2, dtype=torch.float64), "1-6-9")
    with pytest.raises(ValueError, match="codes are int16, not torch.int32"):
        low_bit.decode(torch.zeros(2, dtype=torch.int32), "1-6-9")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("how", STEPS, ids=["first step", "clipped", "later"])
def test_an_update_equals_the_definition(how: AdamStep, kinds: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    case = make(31, 47, 3, kinds)
    got = after(low_bit.adam_update, case, how)
    assert_same_update(got, after(reference.adam_update, case, how, exact=True), case, how)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(31, 47, 3), (5, 260, 17), (1, 1, 1), (130, 1, 2)], ids=str)
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("how", STEPS, ids=["first step", "clipped", "later"])
def test_an_update_by_factors_equals_the_definition(
    how: AdamStep, kinds: tuple[torch.dtype, torch.dtype, torch.dtype], shape: tuple[int, int, int]
) -> None:
    """A row may be longer than a chunk."""
    case = make(*shape, kinds)
    got = after(low_bit.decompressed_adam_update, case, 4, how)
    assert_same_update(got, after(reference.decompressed_adam_update, case, 4, how, exact=True), case, how)


def test_nothing_to_update_is_no_error() -> None:
    case = make(0, 5, 2, KINDS[0])
    assert after(low_bit.adam_update, case, STEPS[0]).w.shape == (0, 5)
    assert after(low_bit.decompressed_adam_update, case, 4, STEPS[0]).w.shape == (0, 5)


@pytest.mark.parametrize("update", [reference.adam_update, low_bit.adam_update], ids=["definition", "fast"])
def test_moments_saturate_and_the_variance_is_cut_before_it_is_used(update: Callable[..., None]) -> None:
    """The step is mean / sqrt(variance), both bias-corrected: 100 / sqrt(5 / 0.04), not the 1 it is uncut."""
    how = AdamStep(1e-3, 0.9, 0.96, 1e-8, 0.0, step=1, variance_clip=5.0)
    moments = [torch.zeros(2, dtype=torch.int16) for _ in range(2)]
    w, g = torch.zeros(2), torch.tensor([100.0, -1000.0])
    update(w, g, *moments, how)
    assert w.tolist() == pytest.approx([-100e-3 / 125**0.5, 1000e-3 / 125**0.5])
    mean, variance = (reference.decode(m, f) for m, f in zip(moments, FORMATS, strict=True))
    assert mean.tolist() == [10.0, -15.984375] and variance.tolist() == [5.0, 5.0]
    uncut = torch.zeros(2)
    update(uncut, g, torch.zeros(2), torch.zeros(2), replace(how, variance_clip=0.0))
    assert uncut.tolist() == pytest.approx([-1e-3, 1e-3])


@pytest.mark.parametrize("update", [reference.adam_update, low_bit.adam_update], ids=["definition", "fast"])
@pytest.mark.parametrize("kinds", KINDS[:2], ids=str)
def test_a_gradient_that_is_not_a_number_stays_visible(
    update: Callable[..., None], kinds: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    case = make(2, 3, 1, kinds)
    case.g[0, 1] = torch.nan
    got = after(update, case, STEPS[1])
    for values in (got.w, reference.read(got.m, "1-6-9"), reference.read(got.v, "0-6-10")):
        assert values.isnan().nonzero().tolist() == [[0, 1]]


def test_only_the_given_slice_of_a_flat_buffer_changes() -> None:
    case = make(6, 20, 2, KINDS[0])
    flat = {name: torch.full((160,), 77, dtype=getattr(case, name).dtype) for name in ("w", "m", "v")}
    views = [buffer[13:133].view(6, 20).copy_(getattr(case, name)) for name, buffer in flat.items()]
    low_bit.adam_update(views[0], case.g, views[1], views[2], STEPS[1])
    want = after(low_bit.adam_update, case, STEPS[1])
    for name, buffer in flat.items():
        assert torch.equal(buffer[13:133].view(6, 20), getattr(want, name))
        assert buffer[:13].eq(77).all() and buffer[133:].eq(77).all()


def test_what_does_not_fit_is_refused_by_name() -> None:
    case, how = make(4, 6, 2, KINDS[0]), STEPS[0]
    for message, changes in {
        "w is torch.float64": {"w": case.w.double()},
        "g is torch.bfloat16": {"g": case.g.bfloat16()},
        "m is torch.int32": {"m": case.m.int()},
        r"v is \(4, 5\), the weights \(4, 6\)": {"v": case.v[:, :5].contiguous()},
        "v is not contiguous": {"v": case.v.T.contiguous().T},
    }.items():
        with pytest.raises(ValueError, match=message):
            low_bit.adam_update(*(changes.get(name, getattr(case, name)) for name in "wgmv"), how)
    for message, changes in {
        r"p \(3, 2\) and q \(6, 2\) do not make the weights' \(4, 6\)": {"p": case.p[:3]},
        r"p \(4, 2\) and q \(6, 1\) do not": {"q": case.q[:, :1]},
        "p is torch.float64": {"p": case.p.double()},
        "p or q is not contiguous": {"q": case.q.T.contiguous().T},
        "error is torch.float16": {"error": case.error.half()},
    }.items():
        with pytest.raises(ValueError, match=message):
            after(low_bit.decompressed_adam_update, replace(case, **changes), 4, how)
    with pytest.raises(ValueError, match="step 0"):
        replace(how, step=0)
