"""The kernels of the backward pass and of the factors, in Triton's interpreter, against autograd and float64."""

import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hra_export.reflection import factor as plain_factor

triton = pytest.importorskip("triton")

from hra_export.kernels import factors, forward, gradient  # noqa: E402  they import triton
from hra_export.kernels.operands import IS_COMPILED  # noqa: E402

interpreted = pytest.mark.skipif(
    IS_COMPILED, reason="Triton compiles here; tests/test_kernels_gpu.py has these kernels"
)

SPACING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Half precision: M, K and ∂x are rounded by half a spacing, in the interpreter by a whole one of bfloat16, which it
# cuts off; where the terms of a column of ∂U cancel, as for a single row at r = 128 of d = 129, that counts several
# times: 4.3 spacings in the plain version, too. Float32: sums of up to 400 terms, which grow as the root of that, times
# the 4 that entries of S may reach.
RTOL = {torch.float32: 80 * 2.0**-24, torch.float16: 6 * 2.0**-10, torch.bfloat16: 6 * 2.0**-7}
# S of up to 128 rows of float32 sums, T's condition number of a thousand for nearly equal vectors.
ATOL_S = 2e-5
# Of R = I − U Sᵀ Uᵀ: the norm of 128² errors of 2 · 2^-24.
ORTHOGONALITY = 2e-5
HALF_AND_FULL = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 3), (1, 7, 5), (2, 257, 65), (8, 65, 33), (17, 40, 20), (32, 70, 10), (64, 70, 10), (128, 130, 10)]


