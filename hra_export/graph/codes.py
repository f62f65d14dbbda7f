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
from hra_export.graph.grouped_operator import is_operator
from hra_export.graph.half import HALVES
from hra_export.graph.products import Array
from hra_export.graph.signature import FLOATS, INTEGER_PRODUCTS
from hra_export.graph.variants import LAST_FACTORS, path_of
from hra_export.quantization import QuantizedMatrix, unpack

BLOCKS, ROWS, INTEGERS = "MatMulNBits", "GatherBlockQuantized", "MatMulInteger"
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
        return ir.DataType.FLOAT if self.is_dynamic else _tensor(self.node, 2).dtype

    @property
    def is_dynamic(self) -> bool:
        """Whether it is a product in integers, whose activations are rounded with one scale for all."""
        return self.node.op_type == INTEGERS

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d), or (vocabulary, d) of a lookup."""
        attributes = self.node.attributes
        if self.node.op_type == BLOCKS:
            return attributes["N"].as_int(), attributes["K"].as_int()
        if self.is_dynamic:
            columns, rows = _tensor(self.node, 1).shape.numpy()
            return rows, columns
        rows, width = _tensor(self.node, 0).shape.numpy()
        return rows, width * 8 // attributes.get_int("bits", 4)

    def matrix(self) -> QuantizedMatrix:
        """Codes, scales and zero points; they lie in the graph's file until they are used.

        Raises:
            GraphError: it is stored in a way that is not known here.
        """
        try:
            if self.is_dynamic:
                return _integer_matrix(self.node)
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
    """Let products compute in the activations' own precision, in place; products in integers stay.

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
    return any(is_operator(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def _path(node: ir.Node) -> str:
    found = LOOKUP_NAME.fullmatch(node.name or "")
    return found[1].replace("/", ".") if found else path_of(node)


def _is_readable(node: ir.Node) -> bool:
    if node.op_type == INTEGERS:
        return _integer_parts(node) is not None
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


@dataclass(frozen=True)
class _IntegerParts:
    """Codes (d, o), scales and zero points (o,)."""

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value


def _integer_parts(node: ir.Node) -> _IntegerParts | None:
    """The parts of a product of dynamically rounded activations; None where it is written in another way."""
    codes, zeros = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
    rounding = node.inputs[0].producer() if node.inputs[0] is not None else None
    floats = _only(node, "Cast")
    scaled = _only(floats, "Mul")
    if rounding is None or rounding.op_type != "DynamicQuantizeLinear" or floats is None or scaled is None:
        return None
    scale = next(value.producer() for value in scaled.inputs if value is not None and value is not floats.outputs[0])
    constants = [value for value in (scale.inputs if scale is not None else ()) if value and value.const_value]
    if codes is None or zeros is None or len(constants) != 1 or not _is_bytes(codes):
        return None
    columns = codes.shape[1] if codes.shape is not None else None
    if any(value.const_value is None or value.const_value.size != columns for value in (constants[0], zeros)):
        return None
    return _IntegerParts(codes, constants[0], zeros)


def _only(node: ir.Node | None, operator: str) -> ir.Node | None:
    """The one node behind another, if it is of this kind."""
    users = list(node.outputs[0].consumers()) if node is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == operator else None


def _integer_matrix(node: ir.Node) -> QuantizedMatrix:
    """One block a row, as long as blocks come."""
    parts = _integer_parts(node)
    assert parts is not None
    codes, scales, zeros = (_numbers(value) for value in (parts.codes, parts.scales, parts.zeros))
    columns, rows = codes.shape
    size = max(16, 1 << (columns - 1).bit_length())
    packed = np.zeros((rows, 1, size), np.uint8)
    packed[:, 0, :columns] = codes.T
    return QuantizedMatrix(8, size, columns, packed, scales.astype(np.float32)[:, None], zeros[:, None])


def _numbers(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _tensor(node: ir.Node, position: int) -> ir.TensorProtocol:
    value = node.inputs[position]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _array(node: ir.Node, position: int) -> Array:
    return _tensor(node, position).numpy()
