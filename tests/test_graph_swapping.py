"""Adapters as inputs: one for a run or one for each row, from files that fit the graph or are refused."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hra_export import attach
from hra_export.adapter import HraAdapter
from hra_export.errors import FormatError, GraphError, MismatchError, OutputError, UnsupportedModelError
from hra_export.graph import operator, runtime
from hra_export.graph.adapter_file import (
    adapter_parameters,
    parameters_digest,
    read_adapter_file,
    stack_operands,
    version_of,
    write_adapter_file,
)
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import graph_specs
from hra_export.graph.rows import is_row_reflection, lower_rows_
from hra_export.graph.session import GraphSession
from hra_export.graph.swapping import make_row_swappable_, make_swappable_, weights_fingerprint
from hra_export.graph.tracing import make_traceable_
from tests import tiny_models

EFFECT_FP32 = 1e-4  # the project's bar for fp32 graphs; what is seen is 1e-6
# fp16 rounds U, V, both products and the sum: four roundings of 2⁻¹¹ on values of the size of X.
ATOL_FP16 = 4 * 2**-11 * 4
TARGETS = {"first": 8, "second": 6}
OPSET = 20

Float = NDArray[np.floating[Any]]


# ------------------------------------------------------------------------------------------- graphs by hand


def chains(rank: int, seed: int, targets: Mapping[str, int] = TARGETS) -> HraAdapter:
    """Random chains, which are far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    return HraAdapter({target: torch.randn(d, rank, generator=generator) for target, d in targets.items()}, rank)


def weights() -> tuple[Float, Float]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((8, 6)) / 3, generator.standard_normal((6, 5)) / 3


