"""Orthonormal columns stay orthonormal when the matrix is nearly rank deficient, and are the same bits every time."""

import pytest
import torch
from torch import Tensor

from kernels.low_rank import Method, orthogonalise, orthogonalise_each

METHODS: tuple[Method, ...] = ("householder", "cholesky")
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def matrix(n: int, r: int, condition: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, r) whose singular values fall from 1 to 1 / condition, evenly in their logarithms."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(k, r, generator=generator, dtype=torch.float64))[0] for k in (n, r))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
    return ((left * values) @ right.mT).to(dtype)


def lost_orthogonality(bases: Tensor) -> float:
    """Largest entry of |Q' Q - I| over all matrices, computed in float64."""
    wide = bases.double()
    return float((wide.mT @ wide - torch.eye(bases.shape[-1], dtype=torch.float64)).abs().max())


def gram_schmidt(columns: Tensor, modified: bool) -> Tensor:
    """What this project does not do: classical or modified Gram-Schmidt, one column after another."""
    q = columns.clone()
    for j in range(q.shape[1]):
        if modified:
            for i in range(j):
                q[:, j] -= (q[:, i] @ q[:, j]) * q[:, i]
        else:
            q[:, j] -= q[:, :j] @ (q[:, :j].T @ q[:, j])
        q[:, j] /= q[:, j].norm()
    return q


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (5, 5), (33, 8), (300, 40)], ids=str)
def test_columns_are_orthonormal_and_span_what_they_spanned(
    shape: tuple[int, int], method: Method, dtype: torch.dtype
) -> None:
    """A sum of n products errs by about sqrt(n) roundings; 10 times that is for r columns, one after another."""
    n, r = shape
    plain = torch.stack([matrix(n, r, 30.0, seed, dtype) for seed in range(3)])
    bases = orthogonalise(plain, 0.0, method)
    allowed = 10 * max(n, 10) ** 0.5 * ROUNDING[dtype]
    assert bases.shape == plain.shape and bases.dtype == dtype
    assert lost_orthogonality(bases) < allowed
    wide = bases.double()
    outside = plain.double() - wide @ (wide.mT @ plain.double())
    assert float(outside.norm()) < allowed * float(plain.double().norm())


@pytest.mark.parametrize("method", METHODS)
def test_the_signs_are_those_of_a_positive_diagonal_of_r(method: Method) -> None:
    plain = matrix(60, 12, 10.0, dtype=torch.float64)
    r = orthogonalise(plain, 0.0, method).mT @ plain
    assert torch.all(r.diagonal() > 0)
    assert float(r.tril(-1).abs().max()) < 1e-14
    known = orthogonalise(torch.tensor([[-3.0, 0.0], [0.0, -2.0], [4.0, 0.0]]), 0.0, method)
    assert torch.allclose(known, torch.tensor([[-0.6, 0.0], [0.0, -1.0], [0.8, 0.0]]), atol=1e-7)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
def test_ill_conditioned_columns_come_out_orthonormal_where_gram_schmidt_loses_them(condition: float) -> None:
    """Measured on these matrices, condition 1e2, 1e4, 1e6, 1e9:

    Householder            4e-7, 5e-7, 3e-7, 4e-7
    CholeskyQR2, guarded   4e-7, 5e-7, 3e-7, 4e-7 (from 1e4 on it falls back)
    modified Gram-Schmidt  6e-6, 4e-4, 4e-2, 0.6
    classical              9e-5, 0.8, 1, 1
    """
    plain = matrix(496, 48, condition)
    for method in METHODS:
        assert lost_orthogonality(orthogonalise(plain, 0.0, method)) < 2e-6
    lost = lost_orthogonality(gram_schmidt(plain, modified=True))
    assert lost > min(condition * ROUNDING[torch.float32] / 10, 0.5)  # grows with the condition number, up to 1
    assert lost_orthogonality(gram_schmidt(plain, modified=False)) > lost


def test_a_factorisation_that_succeeds_by_luck_is_not_trusted() -> None:
    """At condition 1e6 rounding lets 13 of these products pass as positive; unguarded, 2e-3 is lost."""
    unlucky = torch.stack([matrix(30, 3, 1e6, seed) for seed in range(30)])
    assert lost_orthogonality(orthogonalise(unlucky, 0.0, "cholesky")) < 2e-6


def test_each_matrix_falls_back_alone() -> None:
    good, bad = matrix(80, 16, 5.0, seed=1), matrix(80, 16, 1e8, seed=2)
    mixed = orthogonalise(torch.stack([good, bad, good]), 0.0, "cholesky")
    assert torch.equal(mixed[1], orthogonalise(bad[None], 0.0, "householder")[0])
    assert torch.equal(mixed[0], orthogonalise(torch.stack([good] * 3), 0.0, "cholesky")[0])
    assert not torch.equal(mixed[0], orthogonalise(good, 0.0, "householder"))


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_repeated_columns_have_a_basis(method: Method) -> None:
    zeros, ones = torch.zeros(20, 6), torch.ones(20, 6)
    bases = orthogonalise(torch.stack([zeros, ones]), method=method)
    assert lost_orthogonality(bases) < 1e-6
    assert torch.equal(bases[0], torch.eye(20, 6))
    assert float((bases[1] @ (bases[1].mT @ ones) - ones).norm() / ones.norm()) < 1e-5  # epsilon tilts by 1e-6


def test_epsilon_stands_on_the_diagonal_alone() -> None:
    plain = matrix(9, 4)
    raised = plain.clone()
    for i in range(4):
        raised[i, i] += 0.25
    assert torch.equal(orthogonalise(plain, 0.25), orthogonalise(raised, 0.0))
    assert torch.equal(plain, matrix(9, 4)), "the argument was changed"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_matrices_give_the_same_bits(method: Method) -> None:
    shapes = [(40, 8), (16, 16), (40, 8), (64, 3), (16, 16)]
    matrices = [matrix(*shape, 100.0, seed) for seed, shape in enumerate(shapes)]
    once, again = (orthogonalise_each([m.clone() for m in matrices], method=method) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    alone = [orthogonalise(m, method=method) for m in matrices]
    assert [a.shape for a in once] == [m.shape for m in matrices]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(once, alone, strict=True))


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="8 columns of 5 numbers"):
        orthogonalise(torch.zeros(5, 8))
