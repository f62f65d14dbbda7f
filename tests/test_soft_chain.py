"""Softened reflections: the compact form against the dense product, and the edges where they vanish or turn hard."""

import pytest
import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import digest_of
from hra_export.errors import NumericalError
from hra_export.official.soft_chain import SoftSource, soft_wy, softness
from tests.official_layouts import dense_chain

FEATURES = 12
# Both sides are float64; the condition of T⁻¹ is below a hundred here.
ATOL = 1e-12


def vectors(rank: int, scale: float, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(FEATURES, rank, generator=generator, dtype=torch.float64)


def dense(u: Tensor, epsilon: float, *, orthogonalize: bool = False) -> Tensor:
    return householder.dense(soft_wy(u, epsilon, orthogonalize=orthogonalize))


@pytest.mark.parametrize("rank", [1, 2, 7, FEATURES])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 1.0])
def test_soft_wy_is_the_explicit_product(rank: int, scale: float, epsilon: float) -> None:
    u = vectors(rank, scale)
    assert torch.allclose(dense(u, epsilon), dense_chain(u, epsilon=epsilon), rtol=0, atol=ATOL)


def test_soft_wy_orthogonalizes_without_epsilon() -> None:
    u = vectors(4, 0.01)
    assert torch.allclose(dense(u, 1.0, orthogonalize=True), dense_chain(u, gram_schmidt=True), rtol=0, atol=ATOL)


def test_soft_wy_of_repeated_and_near_parallel_vectors() -> None:
    u = vectors(2, 0.02).repeat_interleave(2, dim=1)
    u[:, 1] += 1e-9
    assert torch.allclose(dense(u, 1e-4), dense_chain(u, epsilon=1e-4), rtol=0, atol=ATOL)


def test_soft_wy_takes_zero_vectors_for_the_identity() -> None:
    assert torch.equal(dense(torch.zeros(FEATURES, 2), 1e-4), torch.eye(FEATURES, dtype=torch.float64))


def test_soft_wy_is_near_the_identity_for_small_vectors_and_a_reflection_for_large_ones() -> None:
    identity = torch.eye(FEATURES, dtype=torch.float64)
    assert (dense(vectors(1, 1e-6), 1e-4) - identity).norm() < 1e-6
    large = dense(vectors(1, 1e6), 1e-4)
    assert torch.allclose(large @ large.T, identity, rtol=0, atol=ATOL)


UNUSABLE = {
    "not finite": (torch.full((FEATURES, 1), torch.nan), 1e-4),
    "zero and hard": (torch.zeros(FEATURES, 1), 0.0),
}


@pytest.mark.parametrize(("u", "epsilon"), UNUSABLE.values(), ids=UNUSABLE)
def test_reflector_names_the_target_of_an_unusable_vector(u: Tensor, epsilon: float) -> None:
    with pytest.raises(NumericalError, match=r"target `layer\.0`"):
        SoftSource({"layer.0": u}, "output", epsilon).reflector("layer.0")


@pytest.mark.parametrize("epsilon", [-1e-4, float("nan"), float("inf")])
def test_soft_wy_refuses_an_epsilon_that_means_nothing(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        soft_wy(vectors(2, 1.0), epsilon)


def test_soft_wy_refuses_more_vectors_than_features() -> None:
    with pytest.raises(ValueError, match="1 <= r <= n"):
        soft_wy(torch.ones(2, 3), 1e-4)


def test_softness_is_that_of_the_softest_vector() -> None:
    u = torch.tensor([[3.0, 0.01], [4.0, 0.0]])
    assert softness(u, 1e-4) == pytest.approx(0.5)
    assert softness(u, 0.0) == 0.0


def test_rank_counts_what_changes_and_not_what_is_stored() -> None:
    u = vectors(4, 0.02)
    u[:, 2:] = 0
    equal = vectors(1, 1e3).repeat(1, 2)
    source = SoftSource({"half": u, "whole": vectors(4, 0.02), "idle": torch.zeros(FEATURES, 2)}, "output", 1e-4)
    assert [source.rank(module) for module in source.modules] == [2, 4, 0]
    assert SoftSource({"pair": equal}, "input", 0.0).rank("pair") == 0
    assert SoftSource({"whole": u}, "output", 1e-4, strength=0.0).rank("whole") == 0


def test_digest_tells_settings_and_values_apart() -> None:
    u = vectors(2, 1.0)
    sources = [
        SoftSource({"a": u}, "output", 1e-4),
        SoftSource({"a": u}, "input", 1e-4),
        SoftSource({"a": u}, "output", 1e-3),
        SoftSource({"a": u}, "output", 1e-4, strength=0.5),
        SoftSource({"a": u}, "output", 1e-4, orthogonalize=True),
        SoftSource({"b": u}, "output", 1e-4),
        SoftSource({"a": u + 1e-9}, "output", 1e-4),
        SoftSource({"a": u}, "output", 1e-4, parameters={"b": u}),
    ]
    assert len({source.digest for source in sources}) == len(sources)
    assert digest_of({"a": u.T.contiguous().T}, []) == digest_of({"a": u}, [])
