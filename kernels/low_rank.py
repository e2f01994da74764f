"""Orthonormal bases of thin matrices, the step in the middle of low-rank gradient compression.

PowerSGD (Vogels et al. 2019, algorithm 1) orthogonalises P = M Q. Householder reflections give columns that
are orthonormal to rounding whatever P is. CholeskyQR2 (Yamamoto et al. 2015) is made of matrix products, which
suits a GPU, and does the same while P is well conditioned. Gram-Schmidt loses orthogonality with the condition
number; it was unstable at scale (Ramesh et al. 2021, E.2), so it is not here.

Columns are those of the QR factorisation whose R has a positive diagonal: there is one such factorisation, so
both methods give the same columns up to rounding, and the same input gives the same bits on every replica.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Method = Literal["householder", "cholesky"]

# |Q1' Q1 - I| (Frobenius) up to which a second pass makes columns orthonormal to rounding: below 1 the condition
# number of Q1 is at most sqrt(3), and a pass leaves an error of rounding times its square (Yamamoto et al. 2015).
NEAR_ENOUGH = 0.5


def orthogonalise(matrices: Tensor, epsilon: float = 1e-6, method: Method = "householder") -> Tensor:
    """Orthonormal columns that span the columns of each matrix + epsilon I; (..., n, r), r <= n, the same shape back.

    epsilon: added along the diagonal of the rectangular matrix, so that a matrix of zeros has a basis too (Ramesh
    et al. 2021, E.2: 1e-6); scale the matrices so that it is small against them. Finite float32 or float64 only.
    "cholesky" falls back to Householder for each matrix that is too ill conditioned for it; finding these waits
    for the device once. ValueError for more columns than rows.
    """
    n, r = matrices.shape[-2:]
    if r > n:
        raise ValueError(f"{r} columns of {n} numbers cannot be orthonormal")
    raised = matrices.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    return _cholesky_twice(raised) if method == "cholesky" else _householder(raised)


def orthogonalise_each(
    matrices: Sequence[Tensor], epsilon: float = 1e-6, method: Method = "householder"
) -> list[Tensor]:
    """`orthogonalise` of matrices (n, r) of different shapes; those of one shape are taken together."""
    places: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(place)
    answers: dict[int, Tensor] = {}
    for alike in places.values():
        bases = orthogonalise(torch.stack([matrices[place] for place in alike]), epsilon, method)
        answers.update(zip(alike, bases, strict=True))
    return [answers[place] for place in range(len(matrices))]


def _householder(matrices: Tensor) -> Tensor:
    reflectors, scales = torch.geqrf(matrices)
    diagonal = reflectors.diagonal(dim1=-2, dim2=-1)  # of R
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(matrices.dtype)
    return torch.linalg.householder_product(reflectors, scales).mul_(signs[..., None, :])


def _cholesky_twice(matrices: Tensor) -> Tensor:
    bases, _, once_failed = _cholesky_pass(matrices)
    bases, distance, twice_failed = _cholesky_pass(bases)
    is_good = ~once_failed & ~twice_failed & (distance <= NEAR_ENOUGH)  # a distance of NaN is not near
    if not bool(is_good.all()):
        bases[~is_good] = _householder(matrices[~is_good])
    return bases


def _cholesky_pass(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M R^-1 with R' R = M' M; how far M' M was from I (...); True where it has no such R (...)."""
    products = matrices.mT @ matrices
    lower, failures = torch.linalg.cholesky_ex(products)
    one = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    distance = torch.linalg.matrix_norm(products - one)
    return torch.linalg.solve_triangular(lower.mT, matrices, upper=True, left=False), distance, failures != 0
