"""Triton kernels of 16-bit floats with a 6-bit exponent, and of Adam with moments in them: one pass over memory.

A gradient given as factors P Q^T is multiplied out tile by tile in registers, and never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.low_bit_reference import AdamStep, Bits

FLOAT, MEAN, VARIANCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how a buffer's numbers are stored
BLOCK, WARPS = 2048, 4  # 16 numbers a thread: two loads of 16 bytes of each 16-bit buffer
TILE_N, TILE_K, TILE_R, TILE_WARPS, STAGES = 64, 64, 32, 8, 2


@triton.jit
def decoded(codes: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """float32 values of int16 codes. Exponent field 63 is lifted to float32's 255: infinity and NaN need no care."""
    word = codes.to(tl.int32)
    size = (word & 0x7FFF) << 14 if SIGNED else (word & 0xFFFF) << 13
    value = (size + 0x60000000).to(tl.float32, bitcast=True) * 2.0**-124
    # Exponent field 0 was read as if it had a hidden 1 and the exponent below.
    value = tl.where(value < 2.0**-58, 2.0 * value - 2.0**-58, value)
    if SIGNED:
        value = (value.to(tl.int32, bitcast=True) | (word & -2147483648)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def encoded(x: tl.tensor, top: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """int16 codes nearest to x, float32; what is beyond `top` becomes that.

    Adding 2^(23 - mantissa) times its own power of two, at least the smallest normal number, makes float32's
    own rounding cut a number where the format does. What was added is taken off as an integer.
    """
    MANTISSA: tl.constexpr = 9 if SIGNED else 10
    SHIFT: tl.constexpr = 23 - MANTISSA
    sign = (x.to(tl.int32, bitcast=True) >> 16) & 0x8000
    x = tl.abs(x) if SIGNED else tl.abs(tl.where(x < 0.0, 0.0, x))
    x = tl.where(x > top, top, x)
    power = x.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(power, 69 << 23), 131 << 23)  # the smallest normal number, 2^-58, and 16
    rounded = (x + power.to(tl.float32, bitcast=True) * 2.0**SHIFT).to(tl.int32, bitcast=True)
    code = rounded - power - (SHIFT << 23) + (power >> SHIFT) - (69 << MANTISSA)
    code = tl.minimum(code, (63 << MANTISSA) + (1 << (MANTISSA - 1)))  # only NaN is more
    if SIGNED:
        code = code | sign
    return code.to(tl.int16)


@triton.jit
def loaded(pointer: tl.tensor, inside: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    stored = tl.load(pointer, mask=inside, other=0)
    return stored.to(tl.float32) if KIND == FLOAT else decoded(stored, KIND == MEAN)


@triton.jit
def store(pointer: tl.tensor, values: tl.tensor, inside: tl.tensor, KIND: tl.constexpr) -> None:
    """Codes saturate, for an infinity would never leave a moment."""
    if KIND == FLOAT:
        tl.store(pointer, values.to(pointer.dtype.element_ty), mask=inside)
    else:
        largest = 16.0 - 2.0**-6 if KIND == MEAN else 16.0 - 2.0**-7
        tl.store(pointer, encoded(values, largest, KIND == MEAN), mask=inside)


@triton.jit
def encode_kernel(
    X: tl.tensor, CODES: tl.tensor, N: tl.tensor, TOP: tl.tensor, SIGNED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """CODES of X, N numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(CODES + at, encoded(tl.load(X + at, mask=at < N, other=0.0), TOP, SIGNED), mask=at < N)


@triton.jit
def decode_kernel(CODES: tl.tensor, X: tl.tensor, N: tl.tensor, SIGNED: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """X of CODES, N numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + at, decoded(tl.load(CODES + at, mask=at < N, other=0), SIGNED), mask=at < N)


@triton.jit
def update(
    W: tl.tensor, M: tl.tensor, V: tl.tensor, at: tl.tensor, inside: tl.tensor, g: tl.tensor,
    BETA1: tl.tensor, REST1: tl.tensor, BETA2: tl.tensor, REST2: tl.tensor, DECAY: tl.tensor, STEP_SIZE: tl.tensor,
    EPS: tl.tensor, CLIP: tl.tensor, M_KIND: tl.constexpr, V_KIND: tl.constexpr,
) -> None:  # fmt: skip
    """AdamW at the places `at` of W, M and V by their gradient g. REST is 1 - BETA, rounded once only."""
    variance = BETA2 * loaded(V + at, inside, V_KIND) + REST2 * g * g
    variance = tl.where(variance > CLIP, CLIP, variance)  # NaN stays
    store(V + at, variance, inside, V_KIND)
    mean = BETA1 * loaded(M + at, inside, M_KIND) + REST1 * g
    store(M + at, mean, inside, M_KIND)
    w = tl.load(W + at, mask=inside, other=0.0)
    tl.store(W + at, DECAY * w - STEP_SIZE * mean / (tl.sqrt(variance) + EPS), mask=inside)


@triton.jit
def adam_kernel(
    W: tl.tensor, G: tl.tensor, M: tl.tensor, V: tl.tensor, N: tl.tensor, FACTOR: tl.tensor,
    BETA1: tl.tensor, REST1: tl.tensor, BETA2: tl.tensor, REST2: tl.tensor, DECAY: tl.tensor, STEP_SIZE: tl.tensor,
    EPS: tl.tensor, CLIP: tl.tensor, M_KIND: tl.constexpr, V_KIND: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """W, G, M, V of N numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + at, mask=at < N, other=0.0) * FACTOR
    update(W, M, V, at, at < N, g, BETA1, REST1, BETA2, REST2, DECAY, STEP_SIZE, EPS, CLIP, M_KIND, V_KIND)


@triton.jit
def decompressed_adam_kernel(
    P: tl.tensor, Q: tl.tensor, ERROR: tl.tensor, W: tl.tensor, M: tl.tensor, V: tl.tensor,
    N: tl.tensor, K: tl.tensor, R: tl.tensor, SHARE: tl.tensor, FACTOR: tl.tensor,
    BETA1: tl.tensor, REST1: tl.tensor, BETA2: tl.tensor, REST2: tl.tensor, DECAY: tl.tensor, STEP_SIZE: tl.tensor,
    EPS: tl.tensor, CLIP: tl.tensor, ERROR_KIND: tl.constexpr, M_KIND: tl.constexpr, V_KIND: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of W a program. P (N, R), Q (K, R); ERROR, W, M, V (N, K); ERROR gives its SHARE of the gradient."""
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    column = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    rank = tl.arange(0, TILE_R)
    p_at = row.to(tl.int64)[:, None] * R + rank[None, :]
    q_at = column.to(tl.int64)[:, None] * R + rank[None, :]
    g = tl.zeros([TILE_N, TILE_K], tl.float32)
    for start in range(0, R, TILE_R):
        p = tl.load(P + p_at + start, mask=(row[:, None] < N) & (rank[None, :] < R - start), other=0.0)
        q = tl.load(Q + q_at + start, mask=(column[:, None] < K) & (rank[None, :] < R - start), other=0.0)
        g = tl.dot(p, tl.trans(q), g, input_precision="tf32x3")  # three products of 11 bits: as good as float32
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    inside = (row[:, None] < N) & (column[None, :] < K)
    store(ERROR + at, loaded(ERROR + at, inside, ERROR_KIND) - SHARE * g, inside, ERROR_KIND)
    g = g * FACTOR
    update(W, M, V, at, inside, g, BETA1, REST1, BETA2, REST2, DECAY, STEP_SIZE, EPS, CLIP, M_KIND, V_KIND)


def encode(x: Tensor, bits: Bits, top: float) -> Tensor:
    """int16 codes of x, contiguous float32; `top` is what everything beyond becomes."""
    codes = torch.empty_like(x, dtype=torch.int16)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        encode_kernel[grid](x, codes, x.numel(), top, bits.signed, BLOCK, num_warps=WARPS, enable_fp_fusion=True)
    return codes


def decode(codes: Tensor, bits: Bits) -> Tensor:
    """float32 values of contiguous int16 codes."""
    x = torch.empty_like(codes, dtype=torch.float32)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        decode_kernel[grid](codes, x, x.numel(), bits.signed, BLOCK, num_warps=WARPS, enable_fp_fusion=True)
    return x


def adam_update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamStep) -> None:
    """In place; all contiguous and of one shape."""
    if w.numel():
        grid = (triton.cdiv(w.numel(), BLOCK),)
        adam_kernel[grid](
            w, g, m, v, w.numel(), float(how.grad_factor), *scalars(how), kind(m, MEAN), kind(v, VARIANCE),
            BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def decompressed_adam_update(
    p: Tensor, q: Tensor, error: Tensor, n_replicas: int, w: Tensor, m: Tensor, v: Tensor, how: AdamStep
) -> None:
    """In place; all contiguous, p (N, R), q (K, R), the others (N, K)."""
    if w.numel():
        grid = (triton.cdiv(w.shape[0], TILE_N), triton.cdiv(w.shape[1], TILE_K))
        decompressed_adam_kernel[grid](
            p, q, error, w, m, v, *w.shape, p.shape[1], 1.0 / n_replicas, float(how.grad_factor), *scalars(how),
            kind(error, MEAN), kind(m, MEAN), kind(v, VARIANCE), TILE_N, TILE_K, TILE_R,
            num_warps=TILE_WARPS, num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip


def scalars(how: AdamStep) -> list[float]:
    """What both kernels take from BETA1 to CLIP."""
    clip = how.variance_clip or float("inf")
    values = [
        how.beta1, 1 - how.beta1, how.beta2, 1 - how.beta2, how.decay, how.step_size, how.scaled_eps, clip
    ]  # fmt: skip
    return [float(value) for value in values]  # an int would be another type of argument


def kind(stored: Tensor, codes: tl.constexpr) -> int:
    return (codes if stored.dtype == torch.int16 else FLOAT).value