def two_layers(shape: Sequence[int | str] = ("b", "t", 8), dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """x → first → (8, 6) → second → (6, 5), with reflections of rank 1 that are still opaque."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    value, nodes, initializers = x, [], []
    for (target, d), weight in zip(TARGETS.items(), weights(), strict=True):
        constants = {}
        for name, array in ((f"{target}.weight", weight), (f"{target}.hra_U", np.ones((d, 1)))):
            constants[name] = array.astype(dtype.numpy())
        constants[f"{target}.hra_V"] = np.ones((1, d), dtype.numpy())
        made = [
            ir.Value(
                name=name,
                type=ir.TensorType(dtype),
                shape=ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
            for name, array in constants.items()
        ]
        initializers += made
        product, u, v = made
        reflection = operator.node(value, u, v, name=f"{target}/hra")
        matmul = ir.node("MatMul", [reflection.outputs[0], product], name=f"{target}/MatMul")
        (value,) = matmul.outputs
        value.name, value.type = f"{target}/out", x.type
        value.shape = ir.Shape([*shape[:-1], weight.shape[1]])
        nodes += [reflection, matmul]
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name="two")
    return ir.Model(graph, ir_version=10)


def lowered(model: ir.Model) -> ir.Model:
    """With MatMul, MatMul, Add in place of the operator."""
    for node in [node for node in model.graph if operator.is_reflection(node)]:
        x, u, v = node.inputs
        first = ir.node("MatMul", [x, u], name=f"{node.name}/U")
        assert x is not None
        assert x.shape is not None
        first.outputs[0].type, first.outputs[0].shape = x.type, ir.Shape([*tuple(x.shape)[:-1], 1])
        second = ir.node("MatMul", [first.outputs[0], v], name=f"{node.name}/V")
        total = ir.node("Add", [x, second.outputs[0]], name=f"{node.name}/Add")
        old, new = node.outputs[0], total.outputs[0]
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [first, second, total], [old], [new])
    return model


def expected(x: Float, *adapters: HraAdapter) -> Float:
    """x through both layers, each weight times the explicit chain, in float64."""
    value = x.astype(np.float64)
    for target, weight in zip(TARGETS, weights(), strict=True):
        rotation = np.eye(TARGETS[target])
        for adapter in adapters:
            if target in adapter.chains:
                rotation = rotation @ explicit_chain(adapter.chains[target].double())
        value = value @ rotation.T @ weight
    return value


def explicit_chain(u: Tensor) -> Float:
    """H_1 H_2 … H_r, each as a matrix."""
    result = torch.eye(len(u), dtype=u.dtype)
    for column in u.T:
        result = result @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(column, column) / column.dot(column))
    return result.numpy()


def saved(model: ir.Model, path: Path) -> Path:
    """The graph with its operator's body, checked in full."""
    if any(operator.is_reflection(node) for node in model.graph):
        operator.declare_(model)
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def x_of(*shape: int, dtype: Any = np.float32) -> Float:
    return np.random.default_rng(3).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("is_lowered", [False, True], ids=["operator", "plain"])
@pytest.mark.parametrize("optimize", [False, True])
def test_make_swappable_serves_adapters_of_any_rank(tmp_path: Path, is_lowered: bool, optimize: bool) -> None:
    model = lowered(two_layers()) if is_lowered else two_layers()
    make_swappable_(model)
    session = GraphSession.open(saved(model, tmp_path / "model.onnx"), optimize=optimize, threads=1)
    x = x_of(2, 3, 8)
    assert session.contract is not None
    for rank in (1, 2, 6):
        adapter = chains(rank, rank)
        session.add_adapter("a", adapter_parameters([adapter], session.contract))
        np.testing.assert_allclose(
            session.run({"x": x}, adapter="a")["second/out"], expected(x, adapter), rtol=0, atol=1e-5
        )
    np.testing.assert_allclose(session.run({"x": x})["second/out"], expected(x), rtol=0, atol=1e-5)


def test_make_swappable_default_is_the_base_to_the_bit(tmp_path: Path) -> None:
    base = two_layers()
    for node in [node for node in base.graph if operator.is_reflection(node)]:
        x_in = node.inputs[0]
        assert x_in is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], x_in)
        base.graph.remove(node, safe=True)
    x = x_of(2, 3, 8)
    plain = GraphSession.open(saved(base, tmp_path / "base.onnx"), threads=1).run({"x": x})["second/out"]
    for rank in (0, 1):
        for make in (make_swappable_, make_row_swappable_):
            model = two_layers()
            make(model, base_rank=rank)
            session = GraphSession.open(saved(model, tmp_path / "model.onnx"), threads=1)
            np.testing.assert_array_equal(session.run({"x": x})["second/out"], plain)


def test_make_swappable_default_may_be_adapters(tmp_path: Path) -> None:
    """Composed in the order of W R_1 R_2, which does not commute."""
    first, second = chains(2, 1), chains(4, 2)
    model = two_layers()
    make_swappable_(model, default=[first, second])
    x = x_of(1, 4, 8)
    result = GraphSession.open(saved(model, tmp_path / "model.onnx"), threads=1).run({"x": x})["second/out"]
    np.testing.assert_allclose(result, expected(x, first, second), rtol=0, atol=1e-5)
    assert np.abs(expected(x, first, second) - expected(x, second, first)).max() > 0.1


def test_make_swappable_declares_inputs_and_metadata(tmp_path: Path) -> None:
    model = two_layers()
    contract = make_swappable_(model, baked=[replace(chains(2, 1), parameters={"head.bias": torch.ones(3)})])
    session = GraphSession.open(saved(model, tmp_path / "model.onnx"), threads=1)
    assert session.contract == contract
    assert session.swapping == "adapter"
    assert [spec.name for spec in session.inputs] == ["x"]
    assert {spec.name: spec.shape for spec in session.optional} == {
        "first.hra_U": (8, "first.rank"),
        "first.hra_V": ("first.rank", 8),
        "second.hra_U": (6, "second.rank"),
        "second.hra_V": ("second.rank", 6),
    }
    assert contract.baked


