"""The algebra of chains against the explicit product H_1 H_2 … H_r in float64."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hra_export.errors import NumericalError
from hra_export.householder import (
    GRAM_SCHMIDT_MIN_PIVOT,
    BlockReflector,
    apply,
    balanced,
    compact_wy,
    compose,
    dense,
    fold,
    gram_schmidt,
    inverse,
    low_rank_factors,
    orthogonality_error,
    rotate_rows,
    unit_columns,
)

EPS64, EPS32 = 2.0**-52, 2.0**-23
# The reference multiplies r reflections, each rounding a product of norm 1 a few times; the substitution for T adds its
# own, at most cond(T) <= 7e3 for equal columns (r = 64). Entrywise, 64 · 7e3 · 2^-52 = 1e-10; measured: 3e-13.
ATOL64 = 1e-11
# The same in float32, for columns in general position (cond(T) < 10): 8 reflections of a few roundings each.
ATOL32 = 64 * EPS32
# |T_ij| <= 4 exactly; the margin is that of ATOL64.
T_BOUND = 4 + ATOL64
RANKS = [1, 2, 7, 8, 32, 64]
FEATURES = 80

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def gaussian(d: int, r: int, *, seed: int = 0) -> Tensor:
    return torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(d: int, r: int, angle: float, *, seed: int = 0) -> Tensor:
    """Columns in pairs that enclose `angle`, as PEFT's paired start leaves them after some training."""
    base = unit_columns(gaussian(d, (r + 1) // 2, seed=seed))
    other = gaussian(d, (r + 1) // 2, seed=seed + 1)
    other = unit_columns(other - base * (base * other).sum(dim=0))
    turned = math.cos(angle) * base + math.sin(angle) * other
    return torch.stack([base, turned], dim=2).reshape(d, -1)[:, :r]


def all_equal(d: int, r: int) -> Tensor:
    return gaussian(d, 1).expand(d, r).clone()


CHAINS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "repeated-pairs": lambda d, r: pairs(d, r, 0.0),
    "all-equal": all_equal,
    "opposite": lambda d, r: all_equal(d, r) * (-1.0) ** torch.arange(r),
    **{f"pairs-{angle:.0e}": partial(pairs, angle=angle) for angle in (1e-1, 1e-3, 1e-5, 1e-8)},
}


def explicit(vectors: Tensor) -> Tensor:
    """H_1 H_2 … H_r by definition: one dense reflection after the other, the next from the right."""
    d = vectors.shape[0]
    product = torch.eye(d, dtype=torch.float64)
    for column in vectors.double().T:
        unit = column / column.abs().max()
        unit = unit / unit.norm()
        product = product @ (torch.eye(d, dtype=torch.float64) - 2 * torch.outer(unit, unit))
    return product


def explicit_gram_schmidt(vectors: Tensor) -> Tensor:
    """I − 2 Q Qᵀ with Q from Gram-Schmidt, twice for accuracy."""
    columns: list[Tensor] = []
    for column in vectors.double().T:
        for _ in range(2):
            for done in columns:
                column = column - (done @ column) * done
            column = column / column.norm()
        columns.append(column)
    q = torch.stack(columns, dim=1)
    return torch.eye(q.shape[0], dtype=torch.float64) - 2 * q @ q.T


def close(got: Tensor, expected: Tensor, atol: float = ATOL64) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kind", CHAINS)
def test_compact_wy_is_the_explicit_product(kind: str, r: int) -> None:
    vectors = CHAINS[kind](FEATURES, r)
    reflector = compact_wy(vectors)
    close(dense(reflector), explicit(vectors))
    assert (reflector.features, reflector.rank) == (FEATURES, r)
    assert float(reflector.t.abs().max()) <= T_BOUND
    assert torch.equal(reflector.t, reflector.t.triu())


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kind", CHAINS)
def test_orthogonality_error_is_the_norm_of_the_dense_defect_and_rounding_only(kind: str, r: int) -> None:
    reflector = compact_wy(CHAINS[kind](FEATURES, r))
    assert orthogonality_error(reflector) < ATOL64
    damaged = BlockReflector(reflector.u, reflector.t + 0.01)
    product = dense(damaged)
    defect = float(torch.linalg.matrix_norm(product.T @ product - torch.eye(FEATURES, dtype=torch.float64)))
    assert orthogonality_error(damaged) == pytest.approx(defect, rel=1e-9)


@pytest.mark.parametrize("r", [2, 8, 64])
def test_repeated_pairs_are_the_identity(r: int) -> None:
    """PEFT's start: an untrained adapter must change nothing."""
    close(dense(compact_wy(CHAINS["repeated-pairs"](FEATURES, r))), torch.eye(FEATURES, dtype=torch.float64))


@pytest.mark.parametrize("r", [1, 2, 7, 8])
def test_determinant_is_minus_one_to_the_rank(r: int) -> None:
    determinant = float(torch.linalg.det(dense(compact_wy(gaussian(12, r)))))
    assert determinant == pytest.approx((-1.0) ** r, abs=ATOL64)


def test_as_many_reflections_as_features() -> None:
    vectors = gaussian(6, 6)
    close(dense(compact_wy(vectors)), explicit(vectors))


@pytest.mark.parametrize("exponent", [-300, -160, -30, 0, 30, 160, 300])
@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
def test_norms_do_not_matter_in_float64(exponent: int, orthogonalize: bool) -> None:
    """Squares of 1e-160 and 1e160 leave float64's range."""
    vectors = gaussian(20, 4)
    scales = torch.tensor([1.0, -(10.0**exponent), 10.0 ** (exponent / 2), 10.0**exponent], dtype=torch.float64)
    expected = dense(compact_wy(vectors, orthogonalize=orthogonalize))
    close(dense(compact_wy(vectors * scales, orthogonalize=orthogonalize)), expected)


@pytest.mark.parametrize("exponent", [-37, -25, 25, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_do_not_matter_in_float32(exponent: int, dtype: torch.dtype) -> None:
    vectors = gaussian(20, 4).float()
    scales = torch.tensor([1.0, 10.0**exponent, 10.0 ** (exponent // 2), -(10.0**exponent)])
    scaled = vectors * scales
    close(dense(compact_wy(scaled, dtype=dtype)), explicit(scaled), ATOL32 if dtype == torch.float32 else ATOL64)


@pytest.mark.parametrize("exponent", [-300, -60, 60, 300])
def test_float64_vectors_keep_their_direction_in_a_float32_computation(exponent: int) -> None:
    vectors = gaussian(20, 4)
    reflector = compact_wy(vectors * 10.0**exponent, dtype=torch.float32)
    assert reflector.u.dtype == reflector.t.dtype == torch.float32
    close(dense(reflector), explicit(vectors), ATOL32)


@pytest.mark.parametrize("tiny", [5e-324, 1e-310])
def test_subnormal_vectors_have_a_direction(tiny: float) -> None:
    vectors = torch.tensor([[tiny], [0.0], [-tiny]], dtype=torch.float64)
    close(unit_columns(vectors), torch.tensor([[0.5**0.5], [0.0], [-(0.5**0.5)]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_half_precision_is_read_exactly(dtype: torch.dtype) -> None:
    """The chain is that of the stored numbers: nothing is lost on the way to float64."""
    vectors = gaussian(24, 6).to(dtype)
    close(dense(compact_wy(vectors)), explicit(vectors))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kind", ["gaussian", "repeated-pairs", "pairs-1e-03", "pairs-1e-08"])
def test_float32_computation_stays_within_its_rounding(kind: str, r: int) -> None:
    """T is at most 12 in condition for pairs and r roundings add up in U T Uᵀ: a few r · 2^-23 in norm."""
    vectors = CHAINS[kind](FEATURES, r).float()
    reflector = compact_wy(vectors, dtype=torch.float32)
    assert reflector.u.dtype == reflector.t.dtype == torch.float32
    error = float(torch.linalg.matrix_norm(dense(reflector).double() - explicit(vectors)))
    assert error < (16 + 4 * r) * EPS32


def test_float32_error_of_equal_columns_is_bounded_by_the_condition_of_t() -> None:
    r = 64
    vectors = all_equal(FEATURES, r).float()
    reflector = compact_wy(vectors, dtype=torch.float32)
    condition = float(torch.linalg.cond(compact_wy(vectors).t))
    error = float(torch.linalg.matrix_norm(dense(reflector).double() - explicit(vectors)))
    assert condition < 1e4
    assert error < condition * EPS32


@REPEATABLE
@given(data=st.data(), d=st.integers(1, 24), seed=st.integers(0, 2**32 - 1))
def test_any_chain_of_any_scales_is_the_explicit_product(data: st.DataObject, d: int, seed: int) -> None:
    r = data.draw(st.integers(1, d))
    exponents = data.draw(st.lists(st.floats(-290, 290), min_size=r, max_size=r))
    vectors = gaussian(d, r, seed=seed) * torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    repeat = data.draw(st.lists(st.integers(0, r - 1), min_size=r, max_size=r))
    vectors = vectors[:, repeat]
    reflector = compact_wy(vectors)
    expected = explicit(vectors)
    close(dense(reflector), expected)
    assert float(reflector.t.abs().max()) <= T_BOUND
    assert orthogonality_error(reflector) < ATOL64
    x = gaussian(3, d, seed=seed ^ 1)
    close(apply(x, reflector), x @ expected.T, ATOL64 * max(1.0, float(x.abs().max())))


@pytest.mark.parametrize("r", [1, 2, 7, 8])
def test_inverse_is_the_transpose_and_the_chain_backwards(r: int) -> None:
    vectors = gaussian(20, r)
    reflector = compact_wy(vectors)
    close(dense(inverse(reflector)), explicit(vectors).T)
    close(dense(inverse(reflector)), explicit(vectors.flip(1)))
    weight = gaussian(5, 20)
    close(fold(fold(weight, reflector), inverse(reflector)), weight)


def test_compose_is_the_product_in_the_order_given() -> None:
    a, b, c = (gaussian(20, r, seed=r) for r in (3, 2, 8))
    parts = [compact_wy(vectors) for vectors in (a, b, c)]
    product = compose(*parts)
    close(dense(product), explicit(a) @ explicit(b) @ explicit(c))
    close(dense(product), explicit(torch.cat([a, b, c], dim=1)))
    assert product.rank == 13
    assert float((dense(product) - explicit(b) @ explicit(a) @ explicit(c)).abs().max()) > 0.1


def test_compose_is_associative_and_takes_inverses_and_excess_rank() -> None:
    a, b, c = (compact_wy(gaussian(6, r, seed=r)) for r in (5, 4, 3))
    close(dense(compose(compose(a, b), c)), dense(compose(a, compose(b, c))))
    back_and_forth = compose(a, b, inverse(b), inverse(a))
    close(dense(back_and_forth), torch.eye(6, dtype=torch.float64))
    assert back_and_forth.rank > back_and_forth.features
    assert orthogonality_error(back_and_forth) < ATOL64


def test_compose_of_one_is_itself() -> None:
    reflector = compact_wy(gaussian(6, 2))
    assert compose(reflector) is reflector


def test_compose_refuses_spaces_of_different_size() -> None:
    with pytest.raises(ValueError, match="8 and 6 features"):
        compose(compact_wy(gaussian(8, 2)), compact_wy(gaussian(6, 2)))


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_rotated_activations_and_folded_weights_give_the_same_output(r: int, orthogonalize: bool) -> None:
    reflector = compact_wy(gaussian(20, r), orthogonalize=orthogonalize)
    weight, x = gaussian(5, 20, seed=7), gaussian(3 * 4, 20, seed=8).reshape(3, 4, 20)
    rotation = dense(reflector)
    close(apply(x, reflector), x @ rotation.T)
    close(rotate_rows(weight, reflector), weight @ rotation)
    close(apply(x, reflector) @ weight.T, x @ fold(weight, reflector).T)


def test_apply_is_not_the_reversed_chain() -> None:
    """With T for Tᵀ, activations would be rotated back: an error that keeps every norm."""
    reflector, x = compact_wy(gaussian(20, 4)), gaussian(3, 20)
    assert float((apply(x, reflector) - rotate_rows(x, reflector)).abs().max()) > 0.1


@pytest.mark.parametrize("shape", [(5, 18), (5, 2, 3, 3), (5, 6, 1, 3), (5, 18, 1, 1)])
@pytest.mark.parametrize("strength", [1.0, 0.0, -1.0, 0.3])
def test_fold_is_the_base_plus_so_much_of_the_change(shape: tuple[int, ...], strength: float) -> None:
    vectors, weight = gaussian(18, 4), gaussian(5, 18, seed=3).reshape(shape)
    before = weight.clone()
    folded = fold(weight, compact_wy(vectors), strength=strength)
    rows = weight.reshape(5, 18)
    close(folded, (rows + strength * (rows @ explicit(vectors) - rows)).reshape(shape))
    assert folded.shape == weight.shape
    assert torch.equal(weight, before)


def test_fold_of_no_strength_is_the_base_bit_for_bit() -> None:
    weight = gaussian(5, 18).float()
    assert torch.equal(fold(weight, compact_wy(gaussian(18, 4), dtype=torch.float32), strength=0.0), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fold_of_half_weights_is_not_rounded_back(dtype: torch.dtype) -> None:
    vectors, weight = gaussian(18, 4), gaussian(5, 18).to(dtype)
    folded = fold(weight, compact_wy(vectors))
    assert folded.dtype == torch.float64
    close(folded, weight.double() @ explicit(vectors))


def test_fold_of_a_strided_weight() -> None:
    """Channels-last convolutions and views into stacked tensors have no flat rows."""
    vectors, weight = gaussian(18, 4), gaussian(5, 18).reshape(5, 2, 3, 3)
    strided = weight.contiguous(memory_format=torch.channels_last)
    close(fold(strided, compact_wy(vectors)), fold(weight, compact_wy(vectors)))


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("r", [1, 2, 8])
def test_low_rank_factors_are_the_delta_weight(kind: str, r: int) -> None:
    vectors, weight = CHAINS[kind](20, r), gaussian(5, 20)
    b, a = low_rank_factors(weight, compact_wy(vectors))
    assert (b.shape, a.shape) == ((5, r), (r, 20))
    close(b @ a, weight @ explicit(vectors) - weight)


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_balanced_factors_are_the_same_product_and_as_large_as_it(angle: float) -> None:
    reflector = compact_wy(pairs(FEATURES, 8, angle))
    left, right = reflector.u, -reflector.t.T @ reflector.u.T
    u, v = balanced(left, right)
    torch.testing.assert_close(u @ v, left @ right, rtol=0, atol=ATOL64)
    # ‖√Σ‖² is the largest singular value of the product: 2 sin(θ/2) <= 2 for a rotation by θ.
    largest = torch.linalg.matrix_norm(left @ right, ord=2)
    for factor in (u, v):
        torch.testing.assert_close(torch.linalg.matrix_norm(factor, ord=2) ** 2, largest, rtol=ATOL64, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balanced_factors_of_near_parallel_pairs_survive_rounding(dtype: torch.dtype) -> None:
    reflector = compact_wy(pairs(FEATURES, 8, 0.005))
    left, right = reflector.u, -reflector.t.T @ reflector.u.T

    def lost(u: Tensor, v: Tensor) -> float:
        rounded = u.to(dtype).double() @ v.to(dtype).double()
        return float((rounded - left @ right).norm() / (left @ right).norm())

    # One rounding of each factor, half a unit in the last place: their errors add.
    assert lost(*balanced(left, right)) <= torch.finfo(dtype).eps
    assert lost(left, right) > 50 * torch.finfo(dtype).eps  # as they stand, the pairs' products cancel


@pytest.mark.parametrize("r", [1, 2, 7, 8])
def test_gram_schmidt_reflects_the_span(r: int) -> None:
    vectors = gaussian(20, r)
    reflector = compact_wy(vectors, orthogonalize=True)
    close(dense(reflector), explicit_gram_schmidt(vectors))
    close(dense(compose(reflector, reflector)), torch.eye(20, dtype=torch.float64))
    assert torch.equal(reflector.t, 2 * torch.eye(r, dtype=torch.float64))


def test_gram_schmidt_keeps_the_span_of_the_first_columns() -> None:
    vectors = unit_columns(gaussian(10, 4))
    q = gram_schmidt(vectors)
    for k in range(1, 5):
        outside = vectors[:, :k] - q[:, :k] @ (q[:, :k].T @ vectors[:, :k])
        assert float(outside.abs().max()) < ATOL64


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-6, 0.9 * GRAM_SCHMIDT_MIN_PIVOT])
def test_gram_schmidt_of_near_parallel_columns_breaks_down_and_names_the_second(angle: float) -> None:
    vectors = torch.cat([gaussian(20, 2, seed=9), pairs(20, 2, angle)], dim=1)
    with pytest.raises(NumericalError, match="reflection vector 3 lies in the span") as caught:
        compact_wy(vectors, orthogonalize=True)
    assert "init_weights=False" in str(caught.value)
    assert caught.value.exit_code == 5


def test_gram_schmidt_takes_columns_that_are_just_apart() -> None:
    vectors = pairs(20, 2, 2 * GRAM_SCHMIDT_MIN_PIVOT)
    # The second direction is a difference of unit vectors 2e-4 apart, which magnifies rounding by as much.
    close(dense(compact_wy(vectors, orthogonalize=True)), explicit_gram_schmidt(vectors), ATOL64)


def test_gram_schmidt_sees_a_column_in_the_span_of_several() -> None:
    vectors = gaussian(20, 3)
    vectors[:, 2] = vectors[:, 0] - vectors[:, 1]
    with pytest.raises(NumericalError, match="reflection vector 2"):
        compact_wy(vectors, orthogonalize=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "says"), [(0.0, "is zero"), (math.nan, "not finite"), (math.inf, "not finite")])
def test_vectors_without_a_direction_are_named(value: float, says: str, dtype: torch.dtype) -> None:
    vectors = gaussian(20, 4)
    if value == 0.0:
        vectors[:, 2] = 0
    else:
        vectors[11, 2] = -value
    with pytest.raises(NumericalError, match=f"reflection vector 2 {says}|reflection vector 2 is {says}"):
        compact_wy(vectors.to(dtype))


@pytest.mark.parametrize("shape", [(4, 5), (4, 0), (0, 0), (4,), (2, 4, 2)])
def test_shapes_that_hold_no_chain_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 <= r <= d"):
        compact_wy(torch.ones(shape))


def test_vectors_are_left_alone_and_out_of_autograd() -> None:
    vectors = gaussian(20, 4).requires_grad_()
    before = vectors.detach().clone()
    reflector = compact_wy(vectors)
    assert not reflector.u.requires_grad
    assert torch.equal(vectors, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reflector_moves_to_another_dtype_in_one_rounding(dtype: torch.dtype) -> None:
    reflector = compact_wy(gaussian(20, 4))
    moved = reflector.to("cpu", dtype)
    assert torch.equal(moved.u, reflector.u.to(dtype))
    assert torch.equal(moved.t, reflector.t.to(dtype))