class Case(NamedTuple):
    """The arguments of a backward pass."""

    grad: Tensor
    x: Tensor
    vectors: Tensor
    u: Tensor
    s: Tensor
    m: Tensor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain(d: int, r: int, *, is_near: bool = False, seed: int = 0) -> Tensor:
    """(d, r) vectors of many lengths; in pairs at an angle of 1e-3 if near."""
    u = gaussian(d, r, seed=seed)
    if is_near:
        first = u[:, : r // 2 * 2 : 2]
        u[:, 1::2] = first + 1e-3 * u[:, 1::2] * (first.norm(dim=0) / u[:, 1::2].norm(dim=0))
    return u * torch.logspace(-2, 2, r)


def case(r: int, d: int, n: int, dtype: torch.dtype, *, is_near: bool = False) -> Case:
    x, grad, vectors = gaussian(n, d, seed=1).to(dtype), gaussian(n, d, seed=2).to(dtype), chain(d, r, is_near=is_near)
    found = plain_factor(vectors, dtype)
    return Case(grad, x, vectors, found.u, found.s, torch.ops.hra.reflect(x, vectors, found.u, found.s)[1])


def expected(given: Case) -> tuple[Tensor, Tensor]:
    """∂x and ∂U in float64, by autograd through one reflection after another, by the rounded columns."""
    x, columns = given.x.double().requires_grad_(), given.u.double().requires_grad_()
    z = x
    for column in reversed(columns.unbind(1)):  # x Rᵀ: the last reflection comes first
        z = z - 2 * torch.outer(z @ column, column) / column.square().sum()
    grad_x, grad_columns = torch.autograd.grad(z, (x, columns), given.grad.double())
    return grad_x, grad_columns * columns.detach().norm(dim=0) / given.vectors.double().norm(dim=0)


def assert_near(got: Tensor, want: Tensor, rtol: float) -> None:
    """Each column, in its norm."""
    assert got.shape == want.shape
    error, size = (got.double() - want).norm(dim=0), want.norm(dim=0)
    assert bool((error <= rtol * size).all()), (error / size).max()


def check_gradient(r: int, d: int, n: int, dtype: torch.dtype, *, is_near: bool) -> None:
    given = case(r, d, n, dtype, is_near=is_near)
    grad_x, grad_vectors = gradient.reflect_backward(*given, True, True)
    want_x, want_vectors = expected(given)
    assert (grad_x.dtype, grad_vectors.dtype) == (dtype, torch.float32)
    assert_near(grad_x.flatten()[:, None], want_x.flatten()[:, None], RTOL[dtype])
    if d > 1:  # in one dimension there is but one direction
        assert_near(grad_vectors, want_vectors, RTOL[dtype])


@interpreted
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize(("r", "d", "n"), SHAPES)
def test_gradient_is_that_of_the_explicit_chain(r: int, d: int, n: int, dtype: torch.dtype) -> None:
    check_gradient(r, d, n, dtype, is_near=False)


@interpreted
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize(("r", "d", "n"), [(2, 70, 20), (17, 40, 20)])
def test_gradient_is_that_of_the_explicit_chain_when_vectors_are_nearly_equal(
    r: int, d: int, n: int, dtype: torch.dtype
) -> None:
    check_gradient(r, d, n, dtype, is_near=True)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("is_near", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("r", [1, 2, 8, 17, 32, 64, 128])
@pytest.mark.parametrize(("d", "n"), [(129, 1), (257, 3), (300, 500)])
def test_gradient_is_that_of_the_explicit_chain_at_more_sizes(
    r: int, d: int, n: int, dtype: torch.dtype, is_near: bool
) -> None:
    check_gradient(r, d, n, dtype, is_near=is_near)


@interpreted
def test_gradient_does_not_depend_on_strides() -> None:
    given = case(3, 40, 20, torch.float32)
    ones = torch.ones(()).expand(4, 5, 40)  # what `.sum().backward()` sends
    shaped = given._replace(grad=ones, x=given.x.view(4, 5, 40))
    want = gradient.reflect_backward(*shaped._replace(grad=ones.contiguous()), True, True)
    turned = shaped._replace(
        x=given.x.T.contiguous().T.view(4, 5, 40),
        vectors=given.vectors.T.contiguous().T,
        u=given.u.contiguous(),
        s=given.s.T.contiguous().T,
        m=given.m.T.contiguous().T,
    )
    for other in (shaped, turned):
        for got, same in zip(gradient.reflect_backward(*other, True, True), want, strict=True):
            assert torch.equal(got, same)
            assert got.is_contiguous()


@interpreted
def test_gradient_of_no_rows_is_zero() -> None:
    grad_x, grad_vectors = gradient.reflect_backward(*case(4, 40, 0, torch.float16), True, True)
    assert grad_x.shape == (0, 40)
    assert torch.equal(grad_vectors, torch.zeros(40, 4))


@interpreted
def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(4, 40, 9, torch.float32)
    want_x, want_vectors = gradient.reflect_backward(*given, True, True)
    with monkeypatch.context() as patch:
        patch.setattr(gradient, "accumulate", None)
        grad_x, nothing = gradient.reflect_backward(*given, True, False)
        assert torch.equal(grad_x, want_x)
        assert nothing.numel() == 0
    monkeypatch.setattr(forward, "reflect", None)
    nothing, grad_vectors = gradient.reflect_backward(*given, False, True)
    assert_near(grad_vectors, want_vectors.double(), RTOL[torch.float32])
    assert nothing.numel() == 0


@interpreted
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_gradient_is_in_inverse_proportion_to_the_length_of_vectors(scale: float) -> None:
    given = case(2, 40, 9, torch.float32)
    want = gradient.reflect_backward(*given, False, True)[1]
    got = gradient.reflect_backward(*given._replace(vectors=given.vectors * scale), False, True)[1]
    assert_near(got * scale, want.double(), RTOL[torch.float32])


@interpreted
def test_splits_of_the_rows_add_up_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given, found = case(2, 40, 100, torch.float32), []
    for splits in (1, 4):
        monkeypatch.setattr(gradient, "count_splits", lambda *_, splits=splits: splits)
        found.append(gradient.reflect_backward(*given, False, True)[1])
        assert torch.equal(found[-1], gradient.reflect_backward(*given, False, True)[1])
    assert_near(found[1], found[0].double(), RTOL[torch.float32])


def test_splits_fill_the_gpu_and_do_not_outweigh_the_activations() -> None:
    """An eighth at most: partial sums of 8 bytes beside 2 × 2 bytes for each row."""
    for n, d, r in [(0, 64, 8), (100, 4096, 128), (4096, 4096, 32), (4096, 14336, 8), (65536, 2048, 16)]:
        tiles = math.ceil(d / 64)
        splits = gradient.count_splits(2 * n, r, tiles, 132)
        assert splits >= 1
        assert splits == 1 or 8 * splits * r * d <= 2 * 2 * n * d / 8
        assert (splits - 1) * tiles <= gradient.PROGRAMS_PER_PROCESSOR * 132


@interpreted
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize(("r", "d"), [(1, 1), (1, 300), (2, 257), (8, 100), (17, 100), (32, 130), (64, 65), (128, 130)])
def test_factors_are_those_of_float64(r: int, d: int, dtype: torch.dtype) -> None:
    vectors = torch.stack([chain(d, r), chain(d, r, is_near=True)])
    u, s = factors.factor(vectors, dtype)
    assert (u.dtype, s.dtype, u.mT.is_contiguous(), s.is_contiguous()) == (dtype, torch.float32, True, True)
    exact = vectors.double() / vectors.double().norm(dim=-2, keepdim=True)
    assert bool(((u.double() - exact).abs() <= 4 * SPACING[torch.float32] + SPACING[dtype] * exact.abs()).all())
    columns = u.double()
    gram = columns.mT @ columns
    inverse = torch.linalg.inv(gram.tril(-1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2))
    torch.testing.assert_close(s.double(), inverse, rtol=0, atol=ATOL_S)
    rotation = torch.eye(d, dtype=torch.float64) - columns @ s.double().mT @ columns.mT
    assert bool((rotation.mT @ rotation - torch.eye(d, dtype=torch.float64)).norm(dim=(-2, -1)).max() < ORTHOGONALITY)


@interpreted
def test_factors_take_any_strides_and_leading_dimensions() -> None:
    vectors = gaussian(4, 30, 3, 2).permute(3, 2, 1, 0)  # (2, 3, 30, 4)
    u, s = factors.factor(vectors, torch.float32)
    want = plain_factor(vectors, torch.float32)
    assert (u.shape, s.shape) == (want.u.shape, want.s.shape)
    torch.testing.assert_close(u, want.u, rtol=0, atol=4 * SPACING[torch.float32])
    torch.testing.assert_close(s, want.s, rtol=0, atol=ATOL_S)
    assert factors.factor(vectors[:0], torch.float32)[0].shape == (0, 3, 30, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factor_operator_keeps_the_rules_of_torch(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.hra.factor, (gaussian(2, 30, 4), dtype))


@interpreted
@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e25, 3e37])
def test_extreme_lengths_leave_the_direction(scale: float) -> None:
    vectors = (gaussian(600, 2) * scale).clamp(-3e38, 3e38)
    vectors[:400, 0] = 0  # no length in the first steps
    vectors[400:, 1] *= 1e-3  # and less in later ones
    u, _ = factors.factor(vectors, torch.float32)
    exact = vectors.double() / vectors.double().norm(dim=0)
    assert float((u.double() - exact).abs().max()) <= 4 * SPACING[torch.float32]


@interpreted
def test_zero_vector_gives_nan_in_its_chain_alone() -> None:
    vectors = torch.stack([chain(20, 3, seed=seed) for seed in range(2)])
    vectors[0, :, 1] = 0
    with np.errstate(divide="ignore", invalid="ignore"):  # the interpreter's NumPy says so; the NaN is wanted
        u, s = factors.factor(vectors, torch.float32)
    assert torch.equal(u.isnan().any(dim=1), torch.tensor([[False, True, False], [False] * 3]))
    assert torch.equal(s.isnan().any(dim=(1, 2)), torch.tensor([True, False]))


def compiled(*arguments: str) -> list[dict[str, int]]:
    """What `tests/gradient_compilation.py` prints, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gradient_compilation", *arguments]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


# Of a program, so that two at least share a processor: sm80 has 163 kB, sm90 227 kB.
MOST_SHARED = 80 * 1024


@pytest.mark.parametrize("rank", ["32"])
def test_kernels_compile_for_gpus_and_spill_nothing(rank: str) -> None:
    for found in compiled("90", rank, "bf16"):
        assert found["spilled_bytes"] == 0, found
        assert found["shared_bytes"] <= MOST_SHARED, found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", ["16", "32", "64", "128"])
@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_kernels_compile_for_gpus_and_spill_nothing(capability: str, rank: str, dtype: str) -> None:
    for found in compiled(capability, rank, dtype):
        assert found["spilled_bytes"] == 0, found
        assert found["shared_bytes"] <= MOST_SHARED, found
