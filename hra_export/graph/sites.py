"""Where a graph multiplies by weights: every place that a chain could act on, with what is known of its name.

An existing graph says in up to three ways which module a node came from: in torch's `name_scopes`, in the node's name
(`/model/layers.0/attn/q_proj/MatMul`), in the weight's name (`model.layers.0.self_attn.q_proj.weight`).
Constant folding renames weights, and two modules may share one, so they are believed in this order.

Letters: d in_features, o out_features.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from hra_export.errors import GraphError
from hra_export.graph.provenance import NAME_SCOPES

Kind = Literal["product", "convolution", "lookup"]

# What is found and then refused, with the reason.
REFUSED = {
    "MatMulInteger": "its input is quantized already: insert reflections before quantizing",
    "QLinearMatMul": "its input is quantized already: insert reflections before quantizing",
    "ConvInteger": "its input is quantized already: insert reflections before quantizing",
    "QLinearConv": "its input is quantized already: insert reflections before quantizing",
    "FusedConv": "an activation is fused into it: insert reflections before that fusion",
}
# Operators whose input 1 holds the weight, by what they do with it.
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul")
BLOCK_PRODUCTS = ("MatMulNBits", "MatMulBnb4")  # d and o are the attributes K and N
CONVOLUTIONS = ("Conv", "FusedConv", "ConvInteger", "QLinearConv")
LOOKUPS = ("Gather", "GatherBlockQuantized")
PASSED_THROUGH = ("Identity", "Cast", "DequantizeLinear", "Transpose")
WEIGHT_NAME = re.compile(r"(.+?)(?:\.MatMul)?\.q?weight(?:[._].*)?")


@dataclass(frozen=True)
class Weight:
    """A constant matrix or kernel as a node sees it.

    Attributes:
        value: the initializer, or the output of the Constant node, at its origin.
        tensor: its content.
        permutation: axes of `tensor` in the order in which the node sees them.
        is_plain: nothing but transpositions lies between: the content is what the node multiplies by.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    permutation: tuple[int, ...]
    is_plain: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As the node sees it."""
        shape = self.tensor.shape.numpy()
        return tuple(int(shape[axis]) for axis in self.permutation)

    def array(self) -> np.ndarray:
        """The content as the node sees it; reads the file it lies in."""
        return self.tensor.numpy().transpose(self.permutation)


@dataclass(frozen=True)
class Site:
    """A node that multiplies by a weight, or looks rows of one up.

    Attributes:
        features: d, on which a chain acts.
        outputs: o; the vocabulary for a lookup.
        dtype: of the activations that a chain would act on.
        weight: None for block-quantized weights.
        names: module paths by name scopes, node name and weight name; any may be missing.
        refusal: why no chain can act here, if so.
    """

    node: ir.Node
    kind: Kind
    features: int
    outputs: int
    dtype: ir.DataType | None
    weight: Weight | None
    names: tuple[str | None, str | None, str | None]
    refusal: str | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.node.op_type} `{self.node.name}`"

    @property
    def weight_source(self) -> ir.Value | None:
        """Where the weight's bytes are, to tell which nodes share them."""
        return self.weight.value if self.weight is not None else self.node.inputs[1]


