"""Attention under a sparsity pattern as Triton kernels: forward, and a backward without atomics.

Text and image are tiled apart, so a tile of BLOCK slots lies in one of them. A tile of queries first
meets the keys that all of it sees (the text before it) without a mask, then its *band*: the tiles that
hold some key that some of it sees, with the rule. Dense attention is one long text. Column walks the
image down its columns, by addresses alone: in that order its band is the columns the tile touches.

Scores are fp32 in base 2 (log2 e is folded into the scale) and the log-sum-exp is kept in base 2. The
softmax is computed tile by tile, and the backward recomputes it from the log-sum-exp, in one pass for
dq and one for dk and dv (Dao 2023, "FlashAttention-2", sections 3.1 and 3.2).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from kernels.attention_tiles import elements, first_key, last_query, place, sees, slot
from kernels.layout import Sparsity

MAX_WIDTH = 128  # of a head: twice that leaves the accumulators of dk and dv no registers

LOG2_E = constexpr(math.log2(math.e))
# The running maximum starts here and not at -inf: a row that has met no key yet then has weights
# exp2(-inf - LOWEST) = 0, where -inf - -inf would be NaN.
LOWEST = constexpr(-3.0e38)
# fp32 products are summed as fp32 on the ordinary cores. Three tf32 products (tf32x3) would use the
# tensor cores but drop the last bits of each factor; fp32 is here to be exact, 16 bits to be fast.
PRECISION = constexpr("ieee")


@triton.jit
def _forward_tile(
    acc: tensor, top: tensor, total: tensor, q: tensor, qi: tensor, qkv: tensor, k0: tensor,
    end: tensor, is_text: tensor, scale: tensor, stride_s: tensor, stride_p: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr,
    D: constexpr, FEATURES: constexpr, STEP: constexpr, BAND: constexpr, CUT: constexpr,
    WIDE: constexpr,
) -> Any:  # fmt: skip
    """One step of the running softmax: sums, largest score and total weight after STEP more keys."""
    ki = k0 + tl.arange(0, STEP)
    slots = slot(ki, is_text, T, ROWS, COLUMNS, RULE) if BAND else ki
    at, exist = elements(slots, stride_s, ki, end, D, FEATURES, CUT, WIDE)
    k = tl.load(qkv + stride_p + at, mask=exist, other=0.0)
    v = tl.load(qkv + 2 * stride_p + at, mask=exist, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BAND:
        seen = sees(qi[:, None], ki[None, :], is_text, T, ROWS, COLUMNS, RULE, HALF)
        score = tl.where(seen, score, float("-inf"))
    elif CUT:
        score = tl.where((ki < end)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_top, total * fade + tl.sum(weight, 1)


@triton.jit
def _forward(
    QKV: tensor, OUT: tensor, LSE: tensor, scale: tensor, n_z: tensor, n_heads: tensor,
    stride_b: tensor, stride_s: tensor, stride_p: tensor, stride_h: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr,
    REACH: constexpr, D: constexpr, FEATURES: constexpr, BLOCK: constexpr, STEP: constexpr,
    WIDE: constexpr,
) -> None:  # fmt: skip
    """Output and log-sum-exp of BLOCK queries. Image tiles are the longer programs, so they start first."""
    N_IMAGE: constexpr = ROWS * COLUMNS
    CUT: constexpr = (T % BLOCK > 0) | (N_IMAGE % BLOCK > 0)
    z, is_text, i0, n = place(tl.num_programs(0) - 1 - tl.program_id(0), n_z, T, N_IMAGE, BLOCK)
    b, h = (z // n_heads).to(tl.int64), (z % n_heads).to(tl.int64)
    qkv = QKV + b * stride_b + h * stride_h
    qi = i0 + tl.arange(0, BLOCK)
    slots = slot(qi, is_text, T, ROWS, COLUMNS, RULE)
    at, exist = elements(slots, stride_s, qi, n, D, FEATURES, CUT, WIDE)
    q = tl.load(qkv + at, mask=exist, other=0.0)
    acc = tl.zeros([BLOCK, FEATURES], tl.float32)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for k0 in tl.range(0, tl.where(is_text, i0, T), STEP):
        acc, top, total = _forward_tile(
            acc, top, total, q, qi, qkv, k0, T, is_text, scale * LOG2_E, stride_s, stride_p,
            T, ROWS, COLUMNS, RULE, HALF, D, FEATURES, STEP, False, T % STEP > 0, WIDE,
        )  # fmt: skip
    for k0 in tl.range(first_key(i0, is_text, ROWS, REACH, RULE, STEP), tl.minimum(i0 + BLOCK, n), STEP):
        acc, top, total = _forward_tile(
            acc, top, total, q, qi, qkv, k0, n, is_text, scale * LOG2_E, stride_s, stride_p,
            T, ROWS, COLUMNS, RULE, HALF, D, FEATURES, STEP, True, CUT, WIDE,
        )  # fmt: skip
    S: constexpr = T + N_IMAGE
    at, exist = elements(slots, n_heads * D, qi, n, D, FEATURES, CUT, WIDE)
    out = OUT + (b * S * n_heads + h) * D
    tl.store(out + at, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=exist)
    tl.store(LSE + z.to(tl.int64) * S + slots, top + tl.log2(total), mask=qi < n)


@triton.jit
def _delta(
    OUT: tensor, D_OUT: tensor, DELTA: tensor, n_heads: tensor,
    stride_b: tensor, stride_s: tensor, stride_h: tensor,
    S: constexpr, D: constexpr, FEATURES: constexpr, BLOCK: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """(B, H, S) float32 sums of out * d_out over features, which both passes of the backward need."""
    TILES: constexpr = (S + BLOCK - 1) // BLOCK
    z = tl.program_id(0) // TILES
    b, h = (z // n_heads).to(tl.int64), (z % n_heads).to(tl.int64)
    slots = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    at, exist = elements(slots, n_heads * D, slots, S, D, FEATURES, S % BLOCK > 0, WIDE)
    out = tl.load(OUT + (b * S * n_heads + h) * D + at, mask=exist, other=0.0).to(tl.float32)
    at, exist = elements(slots, stride_s, slots, S, D, FEATURES, S % BLOCK > 0, WIDE)
    d_out = tl.load(D_OUT + b * stride_b + h * stride_h + at, mask=exist, other=0.0).to(tl.float32)
    tl.store(DELTA + z.to(tl.int64) * S + slots, tl.sum(out * d_out, 1), mask=slots < S)


@triton.jit
def _dq_tile(
    dq: tensor, q: tensor, d_out: tensor, lse: tensor, delta: tensor, qi: tensor, qkv: tensor, k0: tensor,
    end: tensor, is_text: tensor, scale: tensor, stride_s: tensor, stride_p: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr, D: constexpr,
    FEATURES: constexpr, STEP: constexpr, BAND: constexpr, CUT: constexpr, WIDE: constexpr,
) -> Any:  # fmt: skip
    """dq, before its factor of scale, after STEP more keys."""
    ki = k0 + tl.arange(0, STEP)
    slots = slot(ki, is_text, T, ROWS, COLUMNS, RULE) if BAND else ki
    at, exist = elements(slots, stride_s, ki, end, D, FEATURES, CUT, WIDE)
    k = tl.load(qkv + stride_p + at, mask=exist, other=0.0)
    v = tl.load(qkv + 2 * stride_p + at, mask=exist, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weight = tl.exp2(score * scale - lse[:, None])
    if BAND:
        seen = sees(qi[:, None], ki[None, :], is_text, T, ROWS, COLUMNS, RULE, HALF)
        weight = tl.where(seen, weight, 0.0)
    elif CUT:
        weight = tl.where((ki < end)[None, :], weight, 0.0)
    d_score = weight * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(d_score.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq(
    QKV: tensor, D_OUT: tensor, LSE: tensor, DELTA: tensor, D_QKV: tensor, scale: tensor, n_z: tensor, n_heads: tensor,
    stride_b: tensor, stride_s: tensor, stride_p: tensor, stride_h: tensor,
    d_stride_b: tensor, d_stride_s: tensor, d_stride_h: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr, REACH: constexpr,
    D: constexpr, FEATURES: constexpr, BLOCK: constexpr, STEP: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """Gradient of BLOCK queries, over the same keys in the same order as forward."""
    N_IMAGE: constexpr = ROWS * COLUMNS
    CUT: constexpr = (T % BLOCK > 0) | (N_IMAGE % BLOCK > 0)
    z, is_text, i0, n = place(tl.num_programs(0) - 1 - tl.program_id(0), n_z, T, N_IMAGE, BLOCK)
    b, h = (z // n_heads).to(tl.int64), (z % n_heads).to(tl.int64)
    qkv = QKV + b * stride_b + h * stride_h
    qi = i0 + tl.arange(0, BLOCK)
    slots = slot(qi, is_text, T, ROWS, COLUMNS, RULE)
    at, exist = elements(slots, stride_s, qi, n, D, FEATURES, CUT, WIDE)
    q = tl.load(qkv + at, mask=exist, other=0.0)
    at, exist = elements(slots, d_stride_s, qi, n, D, FEATURES, CUT, WIDE)
    d_out = tl.load(D_OUT + b * d_stride_b + h * d_stride_h + at, mask=exist, other=0.0)
    S: constexpr = T + N_IMAGE
    lse = tl.load(LSE + z.to(tl.int64) * S + slots, mask=qi < n, other=0.0)
    delta = tl.load(DELTA + z.to(tl.int64) * S + slots, mask=qi < n, other=0.0)
    dq = tl.zeros([BLOCK, FEATURES], tl.float32)
    for k0 in tl.range(0, tl.where(is_text, i0, T), STEP):
        dq = _dq_tile(
            dq, q, d_out, lse, delta, qi, qkv, k0, T, is_text, scale * LOG2_E, stride_s, stride_p,
            T, ROWS, COLUMNS, RULE, HALF, D, FEATURES, STEP, False, T % STEP > 0, WIDE,
        )  # fmt: skip
    for k0 in tl.range(first_key(i0, is_text, ROWS, REACH, RULE, STEP), tl.minimum(i0 + BLOCK, n), STEP):
        dq = _dq_tile(
            dq, q, d_out, lse, delta, qi, qkv, k0, n, is_text, scale * LOG2_E, stride_s, stride_p,
            T, ROWS, COLUMNS, RULE, HALF, D, FEATURES, STEP, True, CUT, WIDE,
        )  # fmt: skip
    at, exist = elements(slots, 3 * n_heads * D, qi, n, D, FEATURES, CUT, WIDE)
    tl.store(D_QKV + (b * S * 3 * n_heads + h) * D + at, (dq * scale).to(D_QKV.dtype.element_ty), mask=exist)


@triton.jit
def _dkv_tile(
    dk: tensor, dv: tensor, k: tensor, v: tensor, ki: tensor, q_base: tensor, d_base: tensor,
    lse_base: tensor, delta_base: tensor, q0: tensor, end: tensor, is_text: tensor,
    scale: tensor, stride_s: tensor, d_stride_s: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr, D: constexpr,
    FEATURES: constexpr, STEP: constexpr, BAND: constexpr, CUT: constexpr, WIDE: constexpr,
) -> Any:  # fmt: skip
    """dk, before its factor of scale, and dv after STEP more queries; scores are (keys, queries) here.

    Queries past the end are read as zeros with a log-sum-exp of zero: weight 1 times d_out 0.
    """
    qi = q0 + tl.arange(0, STEP)
    slots = slot(qi, is_text, T, ROWS, COLUMNS, RULE) if BAND else qi
    at, exist = elements(slots, stride_s, qi, end, D, FEATURES, CUT, WIDE)
    q = tl.load(q_base + at, mask=exist, other=0.0)
    at, exist = elements(slots, d_stride_s, qi, end, D, FEATURES, CUT, WIDE)
    d_out = tl.load(d_base + at, mask=exist, other=0.0)
    if CUT:
        lse = tl.load(lse_base + slots, mask=qi < end, other=0.0)
        delta = tl.load(delta_base + slots, mask=qi < end, other=0.0)
    else:
        lse, delta = tl.load(lse_base + slots), tl.load(delta_base + slots)
    weight = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
    if BAND:
        seen = sees(qi[None, :], ki[:, None], is_text, T, ROWS, COLUMNS, RULE, HALF)
        weight = tl.where(seen, weight, 0.0)
    dv = tl.dot(weight.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    d_score = weight * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
    return tl.dot(d_score.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def _dkv(
    QKV: tensor, D_OUT: tensor, LSE: tensor, DELTA: tensor, D_QKV: tensor, scale: tensor, n_z: tensor, n_heads: tensor,
    stride_b: tensor, stride_s: tensor, stride_p: tensor, stride_h: tensor,
    d_stride_b: tensor, d_stride_s: tensor, d_stride_h: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr, REACH: constexpr,
    D: constexpr, FEATURES: constexpr, BLOCK: constexpr, STEP: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """Gradients of BLOCK keys and values. Text keys, which every later slot sees, are the long programs: first."""
    N_IMAGE: constexpr = ROWS * COLUMNS
    S: constexpr = T + N_IMAGE
    CUT: constexpr = (T % BLOCK > 0) | (N_IMAGE % BLOCK > 0)
    z, is_text, i0, n = place(tl.program_id(0), n_z, T, N_IMAGE, BLOCK)
    b, h = (z // n_heads).to(tl.int64), (z % n_heads).to(tl.int64)
    qkv = QKV + b * stride_b + h * stride_h
    d_base = D_OUT + b * d_stride_b + h * d_stride_h
    lse_base, delta_base = LSE + z.to(tl.int64) * S, DELTA + z.to(tl.int64) * S
    ki = i0 + tl.arange(0, BLOCK)
    slots = slot(ki, is_text, T, ROWS, COLUMNS, RULE)
    at, exist = elements(slots, stride_s, ki, n, D, FEATURES, CUT, WIDE)
    k = tl.load(qkv + stride_p + at, mask=exist, other=0.0)
    v = tl.load(qkv + 2 * stride_p + at, mask=exist, other=0.0)
    dk = tl.zeros([BLOCK, FEATURES], tl.float32)
    dv = tl.zeros([BLOCK, FEATURES], tl.float32)
    end = tl.minimum(i0 + BLOCK, n)
    for q0 in tl.range(i0, last_query(end, is_text, N_IMAGE, ROWS, REACH, RULE), STEP):
        dk, dv = _dkv_tile(
            dk, dv, k, v, ki, qkv, d_base, lse_base, delta_base, q0, n, is_text, scale * LOG2_E, stride_s, d_stride_s,
            T, ROWS, COLUMNS, RULE, HALF, D, FEATURES, STEP, True, CUT, WIDE,
        )  # fmt: skip
    for q0 in tl.range(tl.where(is_text, end, S), S, STEP):
        dk, dv = _dkv_tile(
            dk, dv, k, v, ki, qkv, d_base, lse_base, delta_base, q0, S, is_text, scale * LOG2_E, stride_s, d_stride_s,
            T, ROWS, COLUMNS, RULE, HALF, D, FEATURES, STEP, False, CUT, WIDE,
        )  # fmt: skip
    at, exist = elements(slots, 3 * n_heads * D, ki, n, D, FEATURES, CUT, WIDE)
    d_qkv = D_QKV + (b * S * 3 * n_heads + h) * D
    tl.store(d_qkv + n_heads * D + at, (dk * scale).to(D_QKV.dtype.element_ty), mask=exist)
    tl.store(d_qkv + 2 * n_heads * D + at, dv.to(D_QKV.dtype.element_ty), mask=exist)


@dataclass(frozen=True)
class Tiling:
    """BLOCK slots that a program keeps, STEP slots that it walks by; its warps; stages of its load pipeline."""

    block: int
    step: int
    warps: int
    stages: int


def tiling(d: int, dtype: torch.dtype) -> Tiling:
    """Tile sizes of all three kernels for heads of width d <= 128. ValueError for other widths and dtypes.

    A warp-group product (wgmma) of an H100 is 64 rows high. Bands are narrow, so tiles of 64 x 32 waste less
    than larger ones and leave registers for 3 or 4 programs a multiprocessor; 128 x 64 spills at head width
    128. fp32 has no tensor core: operands and sums of its products all live in registers, and any larger
    size, or a second stage, spills at some width.
    """
    if d > MAX_WIDTH:
        raise ValueError(
            f"attention=triton takes heads of width {MAX_WIDTH} at most, not {d}; attention=dense takes any"
        )
    if dtype == torch.float32:
        return Tiling(block=64 if d <= 64 else 32, step=16, warps=8, stages=1)
    if dtype in (torch.float16, torch.bfloat16):
        return Tiling(block=64, step=32, warps=4, stages=3)
    raise ValueError(f"attention=triton takes float32, float16 and bfloat16, not {dtype}; attention=dense takes all")


def constants(sparsity: Sparsity, d: int, dtype: torch.dtype, wide: bool = False) -> dict[str, Any]:
    """What the kernels are compiled for. wide: an offset inside one batch row may pass 2^31 elements."""
    layout, tiles = sparsity.layout, tiling(d, dtype)
    all_text = sparsity.pattern == "dense" or not layout.n_image
    return {
        "T": layout.n_slots if all_text else layout.n_text,
        "ROWS": 0 if all_text else layout.rows,
        "COLUMNS": layout.columns,
        "RULE": "half window" if sparsity.pattern == "conv" and sparsity.half_window else sparsity.pattern,
        "HALF": sparsity.kernel // 2,
        "REACH": 0 if all_text else sparsity.reach,
        "D": d,
        "FEATURES": max(16, triton.next_power_of_2(d)),
        "BLOCK": tiles.block,
        "STEP": tiles.step,
        "WIDE": wide,
    }


def options(d: int, dtype: torch.dtype) -> dict[str, int]:
    """How the kernels are compiled.

    fp32 may use all registers there are: left to itself, the assembler spills a few to fit one more program.
    """
    tiles = tiling(d, dtype)
    registers = {"maxnreg": 255} if dtype == torch.float32 else {}
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True} | registers


def forward(qkv: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """(B, S, 3, H, D) -> (B, S, H, D), and (B, H, S) float32 log-sum-exp of the scores in base 2.

    ValueError for a dtype or head width that the kernels do not have, or a tensor that is on no GPU.
    """
    _check(qkv)
    b, s, _, h, d = qkv.shape
    out = torch.empty(b, s, h, d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=qkv.device)
    fixed = constants(sparsity, d, qkv.dtype, _is_wide(qkv, out))
    arguments = (qkv, out, lse, d**-0.5, b * h, h, *qkv.stride()[:4])
    with torch.cuda.device_of(qkv):
        _forward[_grid(b * h, fixed)](*arguments, **fixed, **options(d, qkv.dtype))
    return out, lse


def backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, sparsity: Sparsity) -> Tensor:
    """(B, S, 3, H, D) gradient of qkv from that of out (B, S, H, D), and what forward took and gave."""
    b, s, _, h, d = qkv.shape
    d_qkv = torch.empty(b, s, 3, h, d, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty(b, h, s, dtype=torch.float32, device=qkv.device)
    fixed = constants(sparsity, d, qkv.dtype, _is_wide(qkv, d_out, d_qkv))
    some = {name: fixed[name] for name in ("D", "FEATURES", "BLOCK", "WIDE")}
    strides = d_out.stride()[:3]
    arguments = (qkv, d_out, lse, delta, d_qkv, d**-0.5, b * h, h, *qkv.stride()[:4], *strides)
    with torch.cuda.device_of(qkv):
        n_tiles = triton.cdiv(s, fixed["BLOCK"])
        _delta[(n_tiles * b * h,)](out, d_out, delta, h, *strides, S=s, **some, **options(d, qkv.dtype))
        _dq[_grid(b * h, fixed)](*arguments, **fixed, **options(d, qkv.dtype))
        _dkv[_grid(b * h, fixed)](*arguments, **fixed, **options(d, qkv.dtype))
    return d_qkv


def _check(qkv: Tensor) -> None:
    tiling(qkv.shape[-1], qkv.dtype)
    if qkv.device.type == "cpu" and isinstance(_forward, triton.JITFunction):
        raise ValueError("attention=triton does not run on cpu; attention=auto does")


def _grid(n_z: int, fixed: dict[str, Any]) -> tuple[int]:
    """One dimension, for the others end at 65,535."""
    n_image = fixed["ROWS"] * fixed["COLUMNS"]
    return ((triton.cdiv(fixed["T"], fixed["BLOCK"]) + triton.cdiv(n_image, fixed["BLOCK"])) * n_z,)


def _is_wide(*tensors: Tensor) -> bool:
    """Of (B, S, ...) tensors; tiles may look at up to a block of slots past the end, masked."""
    return any((2 * tensor.shape[1] + 64) * tensor.stride(1) >= 2**31 for tensor in tensors)
