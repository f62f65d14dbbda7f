"""The operator `hra::reflect` against the explicit chain in float64, its gradient against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from hra_export.householder import compact_wy, dense
from hra_export.reflection import (
    activation_dtype,
    differentiable_factors,
    factor,
    orthonormal_columns,
    reflect,
)

# Float64 on both sides: sums of 24 terms and up to 24 reflections, each of a few roundings of 2^-52.
ATOL64 = 1e-12
# Float32: activations of size 1, sums of 24 terms, T of up to 4 with r terms a row.
ATOL32 = 2e-5
# R from a T that was solved for the rounded U and then held in float32: r entries of up to 4, 2^-24 each.
ORTHOGONALITY = 1e-5
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# x U, the coefficients, the update and the difference round once each, and |T| ≤ 4 weighs the first two.
ROUNDINGS = 10
FEATURES = 24


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(r: int, kind: str = "anywhere", *, seed: int = 0) -> Tensor:
    """(d, r) vectors of many lengths: anywhere, in pairs 0.01 apart, or in equal pairs."""
    u = gaussian(FEATURES, r, seed=seed)
    if kind != "anywhere":
        for i in range(1, r, 2):
            u[:, i] = u[:, i - 1] + (0.01 * u[:, i] if kind == "near-pairs" else 0)
    return u * torch.logspace(-2, 2, r, dtype=torch.float64)


def explicit(u: Tensor) -> Tensor:
    """H_1 H_2 … H_r, one reflection after another."""
    product = torch.eye(u.shape[0], dtype=torch.float64)
    for column in u.double().T:
        product = product - 2 * torch.outer(product @ column, column) / column.square().sum()
    return product


@pytest.mark.parametrize("kind", ["anywhere", "near-pairs", "equal-pairs"])
@pytest.mark.parametrize("r", [1, 2, 7, 8, FEATURES])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, ATOL64), (torch.float32, ATOL32)])
def test_reflect_is_x_times_the_transposed_chain(dtype: torch.dtype, atol: float, r: int, kind: str) -> None:
    x, u = gaussian(2, 5, FEATURES, seed=1), chain(r, kind)
    z = reflect(x.to(dtype), u.to(dtype))
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), x @ explicit(u.to(dtype)).T, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(FEATURES,), (1, FEATURES), (0, FEATURES), (2, 0, 3, FEATURES), (3, 1, 2, FEATURES)])
def test_reflect_takes_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    x, u = gaussian(*shape), chain(4)
    torch.testing.assert_close(reflect(x, u), x @ explicit(u).T, rtol=0, atol=ATOL64)


def test_reflect_takes_rows_that_are_not_contiguous() -> None:
    x, u = gaussian(FEATURES, 5, 3).permute(2, 1, 0), chain(4)
    torch.testing.assert_close(reflect(x, u), x @ explicit(u).T, rtol=0, atol=ATOL64)


def test_reflect_does_not_change_what_it_is_given() -> None:
    x, u = gaussian(3, FEATURES), chain(4)
    before = x.clone(), u.clone()
    reflect(x, u)
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize("kind", ["anywhere", "near-pairs"])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_gradient_is_that_of_finite_differences(r: int, kind: str) -> None:
    x, u = gaussian(3, FEATURES, seed=1).requires_grad_(), (chain(r, kind) / 3).requires_grad_()
    assert torch.autograd.gradcheck(reflect, (x, u))


def test_gradient_of_the_gram_schmidt_form_is_that_of_finite_differences() -> None:
    x, u = gaussian(3, FEATURES, seed=1).requires_grad_(), chain(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, u: reflect(x, orthonormal_columns(u)), (x, u))


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_differentiable_factors_carry_the_gradient_of_finite_differences(orthogonalize: bool) -> None:
    u = chain(3).requires_grad_()

    def factors(u: Tensor) -> tuple[Tensor, Tensor]:
        found = differentiable_factors(u, torch.float64, orthogonalize=orthogonalize)
        return found.u, found.s

    assert torch.autograd.gradcheck(factors, (u,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_lower_precision_is_that_of_float64(dtype: torch.dtype) -> None:
    x, u, g = gaussian(40, FEATURES, seed=1), chain(4), gaussian(40, FEATURES, seed=2)
    u = u / u.norm(dim=0)

    def gradients(dtype: torch.dtype, vectors: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_(), u.to(vectors).requires_grad_()]
        torch.autograd.backward(reflect(*inputs), g.to(dtype))
        return [value.grad.double() for value in inputs]

    for got, expected in zip(gradients(dtype, torch.float32), gradients(torch.float64, torch.float64), strict=True):
        error = (got - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else ROUNDINGS * HALF_ULP[torch.bfloat16])


@pytest.mark.parametrize(("for_x", "for_vectors"), [(True, False), (False, True)])
def test_only_wanted_gradients_are_computed(for_x: bool, for_vectors: bool) -> None:
    x, u = gaussian(3, FEATURES).requires_grad_(for_x), chain(4).requires_grad_(for_vectors)
    reflect(x, u).sum().backward()
    assert (x.grad is not None, u.grad is not None) == (for_x, for_vectors)


def test_nothing_that_grows_with_the_rows_is_saved_but_x_and_r_coefficients() -> None:
    x, u, saved = gaussian(1000, FEATURES).requires_grad_(), chain(4).requires_grad_(), []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        reflect(x, u)
    large = [value for value in saved if 1000 in value.shape]
    assert [value.shape for value in large] == [x.shape, (4, 1000)]
    assert large[0].data_ptr() == x.data_ptr()


def test_gradient_cannot_be_differentiated_again() -> None:
    x, u = gaussian(3, FEATURES).requires_grad_(), chain(4).requires_grad_()
    (first,) = torch.autograd.grad(reflect(x, u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operators_keep_the_rules_of_torch(dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors, and agreement with the compiled form under dynamic shapes."""
    x, u = gaussian(3, FEATURES).to(dtype).requires_grad_(), chain(4).to(dtype).requires_grad_()
    found = factor(u, dtype)
    torch.library.opcheck(torch.ops.hra.reflect, (x, u, found.u, found.s))
    _, m = torch.ops.hra.reflect(x.detach(), u.detach(), found.u, found.s)
    inputs = (torch.ones_like(x), x.detach(), u.detach(), found.u, found.s, m, True, True)
    torch.library.opcheck(torch.ops.hra.reflect_backward, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["anywhere", "near-pairs"])
