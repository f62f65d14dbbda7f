"""Sessions: the provider that was asked for or none, feeds that fit or none, runs and bound runs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser

from hra_export.errors import DeviceError, GraphError, UnsupportedModelError
from hra_export.graph import runtime
from hra_export.graph.providers import AssignedNode, fallen_back
from hra_export.graph.session import GraphSession, available_providers

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HEADER = '<ir_version: 10, opset_import: ["": 20]>'
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the provider starts where there is a GPU")

PRODUCT = """
product (float[b, 3] x, float scale) => (float[b, 3] y, float[b, 3] twice) {
    y = Mul (x, scale)
    twice = Add (y, y)
}
"""

# What decoders do before the first layer: a table, positions and a mask from the size of the input, a product.
LOOKUP = """
lookup (int64[b, t] input_ids, int64[b, t] attention_mask) => (float[b, t, 8] y)
<float[40, 8] table, float[8, 8] weight>
{
    [shape] sizes = Shape (input_ids)
    one = Constant <value = int64 {1}> ()
    zero = Constant <value = int64 {0}> ()
    [length] length = Gather (sizes, one)
    [positions] positions = Range (zero, length, one)
    [mask] kept = Cast <to = 1> (attention_mask)
    [embed] hidden = Gather (table, input_ids)
    axis = Constant <value = int64[1] {2}> ()
    [wide] wide = Unsqueeze (kept, axis)
    [masked] masked = Mul (hidden, wide)
    [project] y = MatMul (masked, weight)
}
"""


def written(text: str, path: Path) -> Path:
    """A graph from its text, weights counted up."""
    model = parser.parse_model(HEADER + text)
    for info in [value for value in model.graph.value_info if value.name in ("table", "weight")]:
        sizes = [size.dim_value for size in info.type.tensor_type.shape.dim]
        numbers = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers, info.name))
    onnx.save(model, path)
    return path


@pytest.fixture
def product(tmp_path: Path) -> GraphSession:
    return GraphSession.open(written(PRODUCT, tmp_path / "product.onnx"), threads=1)


def test_open_takes_a_directory_with_a_model(tmp_path: Path) -> None:
    written(PRODUCT, tmp_path / "model.onnx")
    session = GraphSession.open(tmp_path, threads=1)
    assert [str(spec) for spec in session.inputs] == ["float32 (b, 3)", "float32 ()"]
    assert [spec.name for spec in session.outputs] == ["y", "twice"]
    assert session.provider == "cpu"
    assert session.swapping is None


def test_open_without_optimization_runs_nodes_as_they_stand(tmp_path: Path) -> None:
    text = "g (float[3] x) => (float[3] y) { a = Identity (x) b = Neg (a) y = Identity (b) }"
    path = written(text, tmp_path / "identity.onnx")
    assert [node.op_type for node in GraphSession.open(path, threads=1).nodes] == ["Neg"]
    assert len(GraphSession.open(path, optimize=False, threads=1).nodes) == 3


def test_open_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no such model file"):
        GraphSession.open(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(GraphError, match="Protobuf parsing failed"):
        GraphSession.open(tmp_path)


def test_open_refuses_an_operator_that_nobody_knows(tmp_path: Path) -> None:
    text = "g (float[3] x) => (float[3] y) { y = Sing (x) }"
    with pytest.raises(GraphError, match="Sing"):
        GraphSession.open(written(text, tmp_path / "sing.onnx"))


def test_open_says_when_the_provider_has_no_kernel_for_a_type(tmp_path: Path) -> None:
    text = "g (bfloat16[2, 2] x) => (bfloat16[2, 2] y) { y = MatMul (x, x) }"
    with pytest.raises(UnsupportedModelError, match="MatMul"):
        GraphSession.open(written(text, tmp_path / "half.onnx"))


@without_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_open_refuses_a_provider_that_cannot_start(
    tmp_path: Path, provider: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError) as caught:
        GraphSession.open(written(PRODUCT, tmp_path / "product.onnx"), provider=provider)
    assert caught.value.exit_code == 7
    assert capfd.readouterr().out == ""  # the runtime's Python prints before it falls back; stdout carries results


def test_open_refuses_a_provider_that_the_build_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(DeviceError, match="is not in this build"):
        GraphSession.open(written(PRODUCT, tmp_path / "product.onnx"), provider="cuda")
    assert available_providers() == (CPU,)


class OnCuda:
    """A session of the CPU that says it has the CUDA provider."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]


