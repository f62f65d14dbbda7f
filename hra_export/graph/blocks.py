"""Quantized matrices as nodes of ONNX Runtime: MatMulNBits and MatMulBnb4 for products, GatherBlockQuantized for rows.

    y = x Wᵀ = MatMulNBits(x, codes, scales) + blocksums(x) offsetsᵀ

The second term is there for blocks with offsets (GGUF's Q4_1 and K-types). MatMulNBits takes fractional zero points
too, but rounds them, and its kernels then dequantize the matrix in every call: 8.2 ms against 0.14 ms for one row of
1536 × 2048 on the CPU provider, and none at all for 8 bits.

Letters: o out_features, d in_features, n blocks of a row, b columns of a block.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hra_export.codebook import CodebookMatrix
from hra_export.errors import GraphError
from hra_export.graph.products import Array, Product, drop_constant_, drop_unread_
from hra_export.quantization import QuantizedMatrix, pack

DOMAIN = "com.microsoft"
VERSION = 1
BNB4_TYPES = {"fp4": 0, "nf4": 1}  # ONNX Runtime's numbers


@dataclass
class BlockWriter:
    """Replaces nodes of one model, in the graph's order, by nodes with quantized matrices.

    Attributes:
        model: changed in place.
        accuracy_level: MatMulNBits' attribute: 0 the activations' own precision, 4 activations rounded to 8 bits.
    """

    model: ir.Model
    accuracy_level: int = 0
    _sums: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    # Keyed by identity, so the matrix is kept alive beside what was made of it.
    _written: dict[tuple[int, str], tuple[QuantizedMatrix, tuple[ir.Value, ir.Value, ir.Value | None]]] = field(
        default_factory=dict
    )

    def replace_product_(self, product: Product, *parts: QuantizedMatrix) -> None:
        """Put quantized matrices, whose sum is W, in place of a product's weight W.

        Args:
            product: of a graph that no product behind it was replaced in yet.
            parts: of the product's shape (o, d); offsets in the first alone.

        Raises:
            GraphError: the matrix has offsets and the graph does not tell the rank of x.
        """
        node, x = product.node, product.x
        made = [self._product(product, part, index) for index, part in enumerate(parts)]
        made += self._sum(node, x, [each.outputs[0] for each in made])
        if parts[0].offsets is not None:
            offsets = self._initializer(f"{product.weight.name}_offsets", parts[0].offsets.T, _dtype(x))
            made += self._offset_nodes(node, x, parts[0], offsets, made[-1].outputs[0])
        for each in made:
            each.metadata_props.update(node.metadata_props)
        self._replace(node, made)
        drop_unread_(self.model.graph, product)

    def _product(self, product: Product, matrix: QuantizedMatrix, index: int) -> ir.Node:
        """One of the products whose sum is y; the first has the bias."""
        rows, columns = matrix.shape
        sizes = {"K": columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block_size}
        inputs = [product.x, *self._operands(f"{product.weight.name}", matrix, _dtype(product.x))]
        if index == 0 and product.bias is not None:
            inputs += [None, product.bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = sizes | ({"accuracy_level": self.accuracy_level} if self.accuracy_level else {})
        name = f"{product.node.name}_Q{matrix.bits}{f'_{index}' if index else ''}"
        return ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, version=VERSION, name=name)

    def _sum(self, node: ir.Node, x: ir.Value, terms: list[ir.Value]) -> list[ir.Node]:
        """Nodes that add up the terms; none for one."""
        made: list[ir.Node] = []
        total = terms[0]
        for term in terms[1:]:
            for value in (total, term):
                value.type, value.shape = node.outputs[0].type or x.type, node.outputs[0].shape
            made.append(ir.node("Add", [total, term], name=f"{node.name}_parts_{len(made)}"))
            total = made[-1].outputs[0]
        return made

    def replace_product_by_codebook_(self, product: Product, matrix: CodebookMatrix) -> None:
        """Put a matrix of bitsandbytes in place of a product's weight.

        The CPU provider has MatMulBnb4 for float32 only, and dequantizes the matrix in every call.
        """
        node, x, (rows, columns) = product.node, product.x, matrix.shape
        packed = self._initializer(f"{product.weight.name}_Bnb4", matrix.packed)
        absmax = self._initializer(f"{product.weight.name}_absmax", matrix.absmax, _dtype(x))
        attributes = {"K": columns, "N": rows, "block_size": matrix.block_size, "quant_type": BNB4_TYPES[matrix.kind]}
        name = f"{node.name}_Bnb4"
        made = [ir.node("MatMulBnb4", [x, packed, absmax], attributes, domain=DOMAIN, version=VERSION, name=name)]
        if product.bias is not None:
            (output,) = made[0].outputs
            output.type, output.shape = node.outputs[0].type or x.type, node.outputs[0].shape
            made.append(ir.node("Add", [output, product.bias], name=f"{node.name}_biased"))
        for each in made:
            each.metadata_props.update(node.metadata_props)
        self._replace(node, made)
        drop_unread_(self.model.graph, product)

    def replace_lookup_(self, node: ir.Node, matrix: QuantizedMatrix) -> None:
        """Put a quantized matrix in place of an embedding's rows.

        Args:
            node: Gather of rows.
            matrix: (vocabulary, d), without offsets, d a multiple of the block size.
        """
        table, indices = node.inputs
        assert table is not None
        dtype = _dtype(table)
        packed, scales, zeros = self._operands(f"{table.name}_rows", matrix, dtype, as_rows=True)
        attributes = {"bits": matrix.bits, "block_size": matrix.block_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [packed, indices, scales, *([zeros] if zeros is not None else [])]
        name = f"{node.name}_Q{matrix.bits}"
        made = ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, version=VERSION, name=name)
        made.metadata_props.update(node.metadata_props)
        self._replace(node, [made])
        drop_constant_(self.model.graph, table)

    def _replace(self, node: ir.Node, made: list[ir.Node]) -> None:
        graph = self.model.graph
        graph.opset_imports[DOMAIN] = VERSION
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)

    def _operands(
        self, name: str, matrix: QuantizedMatrix, dtype: ir.DataType, *, as_rows: bool = False
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Codes, scales and zero points as constants, the same ones for every node of one matrix."""
        if (id(matrix), name) in self._written:
            return self._written[id(matrix), name][1]
        codes = matrix.packed.reshape(len(matrix.packed), -1) if as_rows else matrix.packed
        packed = self._initializer(f"{name}_Q{matrix.bits}", codes)
        scales = self._initializer(f"{name}_scales", matrix.scales, dtype)
        zeros = matrix.zero_points  # (o, n)
        if zeros is not None and matrix.bits == 4:
            zeros = pack(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
        points = None if zeros is None else self._initializer(f"{name}_zero_points", zeros)
        self._written[id(matrix), name] = matrix, (packed, scales, points)
        return packed, scales, points

    def _initializer(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Register a constant, under another name where a constant has this one."""
        initializers = self.model.graph.initializers
        free = next(each for each in _names(name) if each not in initializers)
        tensor = ir.tensor(np.ascontiguousarray(array if dtype is None else array.astype(dtype.numpy())), name=free)
        shape = ir.Shape(array.shape)
        value = ir.Value(name=free, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def _offset_nodes(
        self, node: ir.Node, x: ir.Value, matrix: QuantizedMatrix, offsets: ir.Value, product: ir.Value
    ) -> list[ir.Node]:
        """blocksums(x) (…, n) times offsets (n, o), added to the product."""
        sums = self._block_sums(node, x, matrix)
        change = ir.node("MatMul", [sums, offsets], name=f"{node.name}_offsets")
        total = ir.node("Add", [product, change.outputs[0]], name=f"{node.name}_sum")
        for output in (product, change.outputs[0]):
            output.type, output.shape = node.outputs[0].type or x.type, node.outputs[0].shape
        return [change, total]

    def _block_sums(self, node: ir.Node, x: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        """The sums of x (…, d) over each block (…, n), once for all products of one x."""
        key = (x, matrix.block_size)
        if key not in self._sums:
            if x.shape is None:
                raise GraphError(
                    f"`{node.name}`: the rank of `{x.name}` is not known",
                    hint="run onnx.shape_inference over the model first",
                )
            blocks = matrix.scales.shape[1]
            shape = [0] * (len(x.shape) - 1) + [blocks, matrix.block_size]  # 0 keeps an axis
            target = self._initializer(f"{x.name}_blocks_{matrix.block_size}", np.array(shape, np.int64))
            axis = self._initializer(f"{x.name}_block_axis_{matrix.block_size}", np.array([-1], np.int64))
            parts = ir.node("Reshape", [x, target], name=f"{node.name}_blocks")
            sums = ir.node("ReduceSum", [parts.outputs[0], axis], {"keepdims": 0}, name=f"{node.name}_block_sums")
            for output, sizes in ((parts.outputs[0], shape[-2:]), (sums.outputs[0], [blocks])):
                output.type, output.shape = x.type, ir.Shape([*x.shape[:-1], *sizes])
            self.model.graph.insert_before(node, [parts, sums])
            self._sums[key] = sums.outputs[0]
        return self._sums[key]


def _dtype(value: ir.Value) -> ir.DataType:
    return value.dtype or ir.DataType.FLOAT


def _names(name: str) -> Iterator[str]:
    """A name, and what it may be called where it is taken."""
    yield name
    yield from (f"{name}_{i}" for i in itertools.count(1))