def test_half_precision_factors_stay_orthogonal(kind: str, dtype: torch.dtype) -> None:
    found = factor(chain(8, kind).float(), dtype)
    u, s = found.u.double(), found.s.double()
    r = torch.eye(FEATURES, dtype=torch.float64) - u @ s.mT @ u.T
    assert found.u.dtype == dtype
    assert torch.linalg.matrix_norm(r.T @ r - torch.eye(FEATURES)) < ORTHOGONALITY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_a_few_roundings_off(dtype: torch.dtype) -> None:
    x, u = gaussian(50, FEATURES, seed=1).to(dtype), chain(8)
    z, exact = reflect(x, u.float()), x.double() @ dense(compact_wy(factor(u, dtype).u)).T
    assert (z.double() - exact).norm() / exact.norm() < ROUNDINGS * HALF_ULP[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paired_start_is_the_identity(dtype: torch.dtype) -> None:
    x, u = gaussian(50, FEATURES, seed=1).to(dtype), chain(8, "equal-pairs").float()
    bound = ATOL32 if dtype == torch.float32 else HALF_ULP[dtype]
    assert (reflect(x, u) - x).abs().max() <= bound * x.abs().max()


def test_autocast_casts_u_first() -> None:
    """The result is that of half-precision inputs, T from the cast U included."""
    x, u = gaussian(5, FEATURES).float(), chain(4).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert activation_dtype(x) == torch.bfloat16
        assert activation_dtype(x.double()) == torch.float64
        inside = reflect(x, u)
        found = factor(u, torch.bfloat16)
    assert torch.equal(inside, reflect(x.bfloat16(), u))
    assert torch.equal(found.s, factor(u, torch.bfloat16).s)


def test_batched_factors_are_those_of_each_chain() -> None:
    chains = torch.stack([chain(4, seed=seed) for seed in range(5)])
    batch = factor(chains, torch.float32)
    for i, single in enumerate(chains):
        one = factor(single, torch.float32)
        assert torch.equal(batch.u[i], one.u)
        torch.testing.assert_close(batch.s[i], one.s, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_lengths_leave_the_direction(scale: float) -> None:
    x, u = gaussian(5, FEATURES, seed=1).float(), chain(4) / chain(4).norm(dim=0)
    torch.testing.assert_close(reflect(x, (u * scale).float()), reflect(x, u.float()), rtol=0, atol=ATOL32)


def test_compiled_is_one_graph() -> None:
    def step(x: Tensor, u: Tensor) -> Tensor:
        return torch.sin(reflect(x, u)).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x, u = gaussian(5, FEATURES, seed=1).requires_grad_(), chain(4).requires_grad_()
    expected = torch.autograd.grad(step(x, u), (x, u))
    for got, want in zip(torch.autograd.grad(compiled(x, u), (x, u)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL64)


def test_angle_of_a_pair_is_turned_twice() -> None:
    """Two reflections at an angle φ rotate their plane by 2 φ."""
    u = torch.zeros(FEATURES, 2, dtype=torch.float64)
    u[0, 0], u[0, 1], u[1, 1] = 1, math.cos(0.3), math.sin(0.3)
    x = torch.zeros(FEATURES, dtype=torch.float64)
    x[0] = 1
    z = reflect(x, u)
    assert math.acos(float(z[0])) == pytest.approx(0.6)
    assert abs(float(z[1])) == pytest.approx(math.sin(0.6))


@pytest.mark.parametrize("dim", [0, 1])
def test_reflect_maps_over_a_dimension_of_x(dim: int) -> None:
    x, u = gaussian(5, 3, FEATURES, seed=1), chain(4)
    mapped = torch.vmap(lambda x: reflect(x, u, factor(u, torch.float64)), in_dims=dim, out_dims=dim)(x)
    torch.testing.assert_close(mapped, reflect(x, u), rtol=0, atol=ATOL64)