def sites_of(model: ir.Model) -> list[Site]:
    """Every site of a model, those of subgraphs included, in the order of its nodes."""
    found = (_site(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return [site for site in found if site is not None]


def weight_of(value: ir.Value | None) -> Weight | None:
    """The constant that a value is, through transpositions, casts and dequantization; None when it is computed."""
    moves: list[tuple[int, ...] | None] = []
    is_plain = True
    while value is not None and (tensor := _content(value)) is None:
        producer = value.producer()
        if producer is None or producer.op_type not in PASSED_THROUGH:
            return None
        if producer.op_type == "Transpose":
            moves.append(tuple(producer.attributes["perm"].as_ints()) if "perm" in producer.attributes else None)
        is_plain = is_plain and producer.op_type in ("Identity", "Transpose")
        value = producer.inputs[0]
    if value is None:
        return None
    assert tensor is not None
    permutation = tuple(range(len(tensor.shape)))
    for move in reversed(moves):
        if move is not None and sorted(move) != list(range(len(permutation))):
            return None
        permutation = permutation[::-1] if move is None else tuple(permutation[axis] for axis in move)
    return Weight(value, tensor, permutation, is_plain)


def module_path(node: ir.Node) -> str | None:
    """The module that a node came from, by torch's name scopes: a list of paths, and the operator's own name last."""
    try:
        scopes = ast.literal_eval(node.metadata_props[NAME_SCOPES])
    except (KeyError, ValueError, SyntaxError):
        return None
    is_list = isinstance(scopes, list) and len(scopes) > 1 and all(isinstance(scope, str) for scope in scopes)
    return scopes[-2] or None if is_list else None


def _content(value: ir.Value) -> ir.TensorProtocol | None:
    if value.const_value is not None:
        return value.const_value
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    return None


def _site(node: ir.Node) -> Site | None:
    op = node.op_type
    if op in BLOCK_PRODUCTS:
        return _block_product(node)
    if op in LOOKUPS:
        return _lookup(node)
    position = 3 if op.startswith("QLinear") else 1
    weight = weight_of(node.inputs[position]) if len(node.inputs) > position else None
    if weight is None or node.inputs[0] is None:
        return None
    if op in CONVOLUTIONS and len(weight.shape) == 4:
        return _convolution(node, weight)
    if op in PRODUCTS and len(weight.shape) == 2:
        return _product(node, weight)
    return None


def _product(node: ir.Node, weight: Weight) -> Site:
    rows, columns = weight.shape[::-1] if _flag(node, "transB") else weight.shape
    refusal = REFUSED.get(node.op_type)
    if _flag(node, "transA") or _flag(node, "transBatchA"):
        refusal = "it transposes its input"
    return Site(node, "product", rows, columns, _activation_dtype(node, weight), weight, _names(node, weight), refusal)


def _convolution(node: ir.Node, weight: Weight) -> Site:
    groups = _int(node, "group", 1)
    refusal = REFUSED.get(node.op_type) or (None if groups == 1 else f"a grouped convolution (groups={groups})")
    if refusal is None and not weight.is_plain:
        refusal = "its kernel is quantized: ΔW needs the kernel itself"
    features = int(np.prod(weight.shape[1:]))
    dtype = _activation_dtype(node, weight)
    return Site(node, "convolution", features, weight.shape[0], dtype, weight, _names(node, weight), refusal)


def _block_product(node: ir.Node) -> Site | None:
    d, o = _int(node, "K", 0), _int(node, "N", 0)
    if d < 1 or o < 1 or len(node.inputs) < 3 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    scales = node.inputs[2]
    dtype = _first_float(node.inputs[0], scales)
    return Site(node, "product", d, o, dtype, None, _names(node, None))


def _lookup(node: ir.Node) -> Site | None:
    weight = weight_of(node.inputs[0]) if len(node.inputs) > 1 else None
    if weight is None or len(weight.shape) != 2 or _content_is_index(weight) or _int(node, "axis", 0) != 0:
        return None
    rows, width = weight.shape
    source = node.outputs[0]
    if node.op_type == "GatherBlockQuantized":
        shape = source.shape
        last = shape[-1] if shape is not None and len(shape) else None
        if not isinstance(last, int) or len(node.inputs) < 3:
            return None
        width, dtype = last, _first_float(source, node.inputs[2])
    else:
        dtype = _first_float(source, weight.value)
    return Site(node, "lookup", width, rows, dtype, weight, _names(node, weight))


def _content_is_index(weight: Weight) -> bool:
    """Gather also picks sizes out of shapes."""
    return weight.tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def _activation_dtype(node: ir.Node, weight: Weight) -> ir.DataType | None:
    return _first_float(node.inputs[0], node.outputs[0], weight.value)


def _first_float(*values: ir.Value | None) -> ir.DataType | None:
    dtypes = [value.dtype for value in values if value is not None and value.dtype is not None]
    return next((dtype for dtype in dtypes if dtype.is_floating_point()), None)


def _flag(node: ir.Node, name: str) -> bool:
    return _int(node, name, 0) == 1


def _int(node: ir.Node, name: str, default: int) -> int:
    if name not in node.attributes:
        return default
    attribute = node.attributes[name]
    if attribute.type != ir.AttributeType.INT:
        raise GraphError(f"{node.op_type} `{node.name}`: expected `{name}` to be an integer, got {attribute.type}")
    return attribute.as_int()


def _names(node: ir.Node, weight: Weight | None) -> tuple[str | None, str | None, str | None]:
    parts = (node.name or "").strip("/").split("/")
    source = weight.value if weight is not None else node.inputs[1]
    match = WEIGHT_NAME.fullmatch(source.name or "") if source is not None else None
    return module_path(node), ".".join(parts[:-1]) or None, match[1] if match else None


def constant_inputs(node: ir.Node) -> Iterator[tuple[int, Weight]]:
    """The constant inputs of a node, by position."""
    for position, value in enumerate(node.inputs):
        weight = weight_of(value)
        if weight is not None:
            yield position, weight