def test_make_swappable_holds_in_float16(tmp_path: Path) -> None:
    x = x_of(2, 3, 8, dtype=np.float16)
    adapters = [chains(2, 1), chains(6, 2)]
    for make in (make_swappable_, make_row_swappable_):
        model = two_layers(dtype=ir.DataType.FLOAT16)
        contract = make(model)
        session = GraphSession.open(saved(model, tmp_path / "model.onnx"), threads=1)
        for number, adapter in enumerate(adapters):
            path, _ = write_adapter_file(tmp_path / f"{number}.onnx_adapter", [adapter], contract)
            session.load_adapter(str(number), path)
        for number, adapter in enumerate(adapters):
            result = session.run({"x": x}, adapter=str(number))["second/out"]
            assert result.dtype == np.float16
            np.testing.assert_allclose(result, expected(x, adapter), rtol=0, atol=ATOL_FP16)


def test_bfloat16_operands_keep_their_type(tmp_path: Path) -> None:
    """No kernel of the CPU multiplies them, so the graph is not run."""
    model = two_layers(dtype=ir.DataType.BFLOAT16)
    contract = make_swappable_(model)
    path, _ = write_adapter_file(tmp_path / "a.onnx_adapter", [chains(2, 1)], contract)
    stored = read_adapter_file(path)
    stored.check(contract)
    u = stored.parameters["first.hra_U"]
    exact = adapter_parameters([chains(2, 1)], replace_dtype(contract, "float64"))["first.hra_U"]
    assert u.dtype == ir.DataType.BFLOAT16.numpy()
    np.testing.assert_allclose(u.astype(np.float64), exact, rtol=2**-8)  # one rounding


def replace_dtype(contract: Any, dtype: str) -> Any:
    return replace(contract, sites=tuple(replace(site, dtype=dtype) for site in contract.sites))


@pytest.mark.parametrize("make", [make_swappable_, make_row_swappable_])
def test_make_swappable_refuses_graphs_without_places(make: Any) -> None:
    model = two_layers()
    make(model)
    with pytest.raises(GraphError, match="swappable already"):
        make(model)
    model = two_layers()
    model.graph.initializers["first.hra_U"].name = "other"
    with pytest.raises(GraphError, match="first/hra"):
        make(model)
    with pytest.raises(GraphError, match="no reflection"):
        make(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}), ir_version=10))


def test_make_swappable_refuses_convolutions() -> None:
    model = two_layers()
    name = "conv1.hra_A"
    model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(np.ones((1, 2, 3, 3)), name=name)))
    with pytest.raises(UnsupportedModelError, match="conv1"):
        make_swappable_(model)


@pytest.mark.parametrize(
    ("scopes", "table", "node", "expected_rows"),
    [
        ("['', 'embed', 'embed.base_layer']", "lm_head.weight", "node_embedding", True),
        ("['', 'other']", "embed.weight", "node_embedding", False),
        (None, "embed.weight", "gather", True),
        (None, "lm_head.weight", "/embed/Gather", True),
    ],
)
def test_contract_says_which_chains_rotate_looked_up_rows(
    scopes: str | None, table: str, node: str, expected_rows: bool
) -> None:
    assert make_swappable_(lookup(scopes, table, node)).sites[0].embedding is expected_rows


def test_contract_is_refused_when_a_lookup_has_no_name_to_go_by() -> None:
    with pytest.raises(GraphError, match="cannot be told"):
        make_swappable_(lookup(None, "val_3", "node_7"))


