"""Triton kernels of the resblock boundary: one read and one write of every row, forward and backward.

A row of the stream stays in the registers of one block of threads. Partial sums of the gradients of gain
and bias are kept by each of a fixed number of programs and then added in order: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import NORM_EPS

N_PROGRAMS = 8  # of a backward on a device that does not say how many cores it has
REGISTERS = 128  # a thread of a backward: two rows of 4,096 are then on a core at once, one loads while one adds up
WARPS_PER_CORE = 16  # of 32 threads: with so many registers, all that a core of an H100 holds


@triton.jit
def forward_kernel(
    X: tl.tensor, BRANCH: tl.tensor, GAIN: tl.tensor, BIAS: tl.tensor, TOTAL: tl.tensor, H: tl.tensor,
    MEAN: tl.tensor, RSTD: tl.tensor, M: tl.tensor, EPS: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row. X, BRANCH, TOTAL, H (rows, M), GAIN and BIAS (M), MEAN and RSTD (rows)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < M
    at = row.to(tl.int64) * M + column
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        total = (x + tl.load(BRANCH + at, mask=inside, other=0.0).to(tl.float32)).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=inside)
        x = total.to(tl.float32)  # the norm is that of what is stored, for the backward reads that
    mean = tl.sum(x, 0) / M
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / M + EPS)
    gain = tl.load(GAIN + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(H + at, (centred * rstd * gain + bias).to(H.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@triton.jit
def finite_or_zero(value: tl.tensor) -> tl.tensor:
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def backward_kernel(
    D_TOTAL: tl.tensor, D_H: tl.tensor, TOTAL: tl.tensor, MEAN: tl.tensor, RSTD: tl.tensor, GAIN: tl.tensor,
    LEAVE_SCALE: tl.tensor, ENTER_SCALE: tl.tensor, D_X: tl.tensor, D_BRANCH: tl.tensor, D_GAIN: tl.tensor,
    D_BIAS: tl.tensor, ROWS: tl.tensor, M: tl.tensor, ROWS_PER_PROGRAM: tl.tensor,
    HAS_TOTAL: tl.constexpr, HAS_BRANCH: tl.constexpr, LEAVES_SCALED: tl.constexpr, ENTERS_SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS_PER_PROGRAM rows a program; D_GAIN and D_BIAS (programs, M) are its partial sums."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < M
    gain = tl.load(GAIN + column, mask=inside, other=0.0).to(tl.float32)
    d_gain = tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    first = program * ROWS_PER_PROGRAM
    at = first.to(tl.int64) * M + column
    enter, leave = 1.0, 1.0
    if ENTERS_SCALED:
        enter = 1.0 / tl.load(ENTER_SCALE)
    if LEAVES_SCALED:
        leave = tl.load(LEAVE_SCALE)
    for row in range(first, tl.minimum(first + ROWS_PER_PROGRAM, ROWS)):
        mean, rstd = tl.load(MEAN + row), tl.load(RSTD + row)
        d_h = tl.load(D_H + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(TOTAL + at, mask=inside, other=0.0).to(tl.float32)
        normal = (x - mean) * rstd  # outside the row it meets zeros only
        d_normal = d_h * gain
        along = tl.sum(d_normal * normal, 0) / M
        d_x = (d_normal - tl.sum(d_normal, 0) / M - normal * along) * rstd
        if ENTERS_SCALED:
            d_x = finite_or_zero(d_x * enter)
        if HAS_TOTAL:
            d_x += tl.load(D_TOTAL + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(D_X + at, d_x.to(D_X.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            if LEAVES_SCALED:
                d_x = finite_or_zero(d_x * leave)
            tl.store(D_BRANCH + at, d_x.to(D_BRANCH.dtype.element_ty), mask=inside)
        d_gain += d_h * normal
        d_bias += d_h
        at += M
    partial = program.to(tl.int64) * M + column
    tl.store(D_GAIN + partial, d_gain, mask=inside)
    tl.store(D_BIAS + partial, d_bias, mask=inside)


@triton.jit
def leave_backward_kernel(
    D_TOTAL: tl.tensor, SCALE: tl.tensor, D_BRANCH: tl.tensor, N: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """D_BRANCH = filter(D_TOTAL * SCALE), N numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(D_TOTAL + at, mask=at < N, other=0.0).to(tl.float32) * tl.load(SCALE)
    tl.store(D_BRANCH + at, finite_or_zero(gradient).to(D_BRANCH.dtype.element_ty), mask=at < N)


def block_and_warps(width: int) -> tuple[int, int]:
    """A row's power of two, and the warps that share it: at most 16 numbers a thread up to a row of 8,192."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 2), 16)  # one warp of 16 numbers a thread would spill in the backward


def forward(
    x: Tensor, branch: Tensor | None, gain: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (empty without a branch), h in `dtype`, mean and 1/deviation (...). All tensors contiguous, x (..., M)."""
    width = x.shape[-1]
    block, warps = block_and_warps(width)
    total = torch.empty_like(x) if branch is not None else x.new_empty(0)
    h = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if mean.numel():
        forward_kernel[(mean.numel(),)](
            x, x if branch is None else branch, gain, bias, total, h, mean, rstd, width,
            NORM_EPS, branch is not None, block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return total, h, mean, rstd


def backward(
    d_total: Tensor | None, d_h: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor,
    leave_scale: Tensor | None, enter_scale: Tensor | None, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbranch (empty without a dtype), dgain and dbias (M) float32. All tensors contiguous, total (..., M)."""
    width, rows = total.shape[-1], mean.numel()
    block, warps = block_and_warps(width)
    programs = max(min(rows, _n_programs(total, warps)), 1)
    d_x = torch.empty_like(total)
    d_branch = torch.empty_like(total, dtype=branch_dtype) if branch_dtype else d_x.new_empty(0, dtype=torch.float32)
    partial = total.new_empty((2, programs, width), dtype=torch.float32)
    backward_kernel[(programs,)](
        total if d_total is None else d_total, d_h, total, mean, rstd, gain,
        rstd if leave_scale is None else leave_scale, rstd if enter_scale is None else enter_scale,
        d_x, d_branch, *partial, rows, width, triton.cdiv(rows, programs),
        d_total is not None, branch_dtype is not None, leave_scale is not None, enter_scale is not None, block,
        num_warps=warps, maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    d_gain, d_bias = partial.sum(1)
    return d_x, d_branch, d_gain.clone(), d_bias.clone()


def leave_backward(d_total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """filter(d_total * scale) in `dtype`; d_total contiguous, of any shape."""
    d_branch = torch.empty_like(d_total, dtype=dtype)
    if d_total.numel():
        grid = (triton.cdiv(d_total.numel(), 4096),)
        leave_backward_kernel[grid](d_total, scale, d_branch, d_total.numel(), 4096, num_warps=8, enable_fp_fusion=True)
    return d_branch


def _n_programs(tensor: Tensor, warps: int) -> int:
    """As many as run at once."""
    if not tensor.is_cuda:
        return N_PROGRAMS
    cores = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return cores * (WARPS_PER_CORE // warps)
