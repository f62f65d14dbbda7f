"""The CUDA kernels on a GPU: called directly, and through ONNX Runtime against the operators' bodies."""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from benchmarks.cuda_operator import Member, Task
from hra_export.graph.document import save_graph
from hra_export.graph.grouped_operator import declare_used_
from hra_export.graph.session import GraphSession
from hra_export.kernels.operator_build import Options
from tests.graph_text import Array, graph
from tests.native_operator import built_library

pytestmark = pytest.mark.gpu

UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# X U goes to the tensor cores as two terms of the type.
SPLIT = {torch.float32: 0.0, torch.float16: 2**-22, torch.bfloat16: 2**-16}
# Tensor cores may drop the last bits of a float32 sum where other units round it.
SUMMED_BIT = 2**-23
TYPES = tuple(UNIT)
HEADER = '<ir_version: 10, opset_import: ["" : 20, "hra" : 1]>'
HALF_NAMES = {torch.float32: "float", torch.float16: "float16"}
D = 264


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    """The operator library with CUDA kernels."""
    return built_library(Options(cuda="on"))


@pytest.fixture(scope="module")
def reflect(cuda_library: Path) -> Any:
    """`HraExportReflectOnCuda` of the library."""
    function: Any = ctypes.CDLL(str(cuda_library)).HraExportReflectOnCuda
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.POINTER(Task), ctypes.c_void_p]
    return function


def operands(d: int, rank: int, dtype: torch.dtype, adapters: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (a, d, r) and V (a, r, d) whose product has about the size of X."""
    random = torch.Generator("cuda").manual_seed(seed)
    u = torch.randn(adapters, d, rank, generator=random, device="cuda") / d**0.5
    v = torch.randn(adapters, rank, d, generator=random, device="cuda") / max(rank, 1) ** 0.5
    return u.to(dtype), v.to(dtype)


def call(reflect: Any, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], index: Tensor | None) -> list[Tensor]:
    """Y of every member, queued on torch's current stream."""
    outputs = [torch.full_like(x, torch.nan) for _ in pairs]
    members = (Member * len(pairs))(
        *(
            Member(u.data_ptr(), v.data_ptr(), y.data_ptr(), u.shape[-1], u.shape[0])
            for (u, v), y in zip(pairs, outputs, strict=True)
        )
    )
    per_entry = x.shape[0] if index is None else x.shape[0] // index.shape[0]
    pointer = None if index is None else index.data_ptr()
    kind = TYPES.index(x.dtype)
    task = Task(kind, x.data_ptr(), x.shape[0], x.shape[1], pointer, per_entry, members, len(pairs))
    error = reflect(ctypes.byref(task), torch.cuda.current_stream().cuda_stream)
    assert error is None, error
    return outputs


def assert_reflected(x: Tensor, u: Tensor, v: Tensor, y: Tensor) -> None:
    """Y against float64, within float32 sums, the two terms of X U, and one rounding."""
    x64, u64, v64 = (tensor.double() for tensor in (x, u, v))
    exact = x64 + (x64 @ u64) @ v64
    size = (x64.abs() @ u64.abs()) @ v64.abs()
    sums = (sum(u.shape) + 4) * SUMMED_BIT + SPLIT[x.dtype]
    allowed = UNIT[x.dtype] * exact.abs() + 2 * sums * size + torch.finfo(x.dtype).tiny
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [0, 1, 2, 8, 17, 32, 64, 128, 300])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 65, 1000])
def test_kernel_is_that_of_float64(reflect: Any, dtype: torch.dtype, rank: int, rows: int) -> None:
    for d in (131, 4096):
        x = torch.randn(rows, d, generator=torch.Generator("cuda").manual_seed(rows), device="cuda").to(dtype)
        u, v = operands(d, rank, dtype, 1, rank)
        (y,) = call(reflect, x, [(u, v)], None)
        assert_reflected(x, u[0], v[0], y)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_members_and_adapters_of_rows_are_those_of_float64(reflect: Any, dtype: torch.dtype, tokens: int) -> None:
    index = torch.tensor([2, 0, -1, 1, 3], device="cuda")
    x = torch.randn(len(index) * tokens, D, device="cuda").to(dtype)
    pairs = [operands(D, rank, dtype, 3, rank) for rank in (8, 0, 17)]
    outputs = call(reflect, x, pairs, index)
    for (u, v), y in zip(pairs, outputs, strict=True):
        for entry, adapter in enumerate(index.tolist()):
            rows = slice(entry * tokens, (entry + 1) * tokens)
            if 0 <= adapter < 3:
                assert_reflected(x[rows], u[adapter], v[adapter], y[rows])
            else:
                assert bool(y[rows].isnan().all())


