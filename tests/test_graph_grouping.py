"""Reflections that share an input as one node: the same numbers to the bit, and every reader still understands them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import launches
from hra_export.adapter import HraAdapter
from hra_export.errors import GraphError, MismatchError
from hra_export.graph import operator
from hra_export.graph.adapter_file import adapter_parameters, write_adapter_file
from hra_export.graph.codes import holds_reflections
from hra_export.graph.document import MAX_OPSET, MIN_OPSET, open_graph, save_graph
from hra_export.graph.finishing import Finished, finish_
from hra_export.graph.forms import lower_
from hra_export.graph.grouped_operator import declare_used_, function, is_group, is_operator, members
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.options import GraphOptions
from hra_export.graph.reflections import reflection_sites
from hra_export.graph.regrouping import group_, ungroup_
from hra_export.graph.session import GraphSession
from hra_export.graph.soundness import check_graph
from hra_export.graph.swapping import make_row_swappable_, make_swappable_, read_contract
from hra_export.householder import compact_wy
from tests.graph_text import Array, graph

D = 24
HEADER = '<ir_version: 10, opset_import: ["" : {opset}, "hra" : 1]>'
RANKS = (2, 0, 3, 1, 8, 17, 5, 4)
ULP: dict[object, float] = {np.float32: 2.0**-24, np.float16: 2.0**-11}
# x U, the product with V and the sum round once each, x, U and V once before; sums of D terms grow as √D.
ROUNDINGS = 6 * D**0.5
SHAPES: dict[str, tuple[tuple[int | str, ...], tuple[int, ...]]] = {
    "1-D": ((), ()),
    "2-D": (("n",), (5,)),
    "3-D": (("b", "t"), (2, 3)),
    "4-D": ((2, "b", "t"), (2, 1, 3)),
}
Dense = NDArray[np.float64]


def vectors(rank: int, seed: int, d: int = D) -> Dense:
    return np.random.default_rng(seed).standard_normal((d, rank))


def factors(u: Dense, dtype: Any = np.float32) -> tuple[Array, Array]:
    """U and V of a chain; of no reflection, empty ones."""
    if u.shape[1] == 0:
        return np.zeros(u.shape, dtype), np.zeros(u.shape[::-1], dtype)
    left, right = operator.operands([compact_wy(torch.from_numpy(u))], torch.float64)
    return left.numpy().astype(dtype), right.numpy().astype(dtype)


def explicit(x: Array, u: Dense) -> Dense:
    """x Rᵀ in float64, reflection by reflection: R = H_1 … H_r, so that rows of x meet H_r first."""
    y = x.astype(np.float64)
    for each in u.T[::-1]:
        y = y - np.multiply.outer(y @ each, 2 * each / (each @ each))
    return y


def siblings(
    ranks: Sequence[int],
    *,
    lead: Sequence[int | str] = ("b", "t"),
    dtype: Any = np.float32,
    opset: int = 20,
) -> ir.Model:
    """x with a reflection of each rank, every one an output `y0`, `y1`, …; of targets `t0`, `t1`, …; opaque."""
    kind = {np.float32: "float", np.float16: "float16", ml_dtypes.bfloat16: "bfloat16"}[dtype]
    sizes = ", ".join(map(str, (*lead, D)))
    body = "\n".join(f"y{i} = hra.HouseholderReflection (x, u{i}, v{i})" for i in range(len(ranks)))
    outputs = ", ".join(f"{kind}[{sizes}] y{i}" for i in range(len(ranks)))
    tensors: dict[str, Array] = {}
    for i, rank in enumerate(ranks):
        tensors[f"u{i}"], tensors[f"v{i}"] = factors(vectors(rank, i), dtype)
    header = HEADER.format(opset=opset)
    model = graph(f"g ({kind}[{sizes}] x) => ({outputs}) {{ {body} }}", tensors, header=header)
    return named_(model)


def named_(model: ir.Model) -> ir.Model:
    """Initializers `u0` and `v0` become `t0.hra_U` and `t0.hra_V`, and nodes are named after them."""
    for name, value in list(model.graph.initializers.items()):
        if name[0] in "uv" and name[1:].isdigit():
            value.name = f"t{name[1:]}.hra_{name[0].upper()}"
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for each in members(node):
            node.name = f"{each.target}/hra"
    return model


def stored(model: ir.Model, folder: Path, name: str = "model") -> Path:
    """The model with its bodies in a file, which ONNX's checker has taken."""
    declare_used_(model)
    save_graph(model, folder, name)
    check_graph(folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def run(path: Path, feeds: Mapping[str, Array], *, optimized: bool = False, inlined: Path | None = None) -> list[Array]:
    """The outputs in ONNX Runtime; the graph as it ran goes to `inlined`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if inlined is not None:
        options.optimized_model_filepath = str(inlined)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, dict(feeds))
    return outputs


def evaluated(path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs in ONNX's own evaluator."""
    outputs: list[Array] = onnx.reference.ReferenceEvaluator(onnx.load(path)).run(None, dict(feeds))  # type: ignore[assignment]  # tensors all
    return outputs


def relative(got: Array, expected: Dense) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def batch(lead: Sequence[int], dtype: Any = np.float32, seed: int = 9) -> Array:
    x: Array = np.random.default_rng(seed).standard_normal((*lead, D)).astype(dtype)
    return x


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# ------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize(
    ("count", "opset"), [*((3, opset) for opset in range(MIN_OPSET, MAX_OPSET + 1)), (2, 20), (8, 17), (8, 25)]
)
def test_a_group_is_its_chains_at_every_opset(tmp_path: Path, count: int, opset: int) -> None:
    model = siblings(RANKS[:count], opset=opset)
    assert group_(model) == 1
    assert kinds(model) == [f"HouseholderReflectionGroup{count}"]
    path, x = stored(model, tmp_path), batch((2, 3))
    results = [run(path, {"x": x}), run(path, {"x": x}, optimized=True), evaluated(path, {"x": x})]
    for outputs in results:
        for i, (got, rank) in enumerate(zip(outputs, RANKS[:count], strict=True)):
            assert relative(got, explicit(x, vectors(rank, i))) < ROUNDINGS * ULP[np.float32]
            assert rank or np.array_equal(got, x)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_takes_any_number_of_axes(tmp_path: Path, shape: str, dtype: Any) -> None:
    lead, sizes = SHAPES[shape]
    model = siblings((2, 3, 1), lead=lead, dtype=dtype)
    group_(model)
    path, x = stored(model, tmp_path), batch(sizes, dtype)
    for i, got in enumerate(run(path, {"x": x}, optimized=True)):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert relative(got, explicit(x, vectors((2, 3, 1)[i], i))) < ROUNDINGS * ULP[dtype]


