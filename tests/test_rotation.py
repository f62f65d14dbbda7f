"""Planes, powers and shortest chains against the explicit product of reflections in float64."""

import math

import pytest
import torch
from torch import Tensor

from hra_export.errors import ConversionError
from hra_export.householder import BlockReflector, compact_wy, compose, dense
from hra_export.rotation import Rotation, decompose, from_orthogonal, padded, power, shortest_chain

# A few roundings of products of norm 1, a few hundred of them; measured: 2e-15.
ATOL64 = 1e-13


def gaussian(d: int, r: int, *, seed: int = 0) -> Tensor:
    return torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(d: int, r: int, angle: float, *, seed: int = 0) -> Tensor:
    """Vectors in pairs that enclose an angle, all pairs at right angles: each turns its plane by twice the angle."""
    basis = torch.linalg.qr(gaussian(d, r, seed=seed)).Q
    first, second = basis[:, ::2], basis[:, 1::2]
    turned = math.cos(angle) * first + math.sin(angle) * second
    return torch.stack([first, turned], dim=2).reshape(d, r)


def explicit(vectors: Tensor) -> Tensor:
    product = torch.eye(vectors.shape[0], dtype=torch.float64)
    for u in vectors.T:
        product = product @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    return product


def matrix(rotation: Rotation) -> Tensor:
    """R by its definition, from planes and mirrors."""
    return torch.eye(rotation.features) + rotation.basis @ rotation.core() @ rotation.basis.T


def close(got: Tensor, expected: Tensor, atol: float = ATOL64) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("d", "r"), [(12, 1), (12, 2), (12, 5), (40, 8), (6, 6), (8, 7), (96, 32)])
def test_a_chain_is_its_planes_and_mirrors_and_the_chain_made_of_them(d: int, r: int) -> None:
    vectors = gaussian(d, r)
    rotation = decompose(compact_wy(vectors))
    assert (rotation.rank, rotation.mirrors % 2) == (r, r % 2)
    close(matrix(rotation), explicit(vectors))
    close(explicit(shortest_chain(rotation)), explicit(vectors))
    close(rotation.basis.T @ rotation.basis, torch.eye(r, dtype=torch.float64))


def test_angles_are_twice_those_between_the_vectors_largest_first() -> None:
    vectors = torch.cat([pairs(64, 8, 0.05)[:, :2], pairs(64, 8, 0.3)[:, 2:4]], dim=1)
    close(decompose(compact_wy(vectors)).angles, torch.tensor([0.6, 0.1], dtype=torch.float64))


def test_pairs_of_equal_vectors_vanish() -> None:
    idle = gaussian(32, 3, seed=1).repeat_interleave(2, dim=1)
    assert decompose(compact_wy(idle)).rank == 0
    busy = gaussian(32, 4)
    rotation = decompose(compact_wy(torch.cat([idle, busy], dim=1)))
    assert rotation.rank == 4
    close(explicit(shortest_chain(rotation)), explicit(busy))


def test_more_reflections_than_dimensions_come_down_to_the_dimensions() -> None:
    first, second = gaussian(6, 5), gaussian(6, 5, seed=1)
    product = compose(compact_wy(first), compact_wy(second))
    rotation = decompose(product)
    assert rotation.rank <= 6
    close(explicit(shortest_chain(rotation)), explicit(first) @ explicit(second))


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005, 1e-5])
def test_small_angles_keep_their_digits(angle: float) -> None:
    vectors = pairs(64, 8, angle)
    change = explicit(vectors) - torch.eye(64)
    again = explicit(shortest_chain(decompose(compact_wy(vectors)))) - torch.eye(64)
    # float64 holds R to 1e-15, so its difference from I to that over the angle of 2 · angle.
    assert (again - change).norm() / change.norm() < 64 * 2.0**-52 / angle


def test_gram_schmidt_chains_are_mirrors() -> None:
    block = compact_wy(gaussian(16, 4), orthogonalize=True)
    rotation = decompose(block)
    assert (rotation.planes, rotation.mirrors) == (0, 4)
    close(matrix(rotation), dense(block))


@pytest.mark.parametrize("t", [0.5, -0.25, 2.0, 0.0])
def test_powers_add_up(t: float) -> None:
    rotation = decompose(compact_wy(gaussian(20, 6)))
    rest = power(rotation, 1 - t)
    close(explicit(shortest_chain(power(rotation, t))) @ explicit(shortest_chain(rest)), matrix(rotation))


def test_a_power_is_orthogonal_and_ends_at_the_identity_and_the_inverse() -> None:
    vectors = gaussian(20, 6)
    rotation = decompose(compact_wy(vectors))
    half = dense(compact_wy(shortest_chain(power(rotation, 0.5))))
    close(half @ half.T, torch.eye(20, dtype=torch.float64))
    close(half @ half, explicit(vectors))
    assert torch.equal(shortest_chain(power(rotation, 0))[:, ::2], shortest_chain(power(rotation, 0))[:, 1::2])
    close(explicit(shortest_chain(power(rotation, -1))), explicit(vectors).T)


def test_powers_of_mirrors_are_turns_of_planes_made_of_two() -> None:
    block = compact_wy(gaussian(16, 4), orthogonalize=True)
    third = dense(compact_wy(shortest_chain(power(decompose(block), 1 / 3))))
    close(third @ third @ third, dense(block))


def test_odd_chains_have_no_powers() -> None:
    with pytest.raises(ConversionError, match="determinant -1") as caught:
        power(decompose(compact_wy(gaussian(12, 3))), 0.5)
    assert caught.value.exit_code == 4


def test_keeping_some_planes_leaves_the_rest_alone() -> None:
    rotation = decompose(compact_wy(gaussian(20, 7)))
    kept = rotation.keep([0, 2], [0])
    assert (kept.planes, kept.mirrors, kept.rank) == (2, 1, 5)
    dropped = rotation.basis[:, 2:4]
    close(matrix(kept) @ dropped, dropped)
    close(matrix(kept) @ rotation.basis[:, :2], matrix(rotation) @ rotation.basis[:, :2])


def test_an_orthogonal_matrix_on_a_subspace_is_the_identity_elsewhere() -> None:
    space = torch.linalg.qr(gaussian(12, 5)).Q
    inside = torch.linalg.qr(gaussian(5, 5, seed=1)).Q
    whole = torch.eye(12, dtype=torch.float64) + space @ (inside - torch.eye(5)) @ space.T
    close(matrix(from_orthogonal(inside, space)), whole)


def test_padding_changes_nothing_and_comes_in_pairs() -> None:
    vectors = gaussian(12, 3)
    longer = padded(vectors, 7)
    assert longer.shape == (12, 7)
    close(dense(compact_wy(longer)), explicit(vectors))
    for rank in (2, 4):
        with pytest.raises(ConversionError, match="in pairs"):
            padded(vectors, rank)


def test_the_identity_has_no_chain() -> None:
    nothing = decompose(BlockReflector(gaussian(6, 2), torch.zeros(2, 2, dtype=torch.float64)))
    assert shortest_chain(nothing).shape == (6, 0)
