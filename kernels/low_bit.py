"""The door to 16-bit floats with a 6-bit exponent, and to Adam that reads and writes its moments in them.

What is computed is defined in kernels/low_bit_reference.py. On a CPU everything happens in chunks that stay in
its cache. Coding has neither branches nor subnormal float32 numbers, which many CPUs are slow at.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from kernels.low_bit_reference import BIAS, BITS, LEAST_NORMAL, AdamStep, Bits, Format, Overflow

CHUNK = 65_536  # numbers: four buffers, 1 MiB; with a quarter of it an update takes twice as long, in calls of torch
MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.int16)

EXPONENT = 0x7F800000  # of a float32
LEAST, MOST = (127 + 1 - BIAS) << 23, (127 + 4) << 23  # float32 words of the smallest normal number and of 16
LIFT = 192 << 23  # takes exponent field 63 to float32's 255, so that infinity and NaN need no care ...
LOWER = 2.0 ** (127 - 192 - BIAS)  # ... and the factor that takes all others to where they belong


def encode(x: Tensor, format: Format, overflow: Overflow = "saturate") -> Tensor:
    """The int16 codes of the numbers nearest to x, float32, of any shape; ties go to the even code.

    overflow: what is beyond the largest finite number, infinity too, becomes that ("saturate"), or it becomes
    infinity from half a unit beyond on ("infinity"). In 0-6-10 negative numbers become 0. NaN becomes the code
    0x7F00 (with its sign 0xFF00), in 0-6-10 0xFE00. ValueError if x is not float32.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"only float32 is encoded, not {x.dtype}")
    bits, x = BITS[format], x.contiguous()
    top = bits.largest if overflow == "saturate" else 16.0
    if _is_fused(x):
        return _triton().encode(x, bits, top)
    codes = torch.empty_like(x, dtype=torch.int16)
    space = _Space(min(x.numel(), CHUNK), x.device)
    for part, out in zip(x.view(-1).split(CHUNK), codes.view(-1).split(CHUNK), strict=True):
        space.floats(0, part.numel()).copy_(part)
        _encode(bits, top, out, space)
    return codes


def decode(codes: Tensor, format: Format) -> Tensor:
    """The float32 values of int16 codes, exact; of their shape. The sign of a NaN means nothing.

    ValueError if they are not int16.
    """
    if codes.dtype != torch.int16:
        raise ValueError(f"codes are int16, not {codes.dtype}")
    bits, codes = BITS[format], codes.contiguous()
    if _is_fused(codes):
        return _triton().decode(codes, bits)
    values = torch.empty_like(codes, dtype=torch.float32)
    space = _Space(min(codes.numel(), CHUNK), codes.device)
    for part, out in zip(codes.view(-1).split(CHUNK), values.view(-1).split(CHUNK), strict=True):
        out.copy_(_decode(part, bits, space))
    return values


@torch.no_grad()
def adam_update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamStep) -> None:
    """One AdamW update in place, one pass over weights w (float32), gradient g (float32), mean m and variance v.

    All of one shape and contiguous. m and v are each float32, bfloat16, or int16 with 1-6-9 and 0-6-10 codes.
    Without a cut of the variance, float32 moments are updated by torch's own fused AdamW.
    ValueError for other dtypes, for strides, and for shapes that differ.
    """
    _check(w=w, g=g, m=m, v=v)
    if m.dtype == v.dtype == torch.float32 and not how.variance_clip:
        _torch_adamw(w, g, m, v, how)
    elif _is_fused(w):
        _triton().adam_update(w, g, m, v, how)
    else:
        space = _Space(min(w.numel(), CHUNK), w.device)
        flat = (tensor.view(-1).split(CHUNK) for tensor in (w, g, m, v))
        for some_w, some_g, some_m, some_v in zip(*flat, strict=True):
            _adam(some_w, some_g, some_m, some_v, how, space)