def test_a_group_of_bfloat16_is_sound(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 product on the CPU."""
    model = siblings(RANKS[:3], dtype=ml_dtypes.bfloat16)
    group_(model)
    onnx.shape_inference.infer_shapes(onnx.load(stored(model, tmp_path)), strict_mode=True)


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
@pytest.mark.parametrize("optimized", [False, True])
def test_the_runtime_makes_the_same_graph_of_grouped_and_single_nodes(
    tmp_path: Path, optimized: bool, rows: bool
) -> None:
    feeds: dict[str, Array] = {"x": batch((3, 2))}
    outputs, graphs = [], []
    for name in ("single", "grouped"):
        model = siblings(RANKS)
        if rows:
            rows_of_(model, 8)
            feeds["adapter_index"] = np.array([2, 0, 1])
        if name == "grouped":
            group_(model)
        path, inlined = stored(model, tmp_path, name), tmp_path / f"{name}.inlined.onnx"
        outputs.append(run(path, feeds, optimized=optimized, inlined=inlined))
        graphs.append(onnx.load(inlined, load_external_data=False).graph.node)
    single, grouped = (Counter((node.domain, node.op_type) for node in nodes) for nodes in graphs)
    assert single == grouped
    assert not any(domain == "hra" for domain, _ in single)
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


def rows_of_(model: ir.Model, count: int) -> None:
    """Rows of the batch name their adapters, of which there are two besides the base."""
    adapters = [
        HraAdapter({f"t{i}": torch.from_numpy(vectors(1 + i % 3, 100 * a + i)) for i in range(count)}, 3)
        for a in range(2)
    ]
    make_row_swappable_(model, default=[[adapter] for adapter in adapters])


def test_rows_of_a_group_are_reflected_by_their_own_adapters(tmp_path: Path) -> None:
    model = siblings(RANKS[:4])
    rows_of_(model, 4)
    group_(model)
    assert kinds(model) == ["HouseholderReflectionRowsGroup4"]
    x, index = batch((5, 3)), np.array([1, 0, 2, 2, 1])
    path = stored(model, tmp_path)
    for outputs in (run(path, {"x": x, "adapter_index": index}), evaluated(path, {"x": x, "adapter_index": index})):
        for i, got in enumerate(outputs):
            for row, adapter in enumerate(index):
                expected = x[row] if adapter == 0 else explicit(x[row], vectors(1 + i % 3, 100 * (adapter - 1) + i))
                assert relative(got[row], expected.astype(np.float64)) < ROUNDINGS * ULP[np.float32]


@pytest.mark.parametrize("shape", ["2-D", "3-D", "4-D"])
def test_rows_are_grouped_whatever_their_rank(tmp_path: Path, shape: str) -> None:
    lead: tuple[int | str, ...] = {"2-D": ("b",), "3-D": ("b", "t"), "4-D": ("b", "h", "w")}[shape]
    outputs = []
    for grouped in (False, True):
        model = siblings(RANKS[:3], lead=lead)
        rows_of_(model, 3)
        if grouped:
            assert group_(model) == 1
        feeds = {"x": batch((3, 2, 2)[: len(lead)]), "adapter_index": np.array([2, 0, 1])}
        outputs.append(run(stored(model, tmp_path, f"m{grouped}"), feeds))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_bodies_are_those_of_single_nodes() -> None:
    whole, rows = (function(f"HouseholderReflection{kind}Group2", 21) for kind in ("", "Rows"))
    assert [value.name for value in (*whole.inputs, *whole.outputs)] == ["X", "U_1", "V_1", "U_2", "V_2", "Y_1", "Y_2"]
    assert [node.op_type for node in whole] == ["MatMul", "MatMul", "Add"] * 2
    assert [value.name for value in rows.inputs] == ["X", "A", "U_1", "V_1", "U_2", "V_2"]
    assert [node.op_type for node in rows] == ["Gather", "Gather", "MatMul", "MatMul", "Add"] * 2
    assert dict(whole.graph.opset_imports) == {"": 21}


# ------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [2]), (8, [8]), (9, [4, 5]), (16, [8, 8]), (17, [5, 6, 6]), (25, [6, 6, 6, 7])]
)
def test_more_than_eight_become_several_of_one_size(tmp_path: Path, count: int, sizes: list[int]) -> None:
    model = siblings([1 + i % 3 for i in range(count)])
    assert group_(model) == sum(size > 1 for size in sizes)
    assert [len(members(node)) for node in model.graph] == sizes
    x = batch((1, 2))
    for i, got in enumerate(run(stored(model, tmp_path), {"x": x})):
        assert relative(got, explicit(x, vectors(1 + i % 3, i))) < ROUNDINGS * ULP[np.float32]


BRANCHES = """
g (float[b, 24] x, bool c) => (float[b, 24] z)
{
    a0 = hra.HouseholderReflection (x, u0, v0)
    h = Relu (a0)
    a1 = hra.HouseholderReflection (h, u1, v1)
    w = Tanh (a1)
    a2 = hra.HouseholderReflection (h, u2, v2)
    s = If (c) <
        then_branch = t () => (float[b, 24] p)
        {
            b3 = hra.HouseholderReflection (h, u3, v3)
            b4 = hra.HouseholderReflection (x, u4, v4)
            b5 = hra.HouseholderReflection (h, u5, v5)
            q = Add (b3, b4)
            p = Add (q, b5)
        },
        else_branch = e () => (float[b, 24] p)
        {
            b6 = hra.HouseholderReflection (h, u6, v6)
            p = Mul (b6, b6)
        }
    >
    m = Mul (w, a2)
    z = Add (m, s)
}
"""


def branches() -> ir.Model:
    tensors = {}
    for i in range(7):
        tensors[f"u{i}"], tensors[f"v{i}"] = factors(vectors(1 + i, i))
    return named_(graph(BRANCHES, tensors, header=HEADER.format(opset=20)))


def groups_of(model: ir.Model) -> list[tuple[str, ...]]:
    """The targets of each joint node, in order of their names; subgraphs included."""
    nodes = filter(is_group, ir.traversal.RecursiveGraphIterator(model.graph))
    return [tuple(sorted(each.target for each in members(node))) for node in nodes]


@pytest.mark.parametrize("chosen", [True, False])
def test_each_graph_groups_its_own_readers_of_one_value(tmp_path: Path, chosen: bool) -> None:
    single, grouped = branches(), branches()
    assert group_(grouped) == 2
    assert groups_of(grouped) == [("t1", "t2"), ("t3", "t5")]
    assert kinds(grouped)[:4] == [*("HouseholderReflection", "Relu", "HouseholderReflectionGroup2", "Tanh")]
    feeds = {"x": batch((3,)), "c": np.array(chosen)}
    one, other = (run(stored(model, tmp_path, f"m{i}"), feeds)[0] for i, model in enumerate((single, grouped)))
    np.testing.assert_array_equal(one, other)


def test_factors_that_the_graph_computes_stay_alone(tmp_path: Path) -> None:
    """V of the second one is not there yet where the first one stands."""
    text = """
    g (float[b, 24] x) => (float[b, 24] y0, float[b, 24] y1, float[b, 24] y2)
    {
        y0 = hra.HouseholderReflection (x, u0, v0)
        minus = Neg (y0)
        n = Neg (v1)
        y1 = hra.HouseholderReflection (minus, u1, n)
        y2 = hra.HouseholderReflection (minus, u2, v2)
    }
    """
    tensors = {}
    for i in range(3):
        tensors[f"u{i}"], tensors[f"v{i}"] = factors(vectors(2, i))
    model = graph(text, tensors, header=HEADER.format(opset=20))
    assert group_(model) == 0
    run(stored(model, tmp_path), {"x": batch((3,))})


def test_rows_that_are_told_by_other_indices_stay_apart(tmp_path: Path) -> None:
    text = """
    g (float[b, t, 24] x, int64[b] a, int64[b] c) => (float[b, t, 24] y0, float[b, t, 24] y1, float[b, t, 24] y2)
    {
        y0 = hra.HouseholderReflectionRows (x, a, u0, v0)
        y1 = hra.HouseholderReflectionRows (x, c, u1, v1)
        y2 = hra.HouseholderReflectionRows (x, a, u2, v2)
    }
    """
    tensors: dict[str, Array] = {}
    for i in range(3):
        tensors[f"u{i}"], tensors[f"v{i}"] = (each[None] for each in factors(vectors(2, i)))
    model = named_(graph(text, tensors, header=HEADER.format(opset=20)))
    assert group_(model) == 1
    assert groups_of(model) == [("t0", "t2")]
    run(stored(model, tmp_path), {"x": batch((2, 3)), "a": np.zeros(2, np.int64), "c": np.zeros(2, np.int64)})


def test_names_types_and_metadata_stay() -> None:
    model = siblings(RANKS[:3])
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 't0', 'linear']"
    before = [(value.name, value.type, value.shape) for value in model.graph.outputs]
    group_(model)
    (node,) = model.graph
    assert node.name == "t0/hra_and_2_more"
    assert node.metadata_props == {"pkg.torch.onnx.name_scopes": "['', 't0', 'linear']"}
    assert [(value.name, value.type, value.shape) for value in node.outputs] == before
    assert list(node.outputs) == list(model.graph.outputs)
    assert [value.name for value in node.inputs if value] == [
        *("x", "t0.hra_U", "t0.hra_V", "t1.hra_U", "t1.hra_V", "t2.hra_U", "t2.hra_V")
    ]


def test_opaque_nodes_stay_opaque_and_bodies_follow_the_nodes() -> None:
    model = siblings(RANKS[:3])
    group_(model)
    assert not model.functions
    declare_used_(model)
    assert [name for _, name, _ in model.functions] == ["HouseholderReflectionGroup3"]
    ungroup_(model)
    assert [name for _, name, _ in model.functions] == ["HouseholderReflection"]
    group_(model)
    assert [name for _, name, _ in model.functions] == ["HouseholderReflectionGroup3"]


def test_ungrouping_gives_back_the_single_nodes(tmp_path: Path) -> None:
    model, again = branches(), branches()
    group_(again)
    again = open_graph(stored(again, tmp_path))
    ungroup_(again)
    nodes, same = ({str(node.name): node for node in each.graph if is_operator(node)} for each in (model, again))
    assert same.keys() == nodes.keys()
    assert not groups_of(again)
    feeds = {"x": batch((3,)), "c": np.array(True)}
    one, other = (run(stored(each, tmp_path, f"m{i}"), feeds)[0] for i, each in enumerate((model, again)))
    np.testing.assert_array_equal(one, other)


def test_ungrouping_numbers_a_target_that_stands_in_several_places() -> None:
    model = siblings(RANKS[:2])
    first, second = model.graph
    second.replace_input_with(1, first.inputs[1])
    second.replace_input_with(2, first.inputs[2])
    group_(model)
    ungroup_(model)
    assert [node.name for node in model.graph] == ["t0/hra", "t0/hra.2"]


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs_compute_the_same_to_the_bit(tmp_path: Path, seed: int) -> None:
    """Sums of reflections of earlier sums, in any order."""
    random = np.random.default_rng(seed)
    lines, names = [], ["x"]
    tensors: dict[str, Array] = {}
    for i in range(30):
        tensors[f"u{i}"], tensors[f"v{i}"] = factors(vectors(int(random.integers(0, 9)), 40 * seed + i))
        read, other = (names[int(random.integers(max(0, len(names) - 3), len(names)))] for _ in range(2))
        lines += [f"r{i} = hra.HouseholderReflection ({read}, u{i}, v{i})"]
        if i % 3 == 2:
            lines += [f"p{i} = Add (r{i}, r{i - 1})", f"s{i} = Sub (p{i}, {other})"]
            names.append(f"s{i}")
    text = f"g (float[b, 24] x) => (float[b, 24] {names[-1]}) {{ {' '.join(lines)} }}"
    single, grouped = (named_(graph(text, tensors, header=HEADER.format(opset=20))) for _ in range(2))
    assert group_(grouped) >= 1
    feeds = {"x": batch((3,))}
    first, second = (run(stored(model, tmp_path, f"m{i}"), feeds)[0] for i, model in enumerate((single, grouped)))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


# ------------------------------------------------------------------------------------------- what reads such graphs


def layer(*targets: str) -> ir.Model:
    """A product for each target, all of one x (b, t, d)."""
    body = " ".join(f'"{target}/out" = MatMul (x, "{target}.weight")' for target in targets)
    outputs = ", ".join(f'float[b, t, 6] "{target}/out"' for target in targets)
    weights = {f"{target}.weight": vectors(6, i).astype(np.float32) / 5 for i, target in enumerate(targets)}
    header = '<ir_version: 10, opset_import: ["" : 20]>'
    return graph(f"g (float[b, t, 24] x) => ({outputs}) {{ {body} }}", weights, header=header)


def adapter_of(*targets: str, rank: int = 2, seed: int = 0) -> HraAdapter:
    return HraAdapter({each: torch.from_numpy(vectors(rank, seed + i)) for i, each in enumerate(targets)}, rank)


def finished(model: ir.Model, adapter: HraAdapter, **options: Any) -> Finished:
    chosen = GraphOptions(mode="reflect", **options)
    return finish_(model, [adapter], chosen, family="encoder", properties={}, blocks={}, renamed={})


def answers(adapter: HraAdapter, *targets: str) -> dict[str, Dense]:
    x = batch((2, 3))
    found = {}
    for i, target in enumerate(targets):
        y = explicit(x, adapter.chains[target].numpy()) if target in adapter.chains else x.astype(np.float64)
        found[f"{target}/out"] = y @ (vectors(6, i).astype(np.float32) / np.float32(5)).astype(np.float64)
    return found


def assert_answers(path: Path, expected: Mapping[str, Dense], **chosen: Any) -> None:
    got = GraphSession.open(path, threads=1).run({"x": batch((2, 3))}, **chosen)
    for name, value in expected.items():
        assert relative(got[name], value) < 2 * ROUNDINGS * ULP[np.float32]  # and the layer's own product


QKV = ("q", "k", "v")


def test_finished_graphs_are_grouped(tmp_path: Path) -> None:
    model, adapter = layer(*QKV), adapter_of(*QKV)
    insert_reflections_(model, [adapter])
    report = finished(model, adapter)
    assert kinds(model) == ["HouseholderReflectionGroup3", "MatMul", "MatMul", "MatMul"]
    assert report.reflections == dict.fromkeys(QKV, 2)
    assert report.nodes == 4
    assert_answers(stored(model, tmp_path), answers(adapter, *QKV))


def test_finished_graphs_of_plain_operators_have_no_groups() -> None:
    model, adapter = layer(*QKV), adapter_of(*QKV)
    insert_reflections_(model, [adapter])
    finished(model, adapter, plain_ops=True)
    assert not any(node.domain == "hra" for node in model.graph)
    assert not model.functions


def test_finished_graphs_in_half_precision_are_grouped() -> None:
    model, adapter = layer(*QKV), adapter_of(*QKV)
    insert_reflections_(model, [adapter])
    finished(model, adapter, precision="fp16")
    (node,) = filter(is_group, model.graph)
    assert {each.u.dtype for each in members(node)} == {ir.DataType.FLOAT16}
    assert {each.y.dtype for each in members(node)} == {ir.DataType.FLOAT16}


def reopened(model: ir.Model, folder: Path) -> ir.Model:
    return open_graph(stored(model, folder, "reopened"))


def grouped_layer(*targets: str) -> tuple[ir.Model, HraAdapter]:
    model, adapter = layer(*targets), adapter_of(*targets)
    insert_reflections_(model, [adapter])
    group_(model)
    return model, adapter


def test_readers_see_every_reflection_of_a_group(tmp_path: Path) -> None:
    model = reopened(grouped_layer(*QKV)[0], tmp_path)
    found = reflection_sites(model)
    assert {(target, each.rank, each.dtype, each.form) for target, each in found.items()} == {
        (target, 2, ir.DataType.FLOAT, "front") for target in QKV
    }
    assert holds_reflections(model)
    for value in list(model.graph.initializers.values()):
        value.name = f"{value.name}.of.a.user"
    assert holds_reflections(model)


def test_grouped_files_can_be_lowered(tmp_path: Path) -> None:
    model, adapter = grouped_layer(*QKV)
    model = reopened(model, tmp_path)
    assert lower_(model, "add") == dict.fromkeys(QKV, "add")
    assert kinds(model) == ["MatMul", "MatMul", "Add"] * 3 + ["MatMul"] * 3
    assert "hra" not in model.graph.opset_imports
    assert_answers(stored(model, tmp_path), answers(adapter, *QKV))


def test_a_second_adapter_joins_the_group(tmp_path: Path) -> None:
    model, adapter = layer(*QKV), adapter_of("q", "v")
    insert_reflections_(model, [adapter])
    finished(model, adapter)
    model = reopened(model, tmp_path)
    second = adapter_of("k", seed=7)
    insert_reflections_(model, [second])
    report = finished(model, second)
    assert groups_of(model) == [("k", "q", "v")]
    assert report.reflections == dict.fromkeys(QKV, 2)
    assert [name for _, name, _ in model.functions] == ["HouseholderReflectionGroup3"]
    both = HraAdapter({**adapter.chains, **second.chains}, 2)
    assert_answers(stored(model, tmp_path), answers(both, *QKV))


def test_a_reflected_product_is_refused_though_it_is_grouped(tmp_path: Path) -> None:
    model = reopened(grouped_layer(*QKV)[0], tmp_path)
    with pytest.raises(MismatchError, match="the graph has a reflection of this name already"):
        insert_reflections_(model, [adapter_of("k")])
    for value in list(model.graph.initializers.values()):
        if str(value.name).startswith("k.hra"):
            value.name = str(value.name).replace("k.hra", "other.hra")
    with pytest.raises(MismatchError, match="reflected already"):
        insert_reflections_(model, [adapter_of("k")])


@pytest.mark.parametrize("grouped_first", [False, True])
def test_groups_can_be_swapped(tmp_path: Path, grouped_first: bool) -> None:
    """Whatever came first; by a session of ours, and by the runtime's own adapters."""
    model = grouped_layer(*QKV)[0] if grouped_first else layer(*QKV)
    if not grouped_first:
        insert_reflections_(model, [adapter_of(*QKV)])
    contract = make_swappable_(model)
    group_(model)
    assert groups_of(model) == [tuple(sorted(QKV))]
    path = stored(model, tmp_path)
    assert read_contract(open_graph(path)) == contract
    adapter, base = adapter_of("q", "v", rank=5, seed=3), HraAdapter({}, 1)
    file, _ = write_adapter_file(tmp_path / "a.onnx_adapter", [adapter], contract)
    session = GraphSession.open(path, threads=1)
    session.load_adapter("a", file)
    runtime_s = onnxruntime.LoraAdapter()
    runtime_s.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(runtime_s)
    x = batch((2, 3))
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    own = dict(zip([f"{each}/out" for each in QKV], plain.run(None, {"x": x}, options), strict=True))
    for got, expected in (
        (session.run({"x": x}), answers(base, *QKV)),
        (session.run({"x": x}, adapter="a"), answers(adapter, *QKV)),
        (session.bind({"x": x}, adapter="a").run(), answers(adapter, *QKV)),
        (own, answers(adapter, *QKV)),
    ):
        for name, value in expected.items():
            assert relative(np.asarray(got[name]), value) < 2 * ROUNDINGS * ULP[np.float32]


def test_groups_become_reflections_of_rows(tmp_path: Path) -> None:
    model, _ = grouped_layer(*QKV)
    model = reopened(model, tmp_path)
    contract = make_row_swappable_(model)
    group_(model)
    assert kinds(model)[0] == "HouseholderReflectionRowsGroup3"
    assert [name for _, name, _ in model.functions] == ["HouseholderReflectionRowsGroup3"]
    session = GraphSession.open(stored(model, tmp_path), threads=1)
    adapter = adapter_of(*QKV, rank=3, seed=5)
    session.add_adapter("a", adapter_parameters([adapter], contract))
    got = session.run({"x": batch((2, 3))}, adapters=[None, "a"])
    whole, base = answers(adapter, *QKV), answers(HraAdapter({}, 1), *QKV)
    for name, value in got.items():
        for row, expected in enumerate((base, whole)):
            assert relative(value[row], expected[name][row]) < 2 * ROUNDINGS * ULP[np.float32]


def test_a_group_without_its_body_is_not_sound(tmp_path: Path) -> None:
    model, _ = grouped_layer(*QKV)
    operator.declare_(model)  # the single operator's body is no help
    save_graph(model, tmp_path)
    with pytest.raises(GraphError, match="does not define") as caught:
        check_graph(tmp_path / "model.onnx")
    assert caught.value.findings == ("HouseholderReflectionGroup3",)


def test_a_group_with_missing_inputs_is_refused() -> None:
    x, u, v = (ir.Value(name=name) for name in "xuv")
    for inputs, outputs in (([x, u, v], 2), ([x, u, v, u], 2), ([x, u, v, u, None], 2), ([x, u, v, u, v], 1)):
        node = ir.node("HouseholderReflectionGroup2", inputs, domain="hra", num_outputs=outputs, name="a/hra")
        with pytest.raises(GraphError, match="`a/hra`: HouseholderReflectionGroup2 has"):
            members(node)


@pytest.mark.parametrize("name", ["HouseholderReflectionGroup", "HouseholderReflectionGroup1", "MatMul"])
def test_other_operators_are_none_of_ours(name: str) -> None:
    values = [ir.Value(name=f"i{i}") for i in range(5)]
    node = ir.node(name, values, domain="hra", num_outputs=2)
    assert not is_operator(node)
    assert members(node) == ()
    for count in (2, 8):
        mine = ir.node(f"HouseholderReflectionGroup{count}", values, domain="other", num_outputs=count)
        assert not is_operator(mine)


@pytest.mark.slow
def test_launches_of_a_layer_are_counted(tmp_path: Path) -> None:
    """Of seven products, one attention, two norms, an activation and its product; three nodes more for each site."""
    assert launches.count("fp32", None, tmp_path, ("merged", "inlined")) == {"merged": 12, "inlined": 33}
