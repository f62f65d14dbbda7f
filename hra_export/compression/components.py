"""The parts of a rotation, and what leaving each of them out costs: exactly, and before anything is written.

On span(B), R is a direct sum of components: p turned planes, two reflections each, and m mirrored directions, one
each. Without a set S of them R becomes R', and R − R' = B (Σ_{i∈S} M_i) Bᵀ with M_i = D_i − I: no other component
changes. A measure says how much an error E on span(B) counts, ‖L E Nᵀ‖_F²:

    L = I, N = I            the rotation itself, ‖R − R'‖_F
    LᵀL = BᵀWᵀWB, N = I     the weights, ‖ΔW − ΔW'‖_F
    and NᵀN = Bᵀ E[xxᵀ] B   the outputs for inputs x, E‖(ΔW − ΔW') x‖²

Each is a quadratic form in the indicator of S, with a row for each component. It is diagonal for the first two, since
M_i M_jᵀ = 0 for i ≠ j; for outputs, components interact.

Limits: planes that turn by the same angle are not unique, and are taken as `rotation.decompose` gives them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_export.householder import solve_t
from hra_export.rotation import Rotation, shortest_chain


@dataclass(frozen=True)
class Measure:
    """How much an error E (k, k) on the span of a basis counts: ‖L E Nᵀ‖_F².

    Attributes:
        outputs: L (n, k) float64; None for I.
        inputs: N (n, k) float64; None for I.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None

    def image(self, error: Tensor) -> Tensor:
        """L E Nᵀ of errors (…, k, k)."""
        left = error if self.outputs is None else self.outputs @ error
        return left if self.inputs is None else left @ self.inputs.T

    def squared(self, error: Tensor) -> float:
        """‖L E Nᵀ‖_F²."""
        return float(self.image(error).square().sum())

    def turned(self, axes: Tensor) -> "Measure":
        """The same measure for the basis B A, A (k, k) orthogonal."""
        outputs, inputs = (None if root is None else root @ axes for root in (self.outputs, self.inputs))
        return Measure(outputs, inputs)


@dataclass(frozen=True)
class Deviation:
    """An error beside what it is an error of, both as squared norms, so that deviations add up."""

    squared_error: float = 0.0
    squared_whole: float = 0.0

    def __add__(self, other: "Deviation") -> "Deviation":
        return Deviation(self.squared_error + other.squared_error, self.squared_whole + other.squared_whole)

    @property
    def relative(self) -> float:
        """0 is no error, 1 that nothing is left."""
        return math.sqrt(max(self.squared_error, 0.0) / self.squared_whole) if self.squared_whole > 0 else 0.0


@dataclass(frozen=True)
class Components:
    """The components of one rotation, planes first, under one measure.

    Attributes:
        rotation: R.
        measure: on its basis.
        form: F (c, c), the error of leaving out S is 1_Sᵀ F 1_S; float64.
    """

    rotation: Rotation
    measure: Measure
    form: Tensor

    @property
    def planes(self) -> range:
        """The numbers of the planes."""
        return range(self.rotation.planes)

    @property
    def mirrors(self) -> range:
        """The numbers of the mirrored directions, behind the planes."""
        return range(self.rotation.planes, self.rotation.planes + self.rotation.mirrors)

    def error(self, kept: Sequence[int]) -> float:
        """The squared error of keeping these alone, by the form."""
        left_out = self.form.new_ones(len(self.form))
        left_out[list(kept)] = 0
        return float(left_out @ self.form @ left_out)

    def chain(self, kept: Sequence[int]) -> Tensor:
        """The reflection vectors (k, r') of the kept components, in coordinates of the basis."""
        inside = Rotation(torch.eye(self.rotation.rank, dtype=self.form.dtype), self.rotation.angles)
        first = self.mirrors.start
        return shortest_chain(inside.keep([i for i in kept if i < first], [i - first for i in kept if i >= first]))

    def deviation(self, chain: Tensor) -> Deviation:
        """How far the chain's R' is from R, under the measure."""
        return Deviation(self.measure.squared(self.change(chain)), self.measure.squared(self.rotation.core()))

    def change(self, chain: Tensor) -> Tensor:
        """R' − R (k, k) on the basis, R' the product of the chain's reflections (k, r'), r' = 0 for the identity."""
        core = self.rotation.core()
        return -core if chain.shape[1] == 0 else -core - chain @ solve_t(chain) @ chain.T


def mirror_axes(rotation: Rotation, measure: Measure) -> Tensor:
    """Axes A (k, k) for which `turned` lays the mirrored directions along those of the measure.

    Mirrored directions can be mixed at will without changing R. Along these axes some count as little as any choice
    allows: the best low rank of a mirrored subspace, for weights; for outputs nearly so.
    """
    axes = torch.eye(rotation.rank, dtype=rotation.basis.dtype)
    first = 2 * rotation.planes
    if rotation.mirrors < 2 or measure.outputs is None:
        return axes
    gram = measure.outputs[:, first:].T @ measure.outputs[:, first:]
    if measure.inputs is not None:
        seen = measure.inputs[:, first:].T @ measure.inputs[:, first:]
        gram = (gram @ seen + seen @ gram) / 2
    axes[first:, first:] = torch.linalg.eigh(gram).eigenvectors
    return axes


def components(rotation: Rotation, measure: Measure) -> Components:
    """Take a rotation's components under a measure."""
    core = rotation.core()
    pieces = []
    for columns in _columns(rotation):
        piece = torch.zeros_like(core)
        piece[columns, columns] = core[columns, columns]
        pieces.append(piece)
    if not pieces:
        return Components(rotation, measure, core.new_zeros(0, 0))
    images = measure.image(torch.stack(pieces)).flatten(1)  # (c, n·n)
    return Components(rotation, measure, images @ images.T)


def _columns(rotation: Rotation) -> list[slice]:
    """The columns of the basis that each component takes."""
    planes = [slice(2 * i, 2 * i + 2) for i in range(rotation.planes)]
    return planes + [slice(i, i + 1) for i in range(2 * rotation.planes, rotation.rank)]