@torch.no_grad()
def decompressed_adam_update(
    p: Tensor, q: Tensor, error: Tensor, n_replicas: int, w: Tensor, m: Tensor, v: Tensor, how: AdamStep
) -> None:
    """adam_update by the gradient G = p q^T times grad_factor, and error -= G / n_replicas; G is never stored.

    p (N, R), q (K, R), float32; w, m, v, error (N, K), all contiguous: w float32, the others each float32,
    bfloat16, or int16 with codes: 1-6-9, the variance's 0-6-10 (Ramesh et al. 2021, appendix E.2).
    ValueError for other dtypes, for strides, and for shapes that do not fit.
    """
    _check(w=w, m=m, v=v, error=error)
    _check_factors(p, q, w)
    if _is_fused(w):
        _triton().decompressed_adam_update(p, q, error, n_replicas, w, m, v, how)
        return
    width = w.shape[1]
    rows = max(CHUNK // max(width, 1), 1)
    space = _Space(min(rows, w.shape[0]) * width, w.device)
    for some_p, *rest in zip(*(tensor.split(rows) for tensor in (p, error, w, m, v)), strict=True):
        kept, some_w, some_m, some_v = (tensor.view(-1) for tensor in rest)
        g = space.floats(3, some_w.numel())
        torch.mm(some_p, q.T, out=g.view(-1, width))
        _store(_load(kept, BITS["1-6-9"], space).sub_(g, alpha=1 / n_replicas), kept, BITS["1-6-9"], space)
        _adam(some_w, g, some_m, some_v, how, space)


def _check(w: Tensor, **others: Tensor) -> None:
    for name, tensor in {"w": w, **others}.items():
        allowed = (torch.float32,) if name in ("w", "g") else MOMENT_DTYPES
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} is {tensor.dtype}, not one of {allowed}")
        if tensor.shape != w.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the weights {tuple(w.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")


def _check_factors(p: Tensor, q: Tensor, w: Tensor) -> None:
    if p.ndim != 2 or q.ndim != 2 or (p.shape[0], q.shape[0]) != w.shape or p.shape[1] != q.shape[1]:
        raise ValueError(f"p {tuple(p.shape)} and q {tuple(q.shape)} do not make the weights' {tuple(w.shape)}")
    if p.dtype != torch.float32 or q.dtype != torch.float32:
        raise ValueError(f"p is {p.dtype} and q {q.dtype}, not float32")
    if not (p.is_contiguous() and q.is_contiguous()):
        raise ValueError("p or q is not contiguous")


def _is_fused(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _triton() -> Any:
    """Imported at first use, for a CPU may not have it installed."""
    return importlib.import_module("kernels.low_bit_triton")


def _torch_adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamStep) -> None:
    g = g if how.grad_factor == 1 else g * how.grad_factor
    step = torch.full((), how.step, dtype=torch.float32, device=w.device)
    torch._fused_adamw_(
        [w], [g], [m], [v], [], [step], lr=how.lr, beta1=how.beta1, beta2=how.beta2,
        weight_decay=how.weight_decay, eps=how.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


class _Space:
    """Scratch for chunks of at most n numbers, made once for all of them: buffers 0 to 3, float32 or int32 at will."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._words = torch.empty((4, n), dtype=torch.int32, device=device)
        self._floats = self._words.view(torch.float32)
        # Numbers that `add(number, tensor, alpha=factor)` takes, one pass where a product and a sum are two.
        self.lift = torch.tensor(LIFT, dtype=torch.int32, device=device)
        self.minus_least = torch.tensor(-LEAST_NORMAL, device=device)

    def floats(self, which: int, n: int) -> Tensor:
        return self._floats[which, :n]

    def words(self, which: int, n: int) -> Tensor:
        return self._words[which, :n]


def _decode(codes: Tensor, bits: Bits, space: _Space) -> Tensor:
    """The values of a chunk of codes, in the scratch: buffer 0, and 1 is used."""
    n = codes.numel()
    value, word, other = space.floats(0, n), space.words(0, n), space.floats(1, n)
    if bits.signed:
        word.copy_(codes).bitwise_and_(0x7FFF)
    else:
        word.copy_(codes.view(torch.uint16))
    torch.add(space.lift, word, alpha=1 << (23 - bits.mantissa), out=word)
    value.mul_(LOWER)
    # Exponent field 0 was read as if it had a hidden 1 and the exponent below: 2 value - LEAST_NORMAL is right
    # there, and elsewhere it is no smaller than the value, which is.
    torch.minimum(value, torch.add(space.minus_least, value, alpha=2, out=other), out=value)
    if bits.signed:
        word.bitwise_or_(space.words(1, n).copy_(codes).bitwise_and_(-0x80000000))
    return value


def _encode(bits: Bits, top: float, codes: Tensor, space: _Space) -> None:
    """Buffer 0 of the scratch into a chunk of codes; 0, 1 and 2 are used up.

    Adding 2^(23 - mantissa) times its own power of two, at least the smallest normal number, makes float32's
    own rounding cut a number where the format does. What was added is taken off as an integer.
    """
    n = codes.numel()
    value, word = space.floats(0, n), space.words(0, n)
    power, sign = space.words(1, n), space.words(2, n)
    if bits.signed:
        torch.bitwise_and(word, -0x80000000, out=sign)
        value.abs_().clamp_max_(top)
    else:
        value.clamp_(0.0, top).abs_()  # the sign that NaN may have is gone too
    shift = 23 - bits.mantissa
    torch.bitwise_and(word, EXPONENT, out=power).clamp_(LEAST, MOST)
    value.add_(power.view(torch.float32), alpha=2.0**shift)
    power.bitwise_right_shift_(shift)
    word.add_(power, alpha=1 - (1 << shift)).sub_((shift << 23) + (LEAST >> shift)).clamp_max_(bits.nan)
    codes.copy_(word.bitwise_or_(sign.bitwise_right_shift_(16)) if bits.signed else word)


def _load(stored: Tensor, bits: Bits, space: _Space) -> Tensor:
    """A chunk's values: the chunk itself if it is float32, else in buffer 0 of the scratch; 1 is used."""
    if stored.dtype == torch.float32:
        return stored
    if stored.dtype == torch.int16:
        return _decode(stored, bits, space)
    return space.floats(0, stored.numel()).copy_(stored)


def _store(values: Tensor, stored: Tensor, bits: Bits, space: _Space) -> None:
    """What _load gave, changed, back to where it is from; buffers 0, 1 and 2 of the scratch are used up."""
    if stored.dtype == torch.int16:
        _encode(bits, bits.largest, stored, space)
    elif stored.dtype != torch.float32:
        stored.copy_(values)


def _adam(w: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamStep, space: _Space) -> None:
    """One chunk, flat. g may be buffer 3 of the scratch."""
    n = w.numel()
    if how.grad_factor != 1:
        g = torch.mul(g, how.grad_factor, out=space.floats(3, n))
    variance = _load(v, BITS["0-6-10"], space).mul_(how.beta2).addcmul_(g, g, value=1 - how.beta2)
    if how.variance_clip:
        variance.clamp_max_(how.variance_clip)
    root = torch.sqrt(variance, out=space.floats(2, n)).add_(how.scaled_eps)
    _store(variance, v, BITS["0-6-10"], space)
    mean = _load(m, BITS["1-6-9"], space).lerp_(g, 1 - how.beta1)
    w.mul_(how.decay).addcdiv_(mean, root, value=-how.step_size)
    _store(mean, m, BITS["1-6-9"], space)