def lookup(scopes: str | None, table: str, name: str) -> ir.Model:
    """ids → Gather → Mul → the reflection of `embed`."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "t"]))
    arrays = {table: np.ones((9, 4)), "embed.hra_U": np.ones((4, 1)), "embed.hra_V": np.ones((1, 4)), "s": np.ones(1)}
    values = [
        ir.Value(name=key, const_value=ir.tensor(array.astype(np.float32), name=key)) for key, array in arrays.items()
    ]
    gather = ir.node("Gather", [values[0], ids], name=name)
    if scopes is not None:
        gather.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    scaled = ir.node("Mul", [gather.outputs[0], values[3]])
    made = operator.node(scaled.outputs[0], values[1], values[2], name="embed/hra")
    graph = ir.Graph(
        [ids], made.outputs, nodes=[gather, scaled, made], initializers=values, opset_imports={"": OPSET}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def test_weights_fingerprint_sees_every_weight_and_no_chain() -> None:
    model = two_layers()
    before = weights_fingerprint(model)
    make_swappable_(model, default=[chains(4, 1)])
    assert weights_fingerprint(model) == before
    value = model.graph.initializers["second.weight"]
    assert value.const_value is not None
    changed = value.const_value.numpy().copy()
    changed[0, 0] += 2**-10
    value.const_value = ir.tensor(changed, name="second.weight")
    assert weights_fingerprint(model) != before


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("shape", [("b", "t", 8), ("b", 8), ("b", "h", "w", 8)], ids=["3", "2", "4"])
@pytest.mark.parametrize("is_plain", [False, True], ids=["operator", "plain"])
def test_make_row_swappable_gives_each_row_its_adapter(
    tmp_path: Path, shape: tuple[int | str, ...], is_plain: bool
) -> None:
    model = two_layers(shape)
    contract = make_row_swappable_(model)
    if is_plain:
        lower_rows_(model)
    session = GraphSession.open(saved(model, tmp_path / "rows.onnx"), threads=1)
    adapters = {"a": chains(1, 1), "b": chains(6, 2), "c": chains(2, 3, {"second": 6})}
    for name, adapter in adapters.items():
        path, _ = write_adapter_file(tmp_path / f"{name}.onnx_adapter", [adapter], contract)
        session.load_adapter(name, path)
    x = x_of(*[{"b": 5, "t": 3, "h": 2, "w": 3}.get(str(size), 8) for size in shape])
    names = ["b", None, "a", "c", "b"]
    result = session.run({"x": x}, adapters=names)["second/out"]
    bound = session.bind({"x": x}, adapters=names).run()["second/out"].numpy()
    for row, chosen_name in enumerate(names):
        chosen = [] if chosen_name is None else [adapters[chosen_name]]
        np.testing.assert_allclose(result[row], expected(x[row], *chosen), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(bound, result)


def test_make_row_swappable_keeps_the_seam_for_a_kernel() -> None:
    model = two_layers()
    make_row_swappable_(model)
    nodes = [node for node in model.graph if is_row_reflection(node)]
    assert [node.name for node in nodes] == ["first/hra", "second/hra"]
    assert [value.name for value in nodes[0].inputs if value] == ["x", "adapter_index", "first.hra_U", "first.hra_V"]
    (body,) = model.functions.values()
    assert [node.op_type for node in body] == ["Gather", "Gather", "MatMul", "MatMul", "Add"]


def test_make_row_swappable_defaults_are_numbered_from_one(tmp_path: Path) -> None:
    adapters = [chains(1, 1), chains(3, 2)]
    model = two_layers()
    make_row_swappable_(model, default=[[adapters[0]], [adapters[1], adapters[0]]])
    session = GraphSession.open(saved(model, tmp_path / "rows.onnx"), threads=1)
    x = x_of(3, 2, 8)
    result = session.run({"x": x, "adapter_index": [2, 0, 1]})["second/out"]
    for row, chosen in enumerate([[adapters[1], adapters[0]], [], [adapters[0]]]):
        np.testing.assert_allclose(result[row], expected(x[row], *chosen), rtol=0, atol=1e-5)


def test_stack_operands_may_be_fed_directly(tmp_path: Path) -> None:
    adapters = [chains(1, 1), chains(3, 2)]
    model = two_layers()
    contract = make_row_swappable_(model)
    stacked = stack_operands([[adapter] for adapter in adapters], contract)
    assert stacked["first.hra_U"].shape == (3, 8, 3)
    assert not stacked["first.hra_U"][0].any()
    assert not stacked["first.hra_V"][1, 1:].any()
    session = GraphSession.open(saved(model, tmp_path / "rows.onnx"), threads=1)
    x = x_of(2, 2, 8)
    result = session.run({"x": x, "adapter_index": [2, 1], **stacked})["second/out"]
    np.testing.assert_allclose(result[0], expected(x[0], adapters[1]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(result[1], expected(x[1], adapters[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "found"),
    [(("t", "b", 8), "expected X"), ((8,), "rank 2, 3 or 4"), (("b", 1, 2, 3, 8), "rank 2, 3 or 4")],
)
def test_make_row_swappable_refuses_an_x_without_the_batch(shape: tuple[int | str, ...], found: str) -> None:
    with pytest.raises(GraphError, match=found) as caught:
        make_row_swappable_(two_layers(shape), batch="b")
    assert len(caught.value.findings) == len(TARGETS)


def test_make_row_swappable_refuses_an_x_of_unknown_shape() -> None:
    model = two_layers()
    model.graph.node("first/hra").outputs[0].shape = None
    model.graph.node("first/MatMul").outputs[0].shape = None
    with pytest.raises(GraphError, match="second/hra: the shape of X is not known"):
        make_row_swappable_(model)


def test_make_row_swappable_refuses_a_graph_that_is_taken_apart() -> None:
    with pytest.raises(GraphError, match="taken apart"):
        make_row_swappable_(lowered(two_layers()))


def test_run_checks_the_names_of_rows(tmp_path: Path) -> None:
    model = two_layers()
    contract = make_row_swappable_(model)
    session = GraphSession.open(saved(model, tmp_path / "rows.onnx"), threads=1)
    session.add_adapter("a", adapter_parameters([chains(2, 1)], contract))
    feeds = {"x": x_of(2, 3, 8)}
    with pytest.raises(ValueError, match="expected 2 names, one for each row, got 1"):
        session.run(feeds, adapters=["a"])  # the products would broadcast it
    with pytest.raises(ValueError, match="unknown adapters: `b`; loaded: `a`"):
        session.run(feeds, adapters=["a", "b"])
    with pytest.raises(ValueError, match="expected 0 to 1, got 0 to 2"):
        session.run({**feeds, "adapter_index": np.array([0, 2])})
    with pytest.raises(ValueError, match="give one of them"):
        session.run(feeds, adapter="a", adapters=["a", None])
    with pytest.raises(ValueError, match="fed as well: adapter_index"):
        session.run({**feeds, "adapter_index": [0, 0]}, adapters=["a", None])


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def swappable(tmp_path: Path) -> GraphSession:
    model = two_layers()
    make_swappable_(model)
    return GraphSession.open(saved(model, tmp_path / "model.onnx"), threads=1)


def test_adapter_file_is_complete_and_says_what_it_is(tmp_path: Path, swappable: GraphSession) -> None:
    assert swappable.contract is not None
    adapter = chains(2, 1, {"second": 6})
    path, beside = write_adapter_file(tmp_path / "a.onnx_adapter", [adapter], swappable.contract)
    stored = read_adapter_file(path)
    assert {name: array.shape for name, array in stored.parameters.items()} == {
        "first.hra_U": (8, 0),
        "first.hra_V": (0, 8),
        "second.hra_U": (6, 2),
        "second.hra_V": (2, 6),
    }
    described = json.loads(beside.read_text())
    assert described["fingerprint"] == swappable.contract.fingerprint
    assert described["ranks"] == {"first": 0, "second": 2}
    assert stored.model_version == version_of(swappable.contract.fingerprint)
    again, _ = write_adapter_file(tmp_path / "b.onnx_adapter", [adapter], swappable.contract)
    assert again.read_bytes() == path.read_bytes()
    backwards = dict(reversed(list(stored.parameters.items())))
    versions = {"adapter": stored.adapter_version, "model": stored.model_version}
    runtime.write_adapter_format(again, backwards, **versions)
    assert again.read_bytes() == path.read_bytes()
    other, _ = write_adapter_file(tmp_path / "c.onnx_adapter", [chains(2, 7)], swappable.contract)
    assert read_adapter_file(other).adapter_version != stored.adapter_version


def test_adapter_file_works_in_the_runtime_itself(tmp_path: Path, swappable: GraphSession) -> None:
    """With a target of rank 0 among its places."""
    assert swappable.contract is not None
    adapter = chains(2, 1, {"second": 6})
    path, _ = write_adapter_file(tmp_path / "a.onnx_adapter", [adapter], swappable.contract)
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(path))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    x = x_of(2, 3, 8)
    session = onnxruntime.InferenceSession(swappable.path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x}, options)
    np.testing.assert_allclose(result, expected(x, adapter), rtol=0, atol=1e-5)


def test_load_adapter_refuses_a_partial_file_that_the_runtime_takes(tmp_path: Path, swappable: GraphSession) -> None:
    assert swappable.contract is not None
    parameters = adapter_parameters([chains(2, 1)], swappable.contract)
    del parameters["first.hra_U"], parameters["first.hra_V"]
    path = tmp_path / "partial.onnx_adapter"
    version = version_of(swappable.contract.fingerprint)
    runtime.write_adapter_format(path, parameters, adapter=1, model=version)
    onnxruntime.LoraAdapter().Load(str(path))
    with pytest.raises(MismatchError) as caught:
        swappable.load_adapter("a", path)
    assert caught.value.findings == ("first.hra_U: missing", "first.hra_V: missing")
    assert swappable.adapters == ()


def test_load_adapter_refuses_a_file_of_another_graph(tmp_path: Path, swappable: GraphSession) -> None:
    other = two_layers()
    value = other.graph.initializers["first.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 2, name="first.weight")
    path, beside = write_adapter_file(tmp_path / "a.onnx_adapter", [chains(2, 1)], make_swappable_(other))
    for _ in range(2):
        with pytest.raises(MismatchError, match="was made for another graph"):
            swappable.load_adapter("a", path)
        beside.unlink(missing_ok=True)  # its model version alone is enough


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"first.hra_U": np.zeros((8, 2))}, "first.hra_U: expected float32, got float64"),
        ({"first.hra_U": np.zeros((8, 3), np.float32)}, "first: expected U (8, r) and V (r, 8), got (8, 3) and (2, 8)"),
        ({"first.hra_U": np.zeros((7, 2), np.float32)}, "first: expected U (8, r) and V (r, 8), got (7, 2) and (2, 8)"),
        ({"first.hra_U": np.zeros(8, np.float32)}, "first: expected U (8, r) and V (r, 8), got (8,) and (2, 8)"),
        ({"third.hra_U": np.zeros((8, 2), np.float32)}, "third.hra_U: the graph has no such input"),
    ],
)
def test_add_adapter_refuses_what_does_not_fit(swappable: GraphSession, change: dict[str, Float], found: str) -> None:
    assert swappable.contract is not None
    parameters = adapter_parameters([chains(2, 1)], swappable.contract)
    with pytest.raises(MismatchError) as caught:
        swappable.add_adapter("a", {**parameters, **change})
    assert caught.value.findings == (found,)


def test_read_adapter_file_refuses_what_is_damaged(tmp_path: Path, swappable: GraphSession) -> None:
    assert swappable.contract is not None
    path, beside = write_adapter_file(tmp_path / "a.onnx_adapter", [chains(2, 1)], swappable.contract)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-9] ^= 1  # inside a tensor, where the format has no check of its own
    path.write_bytes(flipped)
    with pytest.raises(FormatError, match="is not the file"):
        read_adapter_file(path)
    beside.unlink()
    for damaged in (data[: len(data) // 2], b"", b"no adapter"):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="not an adapter file"):
            read_adapter_file(path)
    with pytest.raises(OutputError):
        read_adapter_file(tmp_path / "missing.onnx_adapter")
    with pytest.raises(ValueError, match="ends in"):
        write_adapter_file(tmp_path / "a.bin", [], swappable.contract)


def test_write_adapter_file_refuses_an_adapter_that_does_not_fit(tmp_path: Path, swappable: GraphSession) -> None:
    assert swappable.contract is not None
    adapter = replace(chains(2, 1, {"first": 7, "second": 6, "third": 5}), parameters={"head.weight": torch.ones(2, 2)})
    with pytest.raises(MismatchError) as caught:
        write_adapter_file(tmp_path / "a.onnx_adapter", [adapter], swappable.contract)
    assert caught.value.findings == (
        "first: expected 8 rows of U, got 7",
        "third: no such place in the graph",
        "parameters beside the chains are not those in the graph: head.weight",
    )
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_write_adapter_file_takes_adapters_with_the_parameters_of_the_graph(tmp_path: Path) -> None:
    head = {"head.weight": torch.randn(3, 3, dtype=torch.bfloat16), "head.bias": torch.zeros(3)}
    first, second = (replace(chains(2, seed), parameters=dict(head)) for seed in (1, 2))
    contract = make_swappable_(two_layers(), baked=[first])
    write_adapter_file(tmp_path / "a.onnx_adapter", [second], contract)
    head["head.bias"] = torch.tensor([0, 0, 1e-6])
    with pytest.raises(MismatchError, match=r"head\.bias, head\.weight"):
        write_adapter_file(tmp_path / "b.onnx_adapter", [replace(second, parameters=head)], contract)
    assert parameters_digest([]) == parameters_digest([chains(2, 1)]) == ""


def test_session_names_and_forgets_adapters(swappable: GraphSession) -> None:
    assert swappable.contract is not None
    x = x_of(1, 2, 8)
    adapters = {"a": chains(2, 1), "b": chains(4, 2)}
    for name, adapter in adapters.items():
        swappable.add_adapter(name, adapter_parameters([adapter], swappable.contract))
    assert swappable.adapters == ("a", "b")
    swappable.unload_adapter("a")
    with pytest.raises(ValueError, match="unknown adapters: `a`; loaded: `b`"):
        swappable.run({"x": x}, adapter="a")
    with pytest.raises(ValueError, match="one adapter for all rows"):
        swappable.run({"x": x}, adapters=["b"])
    with pytest.raises(ValueError, match="unknown adapters: `c`"):
        swappable.unload_adapter("c")
    result = swappable.run({"x": x}, adapter="b")["second/out"]
    np.testing.assert_allclose(result, expected(x, adapters["b"]), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- exported models


@dataclass(frozen=True)
class Scene:
    """A model's swappable graph in a session, adapters loaded from files, and what PyTorch computes with each.

    Attributes:
        rows: the same graph in its other form.
        reference: adapter, or None for the base → scores.
    """

    session: GraphSession
    rows: GraphSession
    feeds: Mapping[str, Float]
    output: str
    reference: Mapping[str | None, Float]

    def effect_error(self, result: Float, name: str) -> float:
        """How far the adapter's effect is from the reference's, relative to that."""
        wanted = self.reference[name] - self.reference[None]
        got = result - self.session.run(self.feeds)[self.output]
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module", params=["bert", "llama-tied"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_models.build(request.param)
    widths = {path: module.in_features for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if request.param == "llama-tied":  # looked-up rows see R where layers see Rᵀ
        del widths["lm_head"]
        widths["model.embed_tokens"] = 32
    some = {path: width for number, (path, width) in enumerate(widths.items()) if number % 2}
    adapters = {"r8": chains(8, 1, widths), "r32": chains(32, 2, widths), "some": chains(2, 3, some)}
    inputs = {"input_ids": torch.randint(4, tiny_models.VOCABULARY, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    reference: dict[str | None, Float] = {None: scores(model, inputs)}
    for name, adapter in adapters.items():
        attachment = attach(model, adapter)
        reference[name] = scores(model, inputs)
        attachment.detach()
    make_traceable_(attach(model, chains(1, 0, widths)))
    (spec,) = graph_specs(model)
    exported = export_graph(spec)
    sessions = []
    for make in (make_swappable_, make_row_swappable_):
        graph = exported.clone()
        contract = make(graph)
        graph.ir_version = 10
        session = GraphSession.open(saved(graph, folder / f"{make.__name__}.onnx"), threads=1)
        for name, adapter in adapters.items():
            path, _ = write_adapter_file(folder / f"{name}.onnx_adapter", [adapter], contract)
            session.load_adapter(name, path)
        sessions.append(session)
    return Scene(sessions[0], sessions[1], feeds_of(sessions[0], inputs), "logits", reference)


def scores(model: nn.Module, inputs: dict[str, Tensor]) -> Float:
    with torch.no_grad():
        return tiny_models.scores(model(**inputs)).numpy()


def feeds_of(session: GraphSession, inputs: dict[str, Tensor]) -> dict[str, Float]:
    """The inputs, and those that transformers makes itself: positions, token types, a cache that is empty."""
    batch, tokens = inputs["input_ids"].shape
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    for spec in session.inputs:
        if spec.name == "position_ids":
            feeds[spec.name] = np.tile(np.arange(tokens), (batch, 1))
        elif spec.name == "token_type_ids":
            feeds[spec.name] = np.zeros((batch, tokens), np.int64)
        elif spec.name not in feeds:
            _, heads, _, width = spec.shape
            feeds[spec.name] = np.zeros((batch, int(heads or 0), 0, int(width or 0)), spec.dtype)
    return feeds


@pytest.mark.parametrize("name", ["r8", "r32", "some"])
def test_one_session_serves_every_adapter_of_a_model(scene: Scene, name: str) -> None:
    result = scene.session.run(scene.feeds, adapter=name)[scene.output]
    assert scene.effect_error(result, name) <= EFFECT_FP32


def test_default_of_a_model_is_its_base(scene: Scene) -> None:
    result = scene.session.run(scene.feeds)[scene.output]
    np.testing.assert_allclose(result, scene.reference[None], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scene.rows.run(scene.feeds)[scene.output], result)


def test_io_binding_honours_adapters(scene: Scene) -> None:
    """The runtime's own active adapters are ignored under IO binding, without a word."""
    for name in ("r8", "some", "r32"):
        bound = scene.session.bind(scene.feeds, adapter=name, outputs=[scene.output])
        for _ in range(2):
            result = bound.run()[scene.output].numpy()
            np.testing.assert_array_equal(result, scene.session.run(scene.feeds, adapter=name)[scene.output])


def test_threads_with_different_adapters_do_not_mix(scene: Scene) -> None:
    names = [None, "r8", "r32", "some"]
    alone = {name: scene.session.run(scene.feeds, adapter=name)[scene.output] for name in names}

    def once(number: int) -> bool:
        name = names[number % len(names)]
        return np.array_equal(scene.session.run(scene.feeds, adapter=name)[scene.output], alone[name])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(once, range(24)))


def test_each_row_of_a_batch_has_its_adapter(scene: Scene) -> None:
    for names in (["r32", None, "some"], ["some", "r8", "r8"]):
        result = scene.rows.run(scene.feeds, adapters=names)[scene.output]
        for row, name in enumerate(names):
            if name is None:
                np.testing.assert_allclose(result[row], scene.reference[None][row], rtol=0, atol=1e-6)
                continue
            wanted = scene.reference[name][row] - scene.reference[None][row]
            got = result[row] - scene.reference[None][row]
            assert np.linalg.norm(got - wanted) <= EFFECT_FP32 * np.linalg.norm(wanted)
