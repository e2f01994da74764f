"""16-bit floats with a 6-bit exponent, and Adam with moments in them, in plain torch: the definitions.

Two formats of Ramesh et al. 2021 (section 2.4, appendices B.2 and D), named sign-exponent-mantissa bits:

    1-6-9    the mean of Adam, error buffers, what is sent between replicas
    0-6-10   the variance of Adam

The paper says that the largest finite value of 1-6-9 is a little under 16 and that it has infinities. Both
formats are therefore read as IEEE 754 would have it with bias 59: the exponent field is 1..62 for normal
numbers, 0 for zero and subnormals, 63 for infinity (mantissa 0) and NaN (any other mantissa).

    format   largest finite            smallest normal   smallest subnormal
    1-6-9    16 - 2^-6  = 15.984375    2^-58             2^-67
    0-6-10   16 - 2^-7  = 15.9921875   2^-58             2^-68

A code is the 16 bits of a number, kept in an int16: a code of 0x8000 or more is a negative int16.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.reference import wide

Format = Literal["1-6-9", "0-6-10"]
Overflow = Literal["saturate", "infinity"]

BIAS = 59
LEAST_NORMAL = 2.0 ** (1 - BIAS)


@dataclass(frozen=True)
class Bits:
    """What tells the two formats apart."""

    signed: bool
    mantissa: int

    @property
    def infinity(self) -> int:
        """The code of infinity; those below it are all finite numbers that are not negative, in their order."""
        return 63 << self.mantissa

    @property
    def nan(self) -> int:
        """The code that NaN becomes: as usual, the first bit of the mantissa is set."""
        return self.infinity | 1 << (self.mantissa - 1)

    @property
    def largest(self) -> float:
        """The largest finite value: half a unit of the last place more, and the nearest would be 16."""
        return 16.0 - 2.0 ** (3 - self.mantissa)


BITS: dict[Format, Bits] = {"1-6-9": Bits(True, 9), "0-6-10": Bits(False, 10)}


def decode(codes: Tensor, format: Format) -> Tensor:
    """The float32 values of int16 codes, exact; of their shape. The sign of a NaN means nothing."""
    bits = BITS[format]
    word = codes.long() & (0x7FFF if bits.signed else 0xFFFF)
    exponent, mantissa = word >> bits.mantissa, (word & ((1 << bits.mantissa) - 1)).double()
    fraction = mantissa / 2**bits.mantissa
    value = torch.where(exponent > 0, 1 + fraction, 2 * fraction) * 2.0 ** (exponent - BIAS).double()
    value[word == bits.infinity] = torch.inf
    value[word > bits.infinity] = torch.nan
    return torch.where((codes < 0) & bits.signed, -value, value).float()


def encode(x: Tensor, format: Format, overflow: Overflow = "saturate") -> Tensor:
    """The int16 codes of the values nearest to x, float32, of any shape; of two equally near, the even code.

    overflow: "saturate" makes what is beyond the largest finite value, infinity too, that value; "infinity"
    rounds as IEEE 754 does: half a unit beyond the largest and more is infinity.
    A 0-6-10 number has no sign: what is negative becomes 0, the nearest there is.
    NaN becomes the code `Bits.nan`, in 1-6-9 with the sign it had.
    """
    bits = BITS[format]
    codes = torch.arange(bits.infinity + 1, device=x.device)
    values = decode(codes.to(torch.int32).to(torch.int16), format).double()
    values[-1] = 16.0  # infinity stands where the next number would, so rounding to it needs no rule of its own
    x = x.contiguous()
    size = (x.abs() if bits.signed else x.clamp_min(0)).double().clamp_max(16.0)
    if overflow == "saturate":
        size = size.clamp_max(bits.largest)
    above = torch.searchsorted(values, size.nan_to_num(0.0)).clamp_min(1)
    below = above - 1
    middle = (values[below] + values[above]) / 2  # exact in float64
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    code = torch.where(up, above, below)
    code[x.isnan()] = bits.nan
    if bits.signed:
        code[x.signbit()] += 0x8000
    return code.to(torch.int32).to(torch.int16)


@dataclass(frozen=True)
class AdamStep:
    """The scalars of one AdamW update (Loshchilov and Hutter 2019), of which `step` is the number, from 1.

    variance_clip: the running variance is cut to this before it updates weights or is stored; 0 is no cut
    (Ramesh et al. 2021, B.2, have 5). grad_factor multiplies the gradient: the coefficient of gradient clipping.
    ValueError for a step before the first.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    variance_clip: float = 0.0
    grad_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step {self.step}: the first update is number 1")

    @property
    def decay(self) -> float:
        """What the weights are multiplied by."""
        return 1 - self.lr * self.weight_decay

    @property
    def root_bias2(self) -> float:
        return float((1 - self.beta2**self.step) ** 0.5)

    @property
    def step_size(self) -> float:
        """Of mean / (sqrt(variance) + scaled_eps), which is the bias-corrected update without a pass for the bias."""
        return self.lr * self.root_bias2 / (1 - self.beta1**self.step)

    @property
    def scaled_eps(self) -> float:
        return self.eps * self.root_bias2


def read(stored: Tensor, format: Format) -> Tensor:
    """A buffer's values: those of its codes if it is int16."""
    return decode(stored, format) if stored.dtype == torch.int16 else stored


def write(stored: Tensor, values: Tensor, format: Format) -> None:
    """Into a buffer, rounded to its precision; codes saturate, for an infinity would never leave a moment."""
    stored.copy_(encode(values.float(), format) if stored.dtype == torch.int16 else values)


@torch.no_grad()
def adam_update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamStep) -> None:
    """One AdamW update in place of weights w, mean m and variance v; g is the gradient. All of one shape.

    m and v are floats, or int16 with 1-6-9 and 0-6-10 codes. The weights take the moments as they are before
    these are rounded for storage. Computed in float32, or in float64 if w is that.
    """
    gradient = g.to(wide(w)) * how.grad_factor
    mean = how.beta1 * read(m, "1-6-9").to(wide(w)) + (1 - how.beta1) * gradient
    variance = how.beta2 * read(v, "0-6-10").to(wide(w)) + (1 - how.beta2) * gradient.square()
    if how.variance_clip:
        variance = variance.clamp_max(how.variance_clip)
    corrected_mean = mean / (1 - how.beta1**how.step)
    corrected_variance = variance / (1 - how.beta2**how.step)
    w.mul_(how.decay).sub_(how.lr * corrected_mean / (corrected_variance.sqrt() + how.eps))
    write(m, mean, "1-6-9")
    write(v, variance, "0-6-10")


@torch.no_grad()
def decompressed_adam_update(
    p: Tensor, q: Tensor, error: Tensor, n_replicas: int, w: Tensor, m: Tensor, v: Tensor, how: AdamStep
) -> None:
    """adam_update by the gradient G = p q^T, and error -= G / n_replicas, the error feedback of PowerSGD.

    p (N, R), q (K, R); w, m, v and error (N, K); error is float, or int16 with 1-6-9 codes. G enters the error
    as it is, the weights times grad_factor (Ramesh et al. 2021, appendix E.2; Vogels et al. 2019, algorithm 2).
    """
    gradient = p.to(wide(w)) @ q.to(wide(w)).T
    write(error, read(error, "1-6-9").to(wide(w)) - gradient / n_replicas, "1-6-9")
    adam_update(w, gradient, m, v, how)
