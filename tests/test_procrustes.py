"""Nearest rotations against brute force, floors against the dense Procrustes problem, in float64."""

import math

import pytest
import torch
from torch import Tensor

from hra_export.householder import compact_wy, dense, fold, low_rank_factors
from hra_export.nearest import procrustes
from hra_export.nearest.procrustes import distance, nearest_rotation, rotation_floor
from hra_export.nearest.weight_change import Change, Dense, Difference, dense_change, low_rank_change, orthonormal
from hra_export.rotation import Rotation, shortest_chain

# A rotation that was folded in is found again: what float64 leaves of ‖ΔW‖² beside ‖W‖², its root.
RECOVERED = 1e-6
# Of one number computed in two ways: ‖ΔW‖² is a small difference of large ones there.
SAME = 1e-6
# The search may end in a local optimum; this much farther off than the best of many random starts is allowed.
NEAR_BEST = 1.03
# What rows of a Krylov space miss of the exact floor in these problems.
BOUND_SHARE = 0.9


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weight_of(o: int, d: int, *, kind: str, seed: int) -> Tensor:
    """A weight whose singular values are all alike, or fall over three decades as those of trained layers do."""
    weight = random(o, d, seed=seed)
    if kind == "flat":
        return weight
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return left * torch.logspace(0, -3, min(o, d), dtype=torch.float64) @ right


def lora_on(weight: Tensor, r: int, *, size: float, seed: int) -> Change:
    """A random ΔW of rank r with ‖ΔW‖ = size ‖W‖."""
    o, d = weight.shape
    left, right = random(o, r, seed=seed), random(r, d, seed=seed + 1)
    scale = size * torch.linalg.matrix_norm(weight) / torch.linalg.matrix_norm(left @ right)
    return low_rank_change(Dense(weight), left * scale, right)


def delta_of(change: Change) -> Tensor:
    return change.delta.times(torch.eye(change.delta.shape[1], dtype=torch.float64))


def explicit_distance(weight: Tensor, delta: Tensor, rotation: Tensor) -> float:
    """‖W R − W'‖ / ‖ΔW‖ with a dense R."""
    return float(torch.linalg.matrix_norm(weight @ rotation - weight - delta) / torch.linalg.matrix_norm(delta))


def chain_product(vectors: Tensor) -> Tensor:
    """H_1 H_2 …, one after another."""
    d = vectors.shape[0]
    product = torch.eye(d, dtype=torch.float64)
    for u in vectors.T:
        product = product - 2 * torch.outer(product @ u, u) / u.square().sum()
    return product


