"""Every plain form of the reflection computes the explicit chain, with the operators it promises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from hra_export import householder
from hra_export.graph import operator
from hra_export.graph.document import save_graph
from hra_export.graph.forms import Form, lower_

Array = NDArray[Any]
D, O, R = 160, 20, 4  # noqa: E741  out_features, as everywhere
FORMS: tuple[Form, ...] = get_args(Form)
SHAPES: dict[str, tuple[int | str, ...]] = {"2-D": ("n",), "3-D": ("b", "t"), "4-D": (2, "b", "t")}
ROWS = {"2-D": (5,), "3-D": (2, 3), "4-D": (2, 1, 3)}
# Largest error relative to the largest output: a few roundings of the products, over 160 terms each.
TOLERANCE = {ir.DataType.FLOAT: 2e-6, ir.DataType.FLOAT16: 4e-3}


@dataclass
class Scene:
    """A graph in the making: every target is one reflection of x and one product with its output.

    Attributes:
        expected: output → weight (d, o) and vectors, or None for what is only reflected.
    """

    lead: tuple[int | str, ...] = SHAPES["3-D"]
    dtype: ir.DataType = ir.DataType.FLOAT
    expected: dict[str, tuple[Array, Array, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(self.dtype), shape=ir.Shape((*self.lead, D)))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="made")
        self.model = ir.Model(self.graph, ir_version=10)
        self._random = np.random.default_rng(0)

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer, floats rounded to the scene's type."""
        array = array.astype(self.dtype.numpy()) if array.dtype == np.float64 else array
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def reflection(self, target: str, *, rank: int = R, vectors: Array | None = None) -> tuple[ir.Value, Array]:
        """The reflected x, and the chain's vectors (d, r)."""
        if vectors is None:
            vectors = self._random.standard_normal((D, rank))
        u, v = operator.operands([householder.compact_wy(torch.from_numpy(vectors))], torch.float64)
        operands = self.constant(f"{target}.hra_U", u.numpy()), self.constant(f"{target}.hra_V", v.numpy())
        node = operator.node(self.x, *operands, name=f"{target}/hra")
        self.graph.append(node)
        return node.outputs[0], vectors

    def product(self, y: ir.Value, target: str, vectors: Array, *, kind: str = "MatMul", **attributes: Any) -> ir.Node:
        """A product with a weight of its own, whose output is one of the graph's."""
        weight = self._random.standard_normal((D, O)) / D**0.5
        rounded = weight.astype(self.dtype.numpy()).astype(np.float64)
        if kind == "MatMulNBits":
            node, rounded = self._block_product(y, target)
        else:
            stored = self.constant(f"{target}.weight", weight.T.copy() if attributes.get("transB") else weight)
            bias = [self.constant(f"{target}.bias", np.zeros(O))] if kind == "Gemm" else []
            node = ir.node(kind, [y, stored, *bias], attributes, name=f"{target}/{kind}")
        output = node.outputs[0]
        output.name, output.type = f"{target}_output", ir.TensorType(self.dtype)
        output.shape = ir.Shape((*self.lead, O))
        self.graph.append(node)
        self.graph.outputs.append(output)
        self.expected[f"{target}_output"] = (rounded, vectors, attributes.get("alpha", 1.0))
        return node

    def target(self, target: str, **options: Any) -> ir.Node:
        """A reflection and its product."""
        y, vectors = self.reflection(target)
        return self.product(y, target, vectors, **options)

    def _block_product(self, y: ir.Value, target: str) -> tuple[ir.Node, Array]:
        """MatMulNBits, 4 bits, blocks of 32, symmetric around 8; and its matrix (d, o)."""
        codes = self._random.integers(0, 16, (O, D // 32, 32), np.uint8)
        scales = self._random.uniform(0.01, 0.02, (O, D // 32)).astype(self.dtype.numpy())
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        inputs = [y, self.constant(f"{target}.qweight", packed), self.constant(f"{target}.scales", scales)]
        sizes = {"K": D, "N": O, "bits": 4, "block_size": 32}
        node = ir.node("MatMulNBits", inputs, sizes, domain="com.microsoft", name=f"{target}/MatMulNBits")
        matrix = (codes.astype(np.float64) - 8) * scales[..., None].astype(np.float64)
        return node, matrix.reshape(O, D).T


def siblings(scene: Scene, *names: str, **options: Any) -> Scene:
    """Targets that share x."""
    for name in names:
        scene.target(name, **options)
    return scene


def explicit(x: Array, vectors: Array) -> Array:
    """x Rᵀ in float64, reflection by reflection: R = H_1 … H_r, so that rows of x meet H_r first."""
    for u in vectors.T[::-1]:
        x = x - np.outer(x @ u, 2 * u / (u @ u)).reshape(x.shape)
    return x


def run(model: ir.Model, x: Array, *, optimized: bool = False, path: Path | None = None) -> dict[str, Array]:
    """Every output on ONNX Runtime's CPU provider, from a file where one is named."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    source = str(path) if path else ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def batch(scene: Scene, rows: Sequence[int] = ROWS["3-D"]) -> Array:
    return np.random.default_rng(1).standard_normal((*rows, D)).astype(scene.dtype.numpy())


def assert_right(scene: Scene, x: Array, got: Mapping[str, Array]) -> None:
    exact = x.astype(np.float64)
    for name, (weight, vectors, scale) in scene.expected.items():
        wanted = scale * (explicit(exact.reshape(-1, D), vectors) @ weight).reshape(*x.shape[:-1], O)
        error = np.abs(got[name].astype(np.float64) - wanted).max() / np.abs(wanted).max()
        assert error <= TOLERANCE[scene.dtype], f"{name}: {error:.1e}"
        unreflected = scale * (exact.reshape(-1, D) @ weight).reshape(wanted.shape)
        assert np.abs(unreflected - wanted).max() > 0.1 * np.abs(wanted).max()  # an identity would pass otherwise


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


REFLECTED = ["MatMul", "MatMul", "Add"]
# Operators of two siblings, 3-D x, MatMuls behind.
OPERATORS: dict[Form, list[str]] = {
    "add": [*REFLECTED, "MatMul"] * 2,
    "sub": ["MatMul", "MatMul", "Sub", "MatMul"] * 2,
    "gemm": [*REFLECTED, "MatMul"] * 2,  # not two-dimensional
    "grouped": ["MatMul", *["MatMul", "Add", "MatMul"] * 2],
    "output": ["MatMul", "MatMul", "MatMul", "Add"] * 2,
    "output-grouped": ["MatMul", *["MatMul", "MatMul", "Add"] * 2],
    "packed": ["MatMul", "Split", "MatMul", "Add"] * 2,
    "augmented": ["MatMul", "Concat", "MatMul", "MatMul"],
}


@pytest.mark.parametrize("form", FORMS)
def test_form_has_its_operators(form: Form) -> None:
    scene = siblings(Scene(), "q", "k")
    got = lower_(scene.model, form)
    assert kinds(scene.model) == OPERATORS[form]
    assert got == dict.fromkeys(("q", "k"), "add" if form == "gemm" else form)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_form_computes_the_chain(form: Form, shape: str, dtype: ir.DataType) -> None:
    scene = siblings(Scene(SHAPES[shape], dtype), "q", "k", "v")
    if shape == "2-D":
        siblings(scene, "g", kind="Gemm", transB=1)
    lower_(scene.model, form)
    x = batch(scene, ROWS[shape])
    assert_right(scene, x, run(scene.model, x))
    onnx.checker.check_model(ir.serde.serialize_model(scene.model), full_check=True)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_form_agrees_with_the_function(form: Form, tmp_path: Path) -> None:
    """From a file, whose weights some forms compute while it is written; optimized, as users run it."""
    scene = siblings(Scene(), "q", "k")
    function = scene.model.clone()
    operator.declare_(function)
    lower_(scene.model, form)
    save_graph(scene.model, tmp_path, "model")
    x = batch(scene)
    want, got = run(function, x), run(scene.model, x, optimized=True, path=tmp_path / "model.onnx")
    for name, array in want.items():
        assert np.abs(got[name] - array).max() <= TOLERANCE[scene.dtype] * np.abs(array).max()


def test_gemm_is_one_operator_less_for_two_dimensions() -> None:
    scene = siblings(Scene(SHAPES["2-D"]), "q")
    assert lower_(scene.model, "gemm") == {"q": "gemm"}
    assert kinds(scene.model) == ["MatMul", "Gemm", "MatMul"]


@pytest.mark.parametrize("form", ["output", "augmented"])
def test_output_form_keeps_what_else_a_gemm_does(form: Form) -> None:
    scene = siblings(Scene(SHAPES["2-D"]), "q", kind="Gemm", transB=1)
    assert lower_(scene.model, form) == {"q": form}
    assert kinds(scene.model).count("Gemm") == 1
    x = batch(scene, (3,))
    assert_right(scene, x, run(scene.model, x))


def _block_product(scene: Scene) -> None:
    scene.target("q", kind="MatMulNBits")


def _scaled(scene: Scene) -> None:
    scene.target("q", kind="Gemm", alpha=0.5)


def _read_elsewhere(scene: Scene) -> None:
    y, vectors = scene.reflection("q")
    scene.product(y, "q", vectors)
    other = ir.node("Relu", [y], name="other")
    other.outputs[0].name, other.outputs[0].type, other.outputs[0].shape = "other_output", y.type, y.shape
    scene.graph.append(other)
    scene.graph.outputs.append(other.outputs[0])


def _graph_output(scene: Scene) -> None:
    y, vectors = scene.reflection("q")
    scene.product(y, "q", vectors)
    scene.graph.outputs.append(y)


def _computed_weight(scene: Scene) -> None:
    node = scene.target("q")
    copied = ir.node("Identity", [node.inputs[1]], name="copied")
    copied.outputs[0].name = "copied_output"
    scene.graph.insert_before(node, copied)
    node.replace_input_with(1, copied.outputs[0])


NO_PRODUCT: dict[str, Callable[[Scene], None]] = {
    "int4": _block_product,
    "scaled": _scaled,
    "read elsewhere": _read_elsewhere,
    "graph output": _graph_output,
    "computed weight": _computed_weight,
}


@pytest.mark.parametrize("form", ["output", "output-grouped", "packed", "augmented"])
@pytest.mark.parametrize("make", NO_PRODUCT.values(), ids=NO_PRODUCT)
def test_output_form_gives_way_to_add_without_a_plain_product(make: Callable[[Scene], None], form: Form) -> None:
    scene = Scene(SHAPES["2-D"])
    make(scene)
    scene.target("k")
    assert lower_(scene.model, form) == {"q": "add", "k": form}
    x = batch(scene, (5,))
    assert_right(scene, x, run(scene.model, x))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_fed_operands_take_add_and_keep_their_names(form: Form) -> None:
    """U and V of a swappable graph: nothing may be computed from their defaults."""
    scene = siblings(Scene(), "q", "k")
    fed = [f"{target}.hra_{letter}" for target in ("q", "k") for letter in "UV"]
    scene.graph.inputs.extend(scene.graph.initializers[name] for name in fed)
    assert lower_(scene.model, form) == {"q": "add", "k": "add"}
    assert [value.name for value in scene.graph.inputs] == ["x", *fed]
    assert fed == [name for name in scene.graph.initializers if "hra" in name]
    x = batch(scene)
    assert_right(scene, x, run(scene.model, x))


@pytest.mark.parametrize("form", ["add", "gemm"])
def test_operands_keep_their_names_and_bits_where_they_are_used(form: Form) -> None:
    scene = siblings(Scene(SHAPES["2-D"]), "q")
    before = {name: value.const_value.numpy() for name, value in scene.graph.initializers.items() if value.const_value}
    lower_(scene.model, form)
    assert scene.graph.initializers.keys() == before.keys()


def test_constants_that_nobody_reads_are_dropped() -> None:
    scene = siblings(Scene(), "q", "k")
    lower_(scene.model, "augmented")
    assert set(scene.graph.initializers) == {"q.hra_U_and_1_more", "q.hra_W_VW", "k.hra_W_VW"}


def test_weight_that_somebody_else_reads_stays() -> None:
    scene = siblings(Scene(), "q")
    weight = scene.graph.initializers["q.weight"]
    scene.graph.outputs.append(weight)
    lower_(scene.model, "augmented")
    assert "q.weight" in scene.graph.initializers


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_one_target_at_two_places_stays_right(form: Form) -> None:
    """A module that is called twice: one pair of initializers, two reflections, one weight."""
    scene = Scene()
    node = scene.target("q")
    (first,) = [each for each in scene.graph if operator.is_reflection(each)]
    _, u, v = first.inputs
    assert u is not None
    assert v is not None
    twin = operator.node(scene.x, u, v, name="q/hra_1")
    again = ir.node("MatMul", [twin.outputs[0], node.inputs[1]], name="q/MatMul_1")
    output = again.outputs[0]
    output.name, output.type, output.shape = "again", node.outputs[0].type, node.outputs[0].shape
    scene.graph.extend([twin, again])
    scene.graph.outputs.append(output)
    scene.expected["again"] = scene.expected["q_output"]
    lower_(scene.model, form)
    x = batch(scene)
    assert_right(scene, x, run(scene.model, x))
    names = [value.name for each in scene.graph for value in each.outputs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("form", ["add", "grouped", "augmented"])
def test_reflections_in_branches_are_lowered(form: Form) -> None:
    scene = Scene()
    y, vectors = scene.reflection("q")
    node = scene.product(y, "q", vectors)
    reflection = y.producer()
    assert reflection is not None
    scene.graph.outputs.clear()
    for each in (node, reflection):
        scene.graph.remove(each)
    inner = ir.Graph([], [node.outputs[0]], nodes=[reflection, node], name="then")
    truth = scene.constant("truth", np.array(True))
    other = ir.node("MatMul", [scene.x, scene.graph.initializers["q.weight"]], name="plain")
    other.outputs[0].name, other.outputs[0].type = "plain_output", ir.TensorType(scene.dtype)
    branches = {"then_branch": inner, "else_branch": ir.Graph([], [other.outputs[0]], nodes=[other], name="else")}
    chosen = ir.node("If", [truth], branches, name="choice")
    output = chosen.outputs[0]
    output.name, output.type, output.shape = "chosen", ir.TensorType(scene.dtype), ir.Shape((*scene.lead, O))
    scene.graph.append(chosen)
    scene.graph.outputs.append(output)
    assert lower_(scene.model, form) == {"q": form}
    scene.expected["chosen"] = scene.expected.pop("q_output")
    x = batch(scene)
    assert_right(scene, x, run(scene.model, x))


def test_auto_puts_siblings_of_small_rank_together() -> None:
    scene = siblings(Scene(), "q", "k", "v")  # ranks together 12, less than d / 12
    assert set(lower_(scene.model).values()) == {"augmented"}
    assert kinds(scene.model) == ["MatMul", "Concat", *["MatMul"] * 3]
    larger = siblings(Scene(), "q", "k", "v", "w")
    assert set(lower_(larger.model).values()) == {"augmented"}
    assert kinds(larger.model) == ["MatMul", "Concat", "MatMul"] * 4


def test_auto_groups_what_it_cannot_augment() -> None:
    """Quantized weights, mixed with others: each kind has its form, of one shared input."""
    scene = siblings(Scene(), "q", "k", kind="MatMulNBits")
    scene.target("v")
    assert lower_(scene.model) == {"q": "grouped", "k": "grouped", "v": "augmented"}
    x = batch(scene)
    assert_right(scene, x, run(scene.model, x))
    alone = siblings(Scene(), "q", kind="MatMulNBits")
    assert lower_(alone.model) == {"q": "add"}


def test_lower_forgets_the_operators_body() -> None:
    scene = siblings(Scene(), "q")
    operator.declare_(scene.model)
    lower_(scene.model)
    assert not scene.model.functions
    assert operator.DOMAIN not in scene.model.graph.opset_imports
    assert "MatMul" in kinds(scene.model)
