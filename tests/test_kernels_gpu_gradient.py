"""The kernels of the backward pass and of the factors on a GPU, through the operators and beside the plain versions."""

import pytest
import torch
from torch import Tensor

from hra_export import reflection
from hra_export.reflection import factor, reflect

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
# ∂U of float64: roundings of M and K, half a spacing each, and sums of 4096 terms in float32.
RTOL = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def gradients(x: Tensor, vectors: Tensor, grad: Tensor) -> list[Tensor]:
    inputs = x.detach().requires_grad_(), vectors.detach().requires_grad_()
    return list(torch.autograd.grad(reflect(*inputs), inputs, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "r"), [(1, 257, 1), (33, 100, 17), (512, 2048, 8), (1000, 4096, 32), (4096, 1024, 64), (300, 4096, 128)]
)
def test_gradient_is_that_of_float64(n: int, d: int, r: int, dtype: torch.dtype) -> None:
    x, grad = gaussian(n, d, seed=1).to(dtype), gaussian(n, d, seed=2).to(dtype)
    vectors = gaussian(d, r)
    got = gradients(x, vectors, grad)
    rounded = factor(vectors, dtype).u.double()
    want = gradients(x.double(), rounded, grad.double())
    want[1] *= rounded.norm(dim=0) / vectors.double().norm(dim=0)
    for found, exact in zip(got, want, strict=True):
        assert (found.double() - exact).norm() <= RTOL[dtype] * exact.norm()
    for found, again in zip(got, gradients(x, vectors, grad), strict=True):
        assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "d", "r"), [(1, 4096, 8), (200, 2048, 32), (3, 14336, 128), (2, 257, 17)])
def test_factors_are_orthogonal_and_those_of_the_plain_version(b: int, d: int, r: int, dtype: torch.dtype) -> None:
    vectors = gaussian(b, d, r)
    found, plain = factor(vectors, dtype), reflection._plain_factor(vectors, dtype)
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(found.u, plain[0], rtol=spacing, atol=1e-6)
    columns, s = found.u.double(), found.s.double()
    gram = columns.mT @ columns
    # RᵀR = I is S⁻¹ + S⁻ᵀ = UᵀU: S of the very columns that it is used with.
    rest = s @ gram @ s.mT - s - s.mT
    assert bool(rest.norm(dim=(-2, -1)).max() <= 2e-5)


def test_expanded_gradients_and_autocast_reach_the_kernels() -> None:
    x, vectors = gaussian(64, 256).requires_grad_(), gaussian(256, 8, seed=1).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        reflect(x, vectors).sum().backward()
    assert x.grad is not None
    assert vectors.grad is not None
    want = gradients(x.bfloat16(), vectors, torch.ones_like(x, dtype=torch.bfloat16))
    torch.testing.assert_close(vectors.grad, want[1], rtol=0, atol=0)


def test_step_in_a_cuda_graph_repeats_itself() -> None:
    x, vectors, grad = gaussian(512, 1024).bfloat16(), gaussian(1024, 8, seed=1), gaussian(512, 1024, seed=2).bfloat16()
    want = gradients(x, vectors, grad)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(x, vectors, grad)
    for _ in range(3):
        graph.replay()
        for found, exact in zip(got, want, strict=True):
            assert torch.equal(found, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_keep_the_rules_of_torch(dtype: torch.dtype) -> None:
    x, vectors = gaussian(9, 64).to(dtype), gaussian(64, 4, seed=1)
    found = factor(vectors, dtype)
    torch.library.opcheck(torch.ops.hra.factor, (vectors, dtype))
    _, m = torch.ops.hra.reflect(x, vectors, found.u, found.s)
    torch.library.opcheck(torch.ops.hra.reflect_backward, (x, x, vectors, found.u, found.s, m, True, True))