def test_open_refuses_compute_nodes_that_fell_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[..., Any] = runtime.make_session
    monkeypatch.setattr(runtime, "make_session", lambda file, _, **options: OnCuda(make(file, "cpu", **options)))
    placed = {"embed": CUDA, "masked": CUDA, "project": CPU, "wide": CUDA}
    nodes = [AssignedNode(name, "", provider) for name, provider in placed.items()]
    monkeypatch.setattr(runtime, "assigned_nodes", lambda session: nodes)
    with pytest.raises(DeviceError) as caught:
        GraphSession.open(written(LOOKUP, tmp_path / "lookup.onnx"), provider="cuda", threads=1)
    assert caught.value.message.endswith("1 of 4 nodes fall back from `CUDAExecutionProvider`")
    assert len(caught.value.findings) == 1
    assert "`project`" in caught.value.findings[0]


def test_open_refuses_a_session_that_does_not_say_what_ran_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., Any] = runtime.make_session
    monkeypatch.setattr(runtime, "make_session", lambda file, _, **options: OnCuda(make(file, "cpu", **options)))
    monkeypatch.setattr(runtime, "assigned_nodes", lambda session: [])
    with pytest.raises(DeviceError, match="does not say"):
        GraphSession.open(written(LOOKUP, tmp_path / "lookup.onnx"), provider="cuda", threads=1)


@pytest.mark.parametrize(
    ("name", "kind", "falls_back"),
    [
        ("shape", "Shape", False),
        ("length", "Gather", False),
        ("positions", "Range", False),
        ("mask", "Cast", False),
        ("embed", "Gather", True),
        ("masked", "Mul", True),
        ("project", "MatMul", True),
        ("renamed by the runtime", "Range", False),
        ("renamed by the runtime", "Gather", True),  # one of them is a lookup of weights
        ("renamed by the runtime", "FusedMatMul", True),
    ],
)
def test_fallen_back_lets_shapes_and_masks_stay_on_the_cpu(
    tmp_path: Path, name: str, kind: str, falls_back: bool
) -> None:
    path = written(LOOKUP, tmp_path / "lookup.onnx")
    assert bool(fallen_back([AssignedNode(name, kind, CPU)], "cuda", path)) is falls_back


BRANCH = """
branch (float[b, 8] x, bool once) => (float[b, 8] y) <float[16, 8] table>
{
    [shape] sizes = Shape (x)
    [branch] y = If (once) <
        then_branch = one () => (float[b, 8] a) { [inner] a = Neg (x) },
        else_branch = two () => (float[b, 8] c) { [sizes] n = Neg (sizes) [filled] c = ConstantOfShape (n) }
    >
}
"""


@pytest.mark.parametrize(
    ("name", "kind", "falls_back"),
    [("inner", "Neg", True), ("sizes", "Neg", False), ("filled", "ConstantOfShape", False), ("branch", "If", True)],
)
def test_fallen_back_looks_into_branches(tmp_path: Path, name: str, kind: str, falls_back: bool) -> None:
    path = written(BRANCH, tmp_path / "branch.onnx")
    assert bool(fallen_back([AssignedNode(name, kind, CPU)], "cuda", path)) is falls_back


def test_fallen_back_reports_any_other_provider(tmp_path: Path) -> None:
    node = AssignedNode("shape", "Shape", CUDA)
    assert fallen_back([node], "tensorrt", tmp_path) == [f"Shape `shape`: {CUDA}"]
    assert fallen_back([node], "cuda", tmp_path) == []


def test_run_gives_outputs_by_name(product: GraphSession) -> None:
    x = np.ones((2, 3), np.float32)
    assert list(product.run({"x": x, "scale": np.float32(3)})) == ["y", "twice"]
    (only,) = product.run({"x": x, "scale": np.array(3, np.float32)}, outputs=["twice"]).values()
    np.testing.assert_array_equal(only, 6 * x)


def test_run_keeps_a_scalar_a_scalar(tmp_path: Path) -> None:
    session = GraphSession.open(written("g (float x) => (float y) { y = Neg (x) }", tmp_path / "neg.onnx"), threads=1)
    assert session.run({"x": 2.0 * np.ones((), np.float32)})["y"].shape == ()


def test_run_reports_every_feed_that_does_not_fit(product: GraphSession) -> None:
    with pytest.raises(ValueError, match="inputs that do not fit") as caught:
        product.run({"x": np.ones((2, 4)), "y": np.ones(1, np.float32)})
    for part in ("`scale`: missing", "`x`: expected float32 (b, 3), got float64 (2, 4)", "`y`: the graph has no such"):
        assert part in str(caught.value)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (2, 4)])
