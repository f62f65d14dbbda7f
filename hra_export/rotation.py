"""A chain taken apart into rotations of planes: the ground of strengths, of fewer reflections, of nearest chains.

An orthogonal R with rank(R − I) = k is I outside a subspace of k dimensions, and there turns p orthogonal planes by
angles θ and mirrors m directions, 2p + m = k. Each plane is two reflections, each mirror one, and no shorter product
of reflections gives R (Cartan, Dieudonné). R^t turns the planes by tθ and stays orthogonal.

The planes come from the real Schur form of R on span(U), in float64: never a (d, d) matrix.

Limits: what turns by less than `SMALLEST_ANGLE` is taken for the identity. Planes that turn by the same angle are not
unique, and neither are the axes of mirrored directions where there are several; R is the same for every choice, R^t is
not when mirrors are paired into half turns.

Source: Golub & Van Loan, Matrix Computations, 7.4 (real Schur form).
"""

import math
from dataclasses import dataclass

import torch
from scipy.linalg import schur
from torch import Tensor

from hra_export.errors import ConversionError
from hra_export.householder import BlockReflector

# float64 leaves R on span(U) uncertain by about 1e-15; vectors in float32 tell two directions apart from 1e-7 on.
SMALLEST_ANGLE = 1e-12


@dataclass(frozen=True)
class Rotation:
    """R = I + B (D − I) Bᵀ, D block diagonal: [[cos θ, −sin θ], [sin θ, cos θ]] for each plane, −1 for each mirror.

    Attributes:
        basis: B (d, 2p + m) orthonormal, float64: columns 2i and 2i + 1 span plane i, the last m are mirrored.
        angles: θ (p,) in radians, float64, any real number; from `decompose` in (0, π), largest first.
    """

    basis: Tensor
    angles: Tensor

    @property
    def features(self) -> int:
        """d."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """k = 2p + m, the number of reflections of the shortest chain."""
        return self.basis.shape[1]

    @property
    def planes(self) -> int:
        """p, how many planes turn."""
        return self.angles.shape[0]

    @property
    def mirrors(self) -> int:
        """m, how many directions are mirrored; det R = (−1)^m."""
        return self.rank - 2 * self.planes

    def core(self) -> Tensor:
        """D − I (k, k), float64."""
        core = torch.diag(self.basis.new_full((self.rank,), -2.0))
        for i, angle in enumerate(self.angles.tolist()):
            # cos θ − 1 as −2 sin²(θ/2): nothing cancels for small angles.
            less, sine = -2 * math.sin(angle / 2) ** 2, math.sin(angle)
            core[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = core.new_tensor([[less, -sine], [sine, less]])
        return core

    def keep(self, planes: list[int], mirrors: list[int]) -> "Rotation":
        """Only these planes and mirrors, by number; the identity everywhere else."""
        columns = [column for i in planes for column in (2 * i, 2 * i + 1)]
        columns += [2 * self.planes + i for i in mirrors]
        return Rotation(self.basis[:, columns], self.angles[planes])


def decompose(reflector: BlockReflector) -> Rotation:
    """Take R apart into planes and mirrors.

    Args:
        reflector: of d features and any rank r, above d too; computed in float64 on the CPU.

    Returns:
        The rotation with the fewest dimensions: pairs of equal vectors and idle directions are gone.
    """
    u, t = reflector.u.to("cpu", torch.float64), reflector.t.to("cpu", torch.float64)
    basis, triangle = torch.linalg.qr(u)  # (d, k), (k, r)
    inside = torch.eye(basis.shape[1], dtype=u.dtype) - triangle @ t @ triangle.T  # R on span(U), orthogonal
    return from_orthogonal(inside, basis)


def from_orthogonal(inside: Tensor, basis: Tensor) -> Rotation:
    """The rotation that is Q on the span of a basis, and the identity elsewhere: I + S (Q − I) Sᵀ.

    Args:
        inside: Q (k, k), orthogonal to rounding, float64.
        basis: S (d, k), orthonormal columns, float64.
    """
    form, vectors = (torch.from_numpy(matrix) for matrix in schur(inside.numpy(), output="real"))
    planes: list[tuple[float, int, int]] = []
    mirrors = []
    i = 0
    while i < form.shape[0]:
        is_plane = i + 1 < form.shape[0] and float(form[i + 1, i]) != 0
        if is_plane:
            sine = float(form[i + 1, i] - form[i, i + 1]) / 2
            angle = math.atan2(abs(sine), float(form[i, i] + form[i + 1, i + 1]) / 2)
            if angle > SMALLEST_ANGLE:
                planes.append((angle, i, i + 1) if sine > 0 else (angle, i + 1, i))
        elif form[i, i] < 0:
            mirrors.append(i)
        i += 2 if is_plane else 1
    planes.sort(key=lambda plane: (-plane[0], plane[1]))
    columns = [column for _, *pair in planes for column in pair] + mirrors
    angles = torch.tensor([angle for angle, *_ in planes], dtype=torch.float64)
    return Rotation(basis @ vectors[:, columns], angles)


def power(rotation: Rotation, strength: float) -> Rotation:
    """R^t: every plane turns by tθ. R⁰ = I, R¹ = R, R⁻¹ = Rᵀ, and R^s R^t = R^(s+t).

    Mirrored directions are paired into half turns in the order they come in, of which there is a choice: see above.

    Args:
        rotation: with an even number of mirrors.
        strength: t, any real number.

    Raises:
        ConversionError: det R = −1, so that R lies on no path of rotations to the identity.
    """
    if rotation.mirrors % 2:
        raise ConversionError(
            "an odd number of reflections has determinant -1: no rotation leads to it, so no part of it can be taken",
            hint="`--interpolation linear` takes that part of ΔW, which is no rotation",
        )
    halves = rotation.angles.new_full((rotation.mirrors // 2,), math.pi)
    return Rotation(rotation.basis, torch.cat([rotation.angles, halves]) * strength)


def shortest_chain(rotation: Rotation) -> Tensor:
    """The reflection vectors of a rotation: R = H_1 H_2 … H_k.

    Two reflections whose vectors stand at an angle φ in a plane turn it by 2φ: here at θ/4 on either side of its first
    direction, so that small angles keep their digits.

    Returns:
        U (d, k), unit columns, float64; (d, 0) for the identity.
    """
    vectors = rotation.basis.clone()
    for i, angle in enumerate(rotation.angles.tolist()):
        first, second = rotation.basis[:, 2 * i], rotation.basis[:, 2 * i + 1]
        vectors[:, 2 * i] = math.cos(angle / 4) * first + math.sin(angle / 4) * second
        vectors[:, 2 * i + 1] = math.cos(angle / 4) * first - math.sin(angle / 4) * second
    return vectors


def padded(vectors: Tensor, rank: int) -> Tensor:
    """A longer chain with the same R: pairs of equal vectors, which cancel exactly, behind it.

    Args:
        vectors: (d, k), k ≥ 1.
        rank: k, or above it by an even number.

    Returns:
        (d, rank), vectors' dtype.

    Raises:
        ConversionError: `rank` is smaller, or above by an odd number, which would turn the determinant's sign.
    """
    missing = rank - vectors.shape[1]
    if missing < 0 or missing % 2:
        raise ConversionError(
            f"a chain of {vectors.shape[1]} reflections cannot be written as one of {rank}: reflections come in pairs"
        )
    return torch.cat([vectors, vectors[:, -1:].expand(-1, missing)], dim=1)
