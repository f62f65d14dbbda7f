"""Quantized matrices read back from a graph, and the same graph without rounding of activations.

A graph of rounded weights computes what the float model computes with the values that its codes stand for. With them,
it can be judged as closely as a float graph.

Letters: o out_features, d in_features, n blocks of a row.
"""

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hra_export.errors import GraphError
from hra_export.graph.half import HALVES
from hra_export.graph.operator import is_reflection
from hra_export.graph.products import Array
from hra_export.graph.signature import FLOATS, INTEGER_PRODUCTS
from hra_export.graph.variants import LAST_FACTORS, path_of
from hra_export.quantization import QuantizedMatrix, unpack

BLOCKS, ROWS = "MatMulNBits", "GatherBlockQuantized"
CODED = frozenset({BLOCKS, ROWS, *INTEGER_PRODUCTS})
LEVEL = "accuracy_level"
# What the GenAI builder calls the lookup of embeddings: `/model/embed_tokens/Gather`.
LOOKUP_NAME = re.compile(r"/(model/embed_tokens)/Gather\w*")


@dataclass(frozen=True)
class CodedSite:
    """A node with a quantized matrix.

    Attributes:
        path: module path, as the graph tells it; empty where it does not.
        node: a product or a lookup.
    """

    path: str
    node: ir.Node

    @property
    def scale_dtype(self) -> ir.DataType:
        """In which scales are stored; each was rounded to it."""
        return _tensor(self.node, 2).dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d), or (vocabulary, d) of a lookup."""
        attributes = self.node.attributes
        if self.node.op_type == BLOCKS:
            return attributes["N"].as_int(), attributes["K"].as_int()
        rows, width = _tensor(self.node, 0).shape.numpy()
        return rows, width * 8 // attributes.get_int("bits", 4)

    def matrix(self) -> QuantizedMatrix:
        """Codes, scales and zero points; they lie in the graph's file until they are used.

        Raises:
            GraphError: it is stored in a way that is not known here.
        """
        try:
            return _matrix(self.node, _array(self.node, int(self.node.op_type == BLOCKS)), self.shape)
        except ValueError as error:
            raise GraphError(f"`{self.node.name}`: {error}") from error


def coded_sites(model: ir.Model) -> tuple[list[CodedSite], list[str]]:
    """The nodes with quantized matrices that can be read, and the names of those that cannot."""
    found, others = [], []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in CODED:
            if _is_readable(node):
                found.append(CodedSite(_path(node), node))
            else:
                others.append(f"{node.op_type} `{node.name}`")
    return found, others


def keep_activations_(model: ir.Model) -> bool:
    """Let products compute in the activations' own precision, in place.

    Returns:
        Whether any had rounded them to 8 bits.
    """
    changed = False
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == BLOCKS and node.attributes.get_int(LEVEL, 0) != 0:
            node.attributes[LEVEL] = ir.AttrInt64(LEVEL, 0)
            changed = True
    return changed


def activation_precision(sites: list[CodedSite]) -> str:
    """In which precision the products compute: `fp32`, `fp16` or `bf16`."""
    halves = [site.scale_dtype for site in sites if site.scale_dtype in HALVES]
    return FLOATS[halves[0]] if halves else "fp32"


def holds_reflections(model: ir.Model) -> bool:
    """Whether the adapter stands beside the weights and not in them."""
    if any(name.endswith(LAST_FACTORS) for name in model.graph.initializers):
        return True
    return any(is_reflection(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def _path(node: ir.Node) -> str:
    found = LOOKUP_NAME.fullmatch(node.name or "")
    return found[1].replace("/", ".") if found else path_of(node)


def _is_readable(node: ir.Node) -> bool:
    if node.op_type not in (BLOCKS, ROWS) or node.attributes.get_int("bits", 4) not in (4, 8):
        return False
    codes = [0, 2, 3] if node.op_type == ROWS else [1, 2, 3, 4]
    values = [node.inputs[index] if index < len(node.inputs) else None for index in codes]
    if node.op_type == BLOCKS and values.pop() is not None:  # columns in another order
        return False
    if any(value is not None and value.const_value is None for value in values):
        return False
    packed, scales, zeros = values
    bytes_only = all(value is None or _is_bytes(value) for value in (packed, zeros))
    axes = (node.attributes.get_int("gather_axis", 0), node.attributes.get_int("quantize_axis", 1))
    if node.op_type == ROWS and axes != (0, 1):
        return False
    return packed is not None and scales is not None and bytes_only


def _is_bytes(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.UINT8


def _matrix(node: ir.Node, codes: Array, shape: tuple[int, int]) -> QuantizedMatrix:
    rows, columns = shape
    bits, size = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    blocks = -(-columns // size)
    zeros = _array(node, 3).reshape(rows, -1) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if zeros is not None and bits == 4:
        zeros = unpack(zeros)[:, :blocks]
    return QuantizedMatrix(
        bits=4 if bits == 4 else 8,
        block_size=size,
        columns=columns,
        packed=codes.reshape(rows, blocks, -1),
        scales=_array(node, 2).reshape(rows, blocks).astype(np.float32),
        zero_points=zeros,
    )


def _tensor(node: ir.Node, position: int) -> ir.TensorProtocol:
    value = node.inputs[position]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _array(node: ir.Node, position: int) -> Array:
    return _tensor(node, position).numpy()