def brute_force(weight: Tensor, delta: Tensor, rank: int, *, starts: int) -> float:
    """The shortest distance over chains: L-BFGS on the vectors themselves, from random places near the identity."""
    best = math.inf
    for seed in range(starts):
        half = random(weight.shape[1], (rank + 1) // 2, seed=1000 + seed)
        pairs = half.repeat_interleave(2, dim=1)[:, :rank] + 0.05 * random(weight.shape[1], rank, seed=2000 + seed)
        vectors = pairs.clone().requires_grad_()
        search = torch.optim.LBFGS([vectors], max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def loss(vectors: Tensor = vectors, search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()
            missed = weight @ chain_product(vectors) - weight - delta
            value = missed.square().sum() / delta.square().sum()
            value.backward()
            return value

        search.step(loss)
        best = min(best, float(loss().detach()) ** 0.5)
    return best


def angled_chain(d: int, angles: list[float], *, mirrors: int = 0, seed: int = 0) -> Tensor:
    """A chain that turns as many planes by these angles, and mirrors directions beside them."""
    basis = torch.linalg.qr(random(d, 2 * len(angles) + mirrors, seed=seed)).Q
    return shortest_chain(Rotation(basis, torch.tensor(angles, dtype=torch.float64)))


@pytest.mark.parametrize(("o", "d"), [(20, 14), (14, 20), (9, 9)])
@pytest.mark.parametrize("size", [0.01, 0.5])
def test_rotation_floor_is_that_of_the_dense_polar_factor(o: int, d: int, size: float) -> None:
    weight = weight_of(o, d, kind="flat", seed=1)
    change = lora_on(weight, 3, size=size, seed=2)
    left, _, right = torch.linalg.svd(weight.T @ (weight + delta_of(change)))
    floor = rotation_floor(change)
    assert floor.is_exact
    assert floor.distance == pytest.approx(explicit_distance(weight, delta_of(change), left @ right), rel=SAME)


@pytest.mark.parametrize("kind", ["flat", "falling"])
@pytest.mark.parametrize(("o", "d"), [(60, 40), (40, 60)])
def test_rotation_floor_is_a_close_lower_bound_beyond_what_is_exact(
    monkeypatch: pytest.MonkeyPatch, kind: str, o: int, d: int
) -> None:
    change = lora_on(weight_of(o, d, kind=kind, seed=3), 2, size=0.05, seed=4)
    exact = rotation_floor(change).distance
    monkeypatch.setattr(procrustes, "LARGEST_EXACT", 8)
    monkeypatch.setattr(procrustes, "MOST_ROWS", 32)
    bound = rotation_floor(change)
    assert not bound.is_exact
    assert BOUND_SHARE * exact < bound.distance <= exact * (1 + SAME)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("kind", ["flat", "falling"])
@pytest.mark.parametrize("size", [0.03, 0.3])
def test_nearest_rotation_is_as_near_as_brute_force(kind: str, size: float, rank: int) -> None:
    weight = weight_of(12, 10, kind=kind, seed=5)
    change = lora_on(weight, 3, size=size, seed=6)
    found = distance(change, compact_wy(shortest_chain(nearest_rotation(change, rank))))
    assert found <= NEAR_BEST * brute_force(weight, delta_of(change), rank, starts=4)


def test_nearest_rotation_of_full_rank_reaches_the_floor() -> None:
    """d reflections are every rotation there is."""
    weight = weight_of(16, 8, kind="flat", seed=7)
    change = lora_on(weight, 3, size=0.1, seed=8)
    found = distance(change, compact_wy(shortest_chain(nearest_rotation(change, 8))))
    assert found == pytest.approx(rotation_floor(change).distance, rel=1e-3)  # a search that stops at the third digit


@pytest.mark.parametrize(("o", "d"), [(40, 24), (10, 24)])
@pytest.mark.parametrize(
    ("angles", "mirrors"),
    [([0.5], 0), ([5e-5], 0), ([2.0, 0.3, 0.3, 0.004], 0), ([math.pi - 1e-3], 0), ([], 1), ([0.4], 1), ([0.4], 2)],
    ids=["plane", "small", "planes", "half turn", "mirror", "odd", "two mirrors"],
)
def test_nearest_rotation_finds_a_chain_that_was_folded_in(angles: list[float], mirrors: int, o: int, d: int) -> None:
    weight, vectors = weight_of(o, d, kind="flat", seed=9), angled_chain(d, angles, mirrors=mirrors, seed=10)
    chain = compact_wy(vectors)
    change = low_rank_change(Dense(weight), *low_rank_factors(weight, chain))
    found = nearest_rotation(change, vectors.shape[1])
    assert explicit_distance(weight, fold(weight, chain) - weight, dense(compact_wy(shortest_chain(found)))) < RECOVERED


def test_nearest_rotation_finds_the_chain_in_a_dense_difference() -> None:
    """A whole model is known by its two weights alone, and the difference is never formed."""
    weight = weight_of(40, 24, kind="falling", seed=11)
    chain = compact_wy(angled_chain(24, [0.4, 0.1], seed=12))
    after = fold(weight, chain)
    delta = Difference(Dense(after), Dense(weight))
    change = dense_change(Dense(weight), delta, float(torch.linalg.matrix_norm(after - weight)), 6)
    assert distance(change, compact_wy(shortest_chain(nearest_rotation(change, 4)))) < RECOVERED


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_nearest_rotation_has_the_determinant_of_a_chain_this_long(rank: int) -> None:
    change = lora_on(weight_of(20, 12, kind="falling", seed=13), 4, size=0.1, seed=14)
    found = nearest_rotation(change, rank)
    assert found.rank <= rank
    assert (rank - found.rank) % 2 == 0
    assert float(torch.linalg.det(dense(compact_wy(shortest_chain(found))))) == pytest.approx((-1) ** rank)


def test_odd_rotation_mirrors_where_the_weight_is_blind() -> None:
    """With fewer rows than features a mirrored direction need cost nothing."""
    weight = weight_of(10, 24, kind="flat", seed=15)
    chain = compact_wy(angled_chain(24, [0.4], seed=16))
    change = low_rank_change(Dense(weight), *low_rank_factors(weight, chain))
    assert distance(change, compact_wy(shortest_chain(nearest_rotation(change, 2)))) < RECOVERED


def test_nearest_rotation_to_a_larger_weight_is_the_identity() -> None:
    """No rotation makes a weight longer."""
    weight = weight_of(20, 12, kind="flat", seed=17)
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    change = low_rank_change(Dense(weight), 0.1 * left * sigma, right)
    assert rotation_floor(change).distance == pytest.approx(1, rel=SAME)
    found = nearest_rotation(change, 4)
    assert not found.rank or distance(change, compact_wy(shortest_chain(found))) == pytest.approx(1, abs=RECOVERED)


def test_nothing_turns_a_weight_of_zeros() -> None:
    """Layers that start at zero, as control networks have them."""
    weight = torch.zeros(20, 12, dtype=torch.float64)
    change = low_rank_change(Dense(weight), random(20, 3, seed=31), random(3, 12, seed=32))
    assert nearest_rotation(change, 4).rank == 0
    assert rotation_floor(change).distance == pytest.approx(1)


def test_more_reflections_come_nearer() -> None:
    change = lora_on(weight_of(40, 24, kind="falling", seed=18), 6, size=0.1, seed=19)
    distances = [distance(change, compact_wy(shortest_chain(nearest_rotation(change, rank)))) for rank in (2, 4, 8, 16)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] >= rotation_floor(change).distance * (1 - SAME)


@pytest.mark.parametrize("rank", [0, 13])
def test_nearest_rotation_refuses_ranks_that_no_chain_has(rank: int) -> None:
    change = lora_on(weight_of(20, 12, kind="flat", seed=20), 2, size=0.1, seed=21)
    with pytest.raises(ValueError, match="rank"):
        nearest_rotation(change, rank)


def test_distance_is_that_of_dense_matrices() -> None:
    weight = weight_of(20, 12, kind="flat", seed=22)
    change = lora_on(weight, 3, size=0.2, seed=23)
    chain = compact_wy(random(12, 5, seed=24))
    expected = explicit_distance(weight, delta_of(change), dense(chain))
    assert distance(change, chain) == pytest.approx(expected, rel=1e-12)  # float64, without cancellation


def test_low_rank_change_knows_its_norm() -> None:
    change = low_rank_change(Dense(random(9, 7, seed=25)), random(9, 3, seed=26), random(3, 7, seed=27))
    assert change.norm == pytest.approx(float(torch.linalg.matrix_norm(delta_of(change))), rel=1e-12)  # float64


def test_orthonormal_leaves_out_what_the_bases_have() -> None:
    basis = torch.linalg.qr(random(8, 3, seed=28)).Q
    fresh = random(8, 1, seed=29)
    found = orthonormal(torch.cat([basis[:, :1] * 1e6, basis @ random(3, 2, seed=30), fresh, 2 * fresh], dim=1), basis)
    assert found.shape == (8, 1)
    together = torch.cat([basis, found], dim=1)
    assert torch.linalg.matrix_norm(together.T @ together - torch.eye(4, dtype=torch.float64)) < 1e-12  # float64