def test_a_recorded_call_reads_what_its_tensors_hold_at_replay(reflect: Any) -> None:
    x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    pairs = [operands(4096, 8, torch.bfloat16, 1, seed) for seed in range(3)]
    call(reflect, x, pairs, None)  # the kernel is loaded by its first launch
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        outputs = call(reflect, x, pairs, None)
    x.copy_(torch.randn_like(x))
    pairs[0][0].zero_()
    recorded.replay()
    torch.cuda.synchronize()
    for (u, v), y in zip(pairs, outputs, strict=True):
        assert_reflected(x, u[0], v[0], y)


def stored(folder: Path, name: str, text: str, tensors: dict[str, Array]) -> Path:
    """A graph with the bodies of its operators."""
    model: ir.Model = graph(text, tensors, header=HEADER)
    declare_used_(model)
    save_graph(model, folder, name)
    return folder / f"{name}.onnx"


def graphs(folder: Path, dtype: torch.dtype) -> Iterator[tuple[Path, dict[str, Array]]]:
    """A single reflection, a group, and a group whose rows name adapters, each with inputs."""
    kind, numpy_type = HALF_NAMES[dtype], {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    random = np.random.default_rng(0)

    def pair(rank: int, *lead: int) -> tuple[Array, Array]:
        u = random.standard_normal((*lead, D, rank)) / D**0.5
        v = random.standard_normal((*lead, rank, D)) / rank**0.5
        return u.astype(numpy_type), v.astype(numpy_type)

    x = random.standard_normal((3, 2, D)).astype(numpy_type)
    (u, v), (u2, v2) = pair(8), pair(17)
    head = f"{kind}[b, t, {D}]"
    yield (
        stored(
            folder, "one", f"g ({head} x) => ({head} y) {{ y = hra.HouseholderReflection (x, u, v) }}", {"u": u, "v": v}
        ),
        {"x": x},
    )
    body = f"g ({head} x) => ({head} y, {head} z) {{ y, z = hra.HouseholderReflectionGroup2 (x, u, v, u2, v2) }}"
    yield stored(folder, "group", body, {"u": u, "v": v, "u2": u2, "v2": v2}), {"x": x}
    (u, v), (u2, v2) = pair(8, 4), pair(17, 4)
    body = (
        f"g ({head} x, int64[b] a) => ({head} y, {head} z) "
        "{ y, z = hra.HouseholderReflectionRowsGroup2 (x, a, u, v, u2, v2) }"
    )
    yield (
        stored(folder, "rows", body, {"u": u, "v": v, "u2": u2, "v2": v2}),
        {"x": x, "a": np.array([3, 0, 2])},
    )


# The body rounds X U, its product with V and the sum, each to the type; sums of D terms grow as their root.
BODY_ROUNDINGS = 6 * D**0.5


@pytest.mark.parametrize("dtype", HALF_NAMES)
def test_native_kernels_give_the_numbers_of_the_bodies(cuda_library: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    for path, feeds in graphs(tmp_path, dtype):
        native = GraphSession.open(path, provider="cuda", operator=cuda_library)
        bodies = GraphSession.open(path, provider="cuda", operator=None)
        assert native.native is not None
        assert bodies.native is None
        expected = bodies.run(feeds)
        for name, got in native.run(feeds).items():
            np.testing.assert_allclose(
                got.astype(np.float64), expected[name].astype(np.float64), rtol=0, atol=BODY_ROUNDINGS * UNIT[dtype]
            )


def test_native_kernels_are_recorded_in_a_cuda_graph(cuda_library: Path, tmp_path: Path) -> None:
    for path, feeds in graphs(tmp_path, torch.float16):
        plain = GraphSession.open(path, provider="cuda", operator=cuda_library)
        recording = GraphSession.open(path, provider="cuda", operator=cuda_library, cuda_graph=True)
        assert recording.native is not None
        on_device = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
        bound = recording.bind(on_device)
        bound.run()
        on_device["x"].mul_(0.5)
        torch.cuda.synchronize()
        replayed = bound.run()
        for name, expected in plain.run({**feeds, "x": feeds["x"] * np.float16(0.5)}).items():
            np.testing.assert_array_equal(replayed[name].numpy(), expected)
