"""A weight and what was added to it, as what both do to thin matrices: no (d, d) matrix, and no weight held twice.

Nearest rotations need W S, Wᵀ L, ΔW S and ΔWᵀ L for matrices of a few columns, and the directions in which ΔW is
largest. A low-rank ΔW has these in its factors; of a dense one they are found by a few passes over it.

Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1 (randomized range, SVD of it).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hra_export.householder import balanced

# Directions beyond those asked for, and passes that sharpen them: what the source advises for slowly falling spectra.
OVERSAMPLING = 8
POWER_PASSES = 2
# What a block of columns adds to a span is dropped below this share of its largest direction: rounding noise.
SPAN_TOLERANCE = 1e-10


class Matrix(Protocol):
    """An (o, d) matrix by its products, float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d)."""
        ...

    def times(self, right: Tensor) -> Tensor:
        """M right (o, k) of a (d, k) matrix."""
        ...

    def transposed_times(self, left: Tensor) -> Tensor:
        """Mᵀ left (d, k) of an (o, k) matrix."""
        ...


@dataclass(frozen=True)
class Dense:
    """A matrix that is held, (o, d), float64."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def times(self, right: Tensor) -> Tensor:
        """M right (o, k)."""
        return self.matrix @ right

    def transposed_times(self, left: Tensor) -> Tensor:
        """Mᵀ left (d, k)."""
        return self.matrix.T @ left


@dataclass(frozen=True)
class LowRank:
    """B A of left B (o, r) and right A (r, d), float64."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d)."""
        return self.left.shape[0], self.right.shape[1]

    def times(self, right: Tensor) -> Tensor:
        """B (A right), (o, k)."""
        return self.left @ (self.right @ right)

    def transposed_times(self, left: Tensor) -> Tensor:
        """Aᵀ (Bᵀ left), (d, k)."""
        return self.right.T @ (self.left.T @ left)


@dataclass(frozen=True)
class Difference:
    """One matrix less another of the same shape."""

    after: Matrix
    before: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d)."""
        return self.after.shape

    def times(self, right: Tensor) -> Tensor:
        """(M − N) right, (o, k)."""
        return self.after.times(right) - self.before.times(right)

    def transposed_times(self, left: Tensor) -> Tensor:
        """(M − N)ᵀ left, (d, k)."""
        return self.after.transposed_times(left) - self.before.transposed_times(left)


@dataclass(frozen=True)
class Change:
    """A weight W and the ΔW that was added to it.

    Attributes:
        leading: the largest directions of ΔW, as balanced factors; all of them where it has low rank.
        norm: ‖ΔW‖_F.
    """

    weight: Matrix
    delta: Matrix
    leading: LowRank
    norm: float


def low_rank_change(weight: Matrix, left: Tensor, right: Tensor) -> Change:
    """The change by a LoRA: ΔW = B A.

    Args:
        weight: W (o, d).
        left: B (o, r), float64.
        right: A (r, d), float64.
    """
    delta = LowRank(*balanced(left, right))
    # Balanced columns of the left factor are orthogonal, and those of the right one too: σ_i is the product of norms.
    sigma = torch.linalg.vector_norm(delta.left, dim=0) * torch.linalg.vector_norm(delta.right, dim=1)
    return Change(weight, delta, delta, float(torch.linalg.vector_norm(sigma)))


def dense_change(weight: Matrix, delta: Matrix, norm: float, directions: int, *, seed: int = 0) -> Change:
    """The change by anything: its largest directions are found by random projections.

    Args:
        weight: W (o, d).
        delta: ΔW (o, d).
        norm: ‖ΔW‖_F, which products alone do not tell.
        directions: how many to find.
        seed: of the random matrix; equal seeds, equal results.
    """
    count = min(directions + OVERSAMPLING, *delta.shape)
    noise = torch.Generator().manual_seed(seed)
    columns = torch.randn(delta.shape[1], count, dtype=torch.float64, generator=noise)
    basis = torch.linalg.qr(delta.times(columns)).Q  # (o, count)
    for _ in range(POWER_PASSES):
        columns = torch.linalg.qr(delta.transposed_times(basis)).Q
        basis = torch.linalg.qr(delta.times(columns)).Q
    left, right = balanced(basis, delta.transposed_times(basis).T)
    return Change(weight, delta, LowRank(left[:, :directions], right[:directions]), norm)


def orthonormal(columns: Tensor, *bases: Tensor) -> Tensor:
    """An orthonormal basis of what a block of columns adds to orthonormal bases.

    Args:
        columns: (d, k), float64, of any size.
        bases: (d, k_i) each, orthonormal together.

    Returns:
        (d, m), m ≤ k: what lies in the bases already, to `SPAN_TOLERANCE` of the largest column, is gone.
    """
    norms = torch.linalg.vector_norm(columns, dim=0)
    kept = norms > SPAN_TOLERANCE * norms.max() if norms.numel() else norms.bool()
    block = columns[:, kept] / norms[kept]
    for _ in range(2):  # twice is enough (Parlett): the second pass removes what rounding left in the first
        for basis in bases:
            block = block - basis @ (basis.T @ block)
    room = columns.shape[0] - sum(basis.shape[1] for basis in bases)
    left, sigma, _ = torch.linalg.svd(block, full_matrices=False)
    return left[:, sigma > SPAN_TOLERANCE][:, : max(room, 0)]
