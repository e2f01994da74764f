"""PowerSGD of all replicas in one process and float64, written from the paper's procedure and not from the class.

Ramesh et al. 2021, appendix E.2, in its own convention: Q is SUMMED over the replicas, so the decompressed gradient
is N times the mean, and each buffer loses it divided by N. Householder reflections are applied one by one.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def householder_basis(matrix: Array) -> Array:
    """Orthonormal columns with matrix = basis @ upper triangle, whose diagonal is positive."""
    rest = matrix.copy()
    n, r = matrix.shape
    basis = np.eye(n)
    for j in range(min(n - 1, r)):
        mirror = np.zeros(n)
        mirror[j:] = rest[j:, j]
        mirror[j] += np.copysign(np.linalg.norm(mirror), mirror[j])
        mirror /= np.linalg.norm(mirror)
        rest -= 2 * np.outer(mirror, mirror @ rest)
        basis -= 2 * np.outer(basis @ mirror, mirror)
    return basis[:, :r] * np.where(np.diag(rest)[:r] < 0, -1.0, 1.0)


def raised(matrix: Array) -> Array:
    """Scaled to a largest number of 1, then 1e-6 on the diagonal."""
    return matrix / np.abs(matrix).max() + 1e-6 * np.eye(*matrix.shape)


class SimulatedMatrix:
    """One matrix on all replicas."""

    def __init__(self, start: Array, shape: tuple[int, int], n_replicas: int) -> None:
        """start: (longer side, rank)."""
        self.start, self.is_tall = start, shape[0] > shape[1]
        self.errors = [np.zeros(sorted(shape)) for _ in range(n_replicas)]

    def update(self, gradients: list[Array], warm: bool = False) -> tuple[Array, float]:
        """The mean gradient that the update uses, and its squared norm as computed from Q alone."""
        n_replicas = len(gradients)
        for error, gradient in zip(self.errors, gradients, strict=True):
            error += gradient.T if self.is_tall else gradient
        p = sum((error @ self.start for error in self.errors), np.zeros(())) / n_replicas
        p = householder_basis(raised(p))
        q = sum((error.T @ p for error in self.errors), np.zeros(()))
        decompressed = p @ q.T
        for error in self.errors:
            error -= decompressed / n_replicas
        if warm:
            self.start = householder_basis(raised(q))
        mean = decompressed / n_replicas
        return (mean.T if self.is_tall else mean), float(np.sum(q * q)) / n_replicas**2

    def error(self, replica: int) -> Array:
        """The buffer as the gradient lies."""
        return self.errors[replica].T if self.is_tall else self.errors[replica]