def test_run_refuses_another_rank_or_size(product: GraphSession, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \(b, 3\)"):
        product.run({"x": np.ones(shape, np.float32), "scale": np.float32(1)})


def test_run_refuses_outputs_and_adapters_that_are_not_there(product: GraphSession) -> None:
    feeds = {"x": np.ones((1, 3), np.float32), "scale": np.float32(1)}
    with pytest.raises(ValueError, match="unknown outputs: z; the graph has y, twice"):
        product.run(feeds, outputs=["z"])
    with pytest.raises(ValueError, match="takes none"):
        product.run(feeds, adapter="a")
    with pytest.raises(ValueError, match="takes no adapters"):
        product.add_adapter("a", {})


def test_run_turns_what_the_runtime_raises_into_our_error(tmp_path: Path) -> None:
    text = "g (float[b] x, float[c] y) => (float[d] z) { z = Add (x, y) }"
    session = GraphSession.open(written(text, tmp_path / "add.onnx"), threads=1)
    with pytest.raises(GraphError, match="broadcast"):
        session.run({"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)})


def test_run_takes_and_gives_bfloat16(tmp_path: Path) -> None:
    text = "g (bfloat16[n] x) => (float[n] y, bfloat16[n] z) { y = Cast <to = 1> (x) z = Cast <to = 16> (y) }"
    session = GraphSession.open(written(text, tmp_path / "cast.onnx"), threads=1)
    x = np.array([1.0, -2.5, 3.0], ir.DataType.BFLOAT16.numpy())
    for feed in (x, torch.tensor([1.0, -2.5, 3.0], dtype=torch.bfloat16)):
        result = session.run({"x": feed})
        np.testing.assert_array_equal(result["y"], [1.0, -2.5, 3.0])
        assert result["z"].dtype == x.dtype
        np.testing.assert_array_equal(result["z"], x)


def test_run_takes_bool_and_half_tensors_of_torch(tmp_path: Path) -> None:
    text = "g (bool[n] x, float16[n] h) => (bool[n] y, float16[n] z) { y = Not (x) z = Neg (h) }"
    session = GraphSession.open(written(text, tmp_path / "not.onnx"), threads=1)
    result = session.run({"x": torch.tensor([True, False]), "h": torch.tensor([1.0, 2.0], requires_grad=True).half()})
    assert result["y"].tolist() == [False, True]
    assert result["z"].tolist() == [-1, -2]


def test_open_refuses_options_that_make_no_sense(tmp_path: Path) -> None:
    path = written(PRODUCT, tmp_path / "product.onnx")
    unknown: Any = "CPUExecutionProvider"
    with pytest.raises(ValueError, match="expected one of cpu, cuda, tensorrt"):
        GraphSession.open(path, provider=unknown)
    with pytest.raises(ValueError, match="cuda_graph"):
        GraphSession.open(path, cuda_graph=True)


def test_run_from_several_threads(product: GraphSession) -> None:
    def once(number: int) -> float:
        x = np.full((1, 3), number, np.float32)
        return float(product.run({"x": x, "scale": np.float32(2)})["y"][0, 0])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(once, range(60))) == [2 * number for number in range(60)]


def test_bind_reads_and_writes_where_the_tensors_are(product: GraphSession) -> None:
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    bound = product.bind({"x": x, "scale": np.float32(2)}, outputs=["y"]).into({"y": y})
    bound.run()
    assert y.eq(2).all()
    x.fill_(5)
    bound.run()
    assert y.eq(10).all()


def test_bind_takes_other_feeds_later(product: GraphSession) -> None:
    bound = product.bind({"scale": np.float32(2)})
    with pytest.raises(ValueError, match="`x`: missing"):
        bound.run()
    for rows in (1, 4):
        result = bound.feed({"x": np.ones((rows, 3), np.float32)}).run()
        np.testing.assert_array_equal(result["twice"].numpy(), np.full((rows, 3), 4, np.float32))


def test_bind_refuses_what_does_not_fit(product: GraphSession) -> None:
    bound = product.bind({"scale": np.float32(2), "x": np.ones((1, 3), np.float32)}, outputs=["y"])
    with pytest.raises(ValueError, match="expected float32"):
        bound.feed({"x": np.ones((1, 3))})
    with pytest.raises(ValueError, match="`twice`: the graph has no such"):
        bound.into({"twice": np.ones((1, 3), np.float32)})
