"""Triton kernels of relaxed codes: a row of logits is read once, and stays in registers until its results are out."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import wide


@triton.jit
def forward_kernel(
    LOGITS: tl.tensor, UNIFORM: tl.tensor, WEIGHTS: tl.tensor, KL: tl.tensor, LSE: tl.tensor, MEAN: tl.tensor,
    K: tl.tensor, LOG_K: tl.tensor, COLDNESS: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row. LOGITS, UNIFORM, WEIGHTS (rows, K), KL, LSE, MEAN (rows); COLDNESS = 1 / temperature."""
    row = tl.program_id(0)
    code = tl.arange(0, BLOCK)
    inside = code < K
    at = row.to(tl.int64) * K + code
    x = tl.load(LOGITS + at, mask=inside, other=-float("inf")).to(tl.float32)
    uniform = tl.load(UNIFORM + at, mask=inside, other=0.5).to(tl.float32)
    noisy = (x - tl.log(-tl.log(uniform))) * COLDNESS
    noisy = tl.exp(noisy - tl.max(noisy, 0))
    tl.store(WEIGHTS + at, (noisy / tl.sum(noisy, 0)).to(WEIGHTS.dtype.element_ty), mask=inside)
    top = tl.max(x, 0)
    above = tl.where(inside, x - top, 0.0)
    odds = tl.where(inside, tl.exp(above), 0.0)
    total = tl.sum(odds, 0)
    share = tl.sum(odds * above, 0) / total
    log_total = tl.log(total)
    tl.store(KL + row, share - log_total + LOG_K)
    tl.store(LSE + row, log_total + top)
    tl.store(MEAN + row, share + top)


@triton.jit
def backward_kernel(
    D_WEIGHTS: tl.tensor, WEIGHTS: tl.tensor, LOGITS: tl.tensor, D_KL: tl.tensor, LSE: tl.tensor, MEAN: tl.tensor,
    D_LOGITS: tl.tensor, K: tl.tensor, COLDNESS: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row. D_WEIGHTS, WEIGHTS, LOGITS, D_LOGITS (rows, K); D_KL, LSE, MEAN (rows)."""
    row = tl.program_id(0)
    code = tl.arange(0, BLOCK)
    inside = code < K
    at = row.to(tl.int64) * K + code
    weights = tl.load(WEIGHTS + at, mask=inside, other=0.0).to(tl.float32)
    d_weights = tl.load(D_WEIGHTS + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(LOGITS + at, mask=inside, other=0.0).to(tl.float32)
    d_x = weights * (d_weights - tl.sum(weights * d_weights, 0)) * COLDNESS
    d_x += tl.load(D_KL + row) * tl.exp(x - tl.load(LSE + row)) * (x - tl.load(MEAN + row))
    tl.store(D_LOGITS + at, d_x.to(D_LOGITS.dtype.element_ty), mask=inside)


def block_and_warps(codebook: int) -> tuple[int, int]:
    """A row's power of two, and the warps that share it: 16 logits a thread."""
    block = triton.next_power_of_2(codebook)
    return block, min(max(block // 512, 1), 16)


def forward(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, uniform (rows, K) contiguous -> weights (rows, K), kl, lse and mean logit (rows) float32."""
    n_rows, codebook = logits.shape
    block, warps = block_and_warps(codebook)
    weights = torch.empty_like(logits)
    kl, lse, mean = (logits.new_empty(n_rows, dtype=wide(logits)) for _ in range(3))
    if n_rows:
        forward_kernel[(n_rows,)](
            logits, uniform, weights, kl, lse, mean, codebook, math.log(codebook), 1 / temperature, block,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return weights, kl, lse, mean


def backward(
    d_weights: Tensor, weights: Tensor, logits: Tensor, d_kl: Tensor, lse: Tensor, mean: Tensor, temperature: float
) -> Tensor:
    """d_weights, weights, logits (rows, K), the others (rows), all contiguous -> d_logits (rows, K)."""
    n_rows, codebook = logits.shape
    block, warps = block_and_warps(codebook)
    d_logits = torch.empty_like(logits)
    if n_rows:
        backward_kernel[(n_rows,)](
            d_weights,
            weights,
            logits,
            d_kl,
            lse,
            mean,
            d_logits,
            codebook,
            1 / temperature,
            block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return d_logits
