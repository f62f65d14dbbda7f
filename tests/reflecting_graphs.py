"""Small ONNX graphs with reflections, made by hand, and their numbers from ONNX Runtime."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from hra_export import householder
from hra_export.graph import operator
from hra_export.graph.products import NAME_SCOPES

Array = NDArray[Any]
VOCABULARY, RANK = 40, 4


class GraphMaker:
    """Builds one graph, node by node; float32."""

    def __init__(self, *inputs: ir.Value) -> None:
        self.graph = ir.Graph(list(inputs), [], nodes=[], opset_imports={"": 20}, name="made")

    def constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self, kind: str, inputs: Sequence[ir.Value], sizes: Sequence[Any] = (), *, path: str = "", **attributes: Any
    ) -> ir.Value:
        made = ir.node(kind, inputs, attributes, name=f"node_{len(self.graph)}")
        (output,) = made.outputs
        is_truth = kind in ("Less", "Equal", "Not")
        output.name, output.shape = f"v{len(self.graph)}", ir.Shape(sizes)
        output.type = ir.TensorType(ir.DataType.BOOL if is_truth else ir.DataType.FLOAT)
        if path:
            made.metadata_props[NAME_SCOPES] = f"['', '{path}', 'linear']"
        self.graph.append(made)
        return output

    def reflection(self, x: ir.Value, path: str, u: Array, v: Array) -> ir.Value:
        made = operator.node(
            x, self.constant(f"{path}.hra_U", u), self.constant(f"{path}.hra_V", v), name=f"{path}/hra"
        )
        self.graph.append(made)
        return made.outputs[0]

    def model(self, *outputs: tuple[str, ir.Value]) -> ir.Model:
        for name, value in outputs:
            value.name = name
            self.graph.outputs.append(value)
        return ir.Model(self.graph, ir_version=10)


def value(name: str, dtype: ir.DataType, *sizes: str | int) -> ir.Value:
    """A graph input."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(sizes))


def reflection_operands(d: int, seed: int = 0) -> tuple[Array, Array]:
    """U (d, r) and V (r, d) of a random chain, float32."""
    vectors = torch.randn(d, RANK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, v = operator.operands([householder.compact_wy(vectors)], torch.float32)
    return u.numpy(), v.numpy()


def two_layers(d: int = 64, inner: int = 96, seed: int = 0) -> ir.Model:
    """ids (b, t) → embedding → reflection → up (inner, d) → Relu → down (d, inner) → head (V, d) → `logits`."""
    random = np.random.default_rng(seed)
    maker = GraphMaker(value("input_ids", ir.DataType.INT64, "b", "t"))
    table = maker.constant("embed.weight", random.standard_normal((VOCABULARY, d), np.float32))
    x = maker.node("Gather", [table, maker.graph.inputs[0]], ["b", "t", d], path="embed")
    x = maker.reflection(x, "up", *reflection_operands(d))
    for path, (rows, columns) in {"up": (inner, d), "down": (d, inner), "head": (VOCABULARY, d)}.items():
        weight = random.standard_normal((rows, columns), np.float32) / columns**0.5
        stored = maker.constant(f"val_{path}", np.ascontiguousarray(weight.T))
        x = maker.node("MatMul", [x, stored], ["b", "t", rows], path=path)
        if path == "up":
            x = maker.node("Relu", [x], ["b", "t", rows])
    return maker.model(("logits", x))


def kinds(model: ir.Model) -> list[str]:
    """The operators in the graph's order."""
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feed: Mapping[str, Array], *, optimized: bool = False) -> dict[str, Array]:
    """Every output of a graph on ONNX Runtime's CPU provider; the model itself is not changed."""
    copy = model.clone()
    operator.declare_(copy)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    data = ir.serde.serialize_model(copy).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def constants(model: ir.Model) -> dict[str, Array]:
    """Every constant by name."""
    held = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in held if value.const_value is not None}
