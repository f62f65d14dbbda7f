"""The forward kernel on a GPU: compiled, with barriers, in CUDA graphs, through the operator and the live layers."""

import pytest
import torch
from torch import Tensor, nn

from hra_export import kernels
from hra_export.kernels import barriers, forward, tuning
from hra_export.kernels.tuning import Shape
from hra_export.layer import Chain, ReflectedLayer
from hra_export.reflection import Factors, factor, reflect
from tests.test_kernels_forward import DEVICE, chain, explicit, gaussian, holds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda" or not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Decoding, with small and large factors; prefill, alone and in turn.
SIZES = [
    (1, 4096, 8),
    (1, 14336, 64),
    (16, 4096, 32),
    (64, 14336, 128),
    (300, 2048, 17),
    (2048, 1024, 8),
    (5, 28672, 1),
]


def exact(x: Tensor, factors: Factors) -> Tensor:
    """x Rᵀ in float64, without a (d, d) matrix."""
    return x.double() - x.double() @ factors.u.double() @ factors.s.double() @ factors.u.double().T


def is_close(z: Tensor, x: Tensor, factors: Factors) -> bool:
    """Within four roundings of the dtype and, for float32, of its sums of up to 28672 terms."""
    bound = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[x.dtype]
    expected = exact(x, factors)
    return bool((z.double() - expected).norm() <= bound * expected.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_kernel_is_exact(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    n, d, r = size
    x, factors = gaussian(n, d).to(dtype), chain(d, r, dtype)
    assert is_close(forward.reflect(x, factors.u, factors.s)[0], x, factors)


@pytest.mark.parametrize("size", [(1, 14336, 64), (64, 14336, 128)])
def test_programs_that_meet_give_the_same_bits_each_time(size: tuple[int, int, int]) -> None:
    n, d, r = size
    x, factors = gaussian(n, d).bfloat16(), chain(d, r, torch.bfloat16)
    assert tuning.choose(Shape(1, n, d, r, 2), forward._gpu(x.device)).exchange == "together"
    first = forward.reflect(x, factors.u, factors.s)
    for _ in range(200):
        again = forward.reflect(x, factors.u, factors.s)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_programs_of_several_streams_do_not_meet_one_another() -> None:
    factors = chain(14336, 64, torch.bfloat16)
    inputs = [gaussian(1, 14336, seed=seed).bfloat16() for seed in range(4)]
    expected = [forward.reflect(x, factors.u, factors.s)[0] for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(50):
        for stream, x, outputs in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(forward.reflect(x, factors.u, factors.s)[0])
    torch.cuda.synchronize()
    for outputs, z in zip(found, expected, strict=True):
        assert all(torch.equal(output, z) for output in outputs)


@pytest.mark.parametrize("size", [(1, 4096, 8), (1, 14336, 64), (16, 14336, 128)])
def test_cuda_graph_repeats_the_call_on_new_input(size: tuple[int, int, int]) -> None:
    n, d, r = size
    x, factors = gaussian(n, d).bfloat16(), chain(d, r, torch.bfloat16)
    forward.reflect(x, factors.u, factors.s)  # compiles, and makes the counters
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once, _ = forward.reflect(x, factors.u, factors.s)
        twice, _ = forward.reflect(once, factors.u, factors.s)
    for seed in range(5):
        x.copy_(gaussian(n, d, seed=seed))
        graph.replay()
        eager = forward.reflect(x, factors.u, factors.s)[0]  # beside the graph's own counters
        assert torch.equal(once, eager)
        assert torch.equal(twice, forward.reflect(eager, factors.u, factors.s)[0])


def test_counters_that_are_made_while_graphs_warm_up_outlive_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's graphs reuse the memory of what is made in their warm-up, and refuse what is held of it."""
    x, vectors = gaussian(1, 14336).bfloat16(), gaussian(14336, 64, seed=1)
    factors = factor(vectors, torch.bfloat16)
    monkeypatch.setattr(barriers, "_made", set())
    barriers._counters.cache_clear()
    compiled = torch.compile(lambda x: reflect(x + 0, vectors, factors) + 0, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            x.copy_(gaussian(1, 14336, seed=seed))
            assert is_close(compiled(x).clone(), x, factors)


def test_operator_takes_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    kernel = forward.reflect

    def counted(x: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x.dtype)
        return kernel(x, u, s)

    monkeypatch.setattr(forward, "reflect", counted)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, vectors = gaussian(3, 40).to(dtype), gaussian(40, 4, seed=1)
        holds_for = factor(vectors, dtype)
        z = reflect(x, vectors, holds_for)
        if dtype != torch.float64:
            assert is_close(z, x, holds_for)
    assert calls == [torch.float32, torch.bfloat16]
    assert not kernels.take(gaussian(3, 200), 129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_keep_the_rules_of_torch(dtype: torch.dtype) -> None:
    x, vectors = gaussian(3, 24).to(dtype).requires_grad_(), gaussian(24, 4, seed=1).to(dtype).requires_grad_()
    found = factor(vectors, dtype)
    torch.library.opcheck(torch.ops.hra.reflect, (x, vectors, found.u, found.s))


def test_live_layer_without_gradients_is_one_call() -> None:
    layer = ReflectedLayer(nn.Linear(64, 8, device="cuda"), [Chain(gaussian(64, 4), orthogonalize=False)])
    x = gaussian(1, 64)
    with torch.no_grad():
        z = layer.rotate(x)
    wanted = x.double() @ explicit(gaussian(64, 4)).T
    assert (z - wanted).norm() <= 1e-5 * wanted.norm()


def test_rows_that_a_grid_axis_of_65535_would_not_hold() -> None:
    x, factors = gaussian(70_000, 16), chain(16, 2, torch.float32)
    launch = tuning.Launch(tuning.Tile(1, 16, 4, 2), 1, "alone")
    holds(forward.reflect(x, factors.u, factors.s, launch=launch), x, factors)
