"""How near a fast version must come: to float64, and to what plain torch reaches in the same precision."""

import torch
from torch import Tensor

# Of the norm of the error to the norm of the exact value. A stored number errs by up to half its last bit:
# 6e-8, 4.9e-4 and 3.9e-3 relative, a third of that on average; the rest is for the arithmetic before.
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|, 2-norms."""
    assert value.shape == exact.shape
    return float((value.double() - exact).norm() / exact.norm())


def assert_accurate(
    values: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    inputs: torch.dtype = torch.float64,
    amplified: float = 1.0,
) -> None:
    """Every value within LIMIT of its dtype and at most twice as far off as plain torch.

    inputs: a dtype to which something is rounded on the way, the limit is then that one's.
    amplified: by how much the function itself enlarges a rounding error.
    """
    for name, value in values.items():
        error, usual = relative_error(value, exact[name]), relative_error(plain[name], exact[name])
        limit = amplified * max(LIMIT[value.dtype], LIMIT[inputs])
        assert value.dtype == plain[name].dtype and error < limit, f"{name}: {error:.1e}, limit {limit:.1e}"
        assert error <= max(2 * usual, LIMIT[torch.float64]), f"{name}: {error:.1e}, plain torch {usual:.1e}"
