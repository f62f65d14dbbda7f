"""A base that is quantized already keeps its bits, and the reflection stays outside: the adapter costs nothing.

Folding into such a base means dequantizing it, rotating it and rounding it again, and the second rounding is as large
as the first was: SmolLM2 in Q4_1 loses 0.44 nats (KL) that way, and 2·10⁻¹¹ with the chain in front of the base.

The graph is the one exported from the dequantized weights. Each matrix of blocks is put where its exact values stand.

Letters: o out_features, d in_features.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from hra_export.codebook import CodebookMatrix
from hra_export.errors import GraphError
from hra_export.graph.blocks import BlockWriter
from hra_export.graph.products import Array, lookups, module_path, weight_products
from hra_export.graph.quantize import QuantizationReport, QuantizedSite, constants_size
from hra_export.quantization import ROWS, QuantizedMatrix, nibbles

Matrix = QuantizedMatrix | CodebookMatrix


def keep_bits_(model: ir.Model, matrices: Mapping[str, Matrix], *, accuracy_level: int = 0) -> QuantizationReport:
    """Put the base's own blocks in place of the float weights that they stand for, in place.

    A matrix goes where the graph's float weight equals it in every element; names only say where to look first. So
    nothing can be mixed up: two layers of one shape, rows in another order, weights that an adapter was folded into.

    Args:
        model: exported from the dequantized base in any float dtype, with reflections as operators or without.
        matrices: parameter name (`model.layers.0.mlp.up_proj.weight`) → its blocks, rows in the parameter's order;
            affine ones become MatMulNBits, those of bitsandbytes MatMulBnb4.
        accuracy_level: MatMulNBits' attribute for the CPU provider: 0, or 4 for activations rounded to 8 bits in each
            product, which is faster and no longer exact (SmolLM2 in 4 bits: KL 0.006 where 0 has 2·10⁻¹¹).

    Returns:
        What was replaced. `float_sites` are products with weights that no matrix stands for.

    Raises:
        GraphError: a matrix stands for no weight of the graph; all of them.
        UnsupportedModelError: the graph has branches or loops.
    """
    products, tables = weight_products(model), lookups(model)
    of_products = [_find(matrices, product.name, product.matrix()) for product in products]
    of_tables = [_find(matrices, module_path(node), _rows(node)) for node in tables]
    placed = [name for name in [*of_products, *of_tables] if name is not None]
    _check_complete(matrices, placed, {product.shape for product in products})
    before, writer = constants_size(model), BlockWriter(model, accuracy_level)
    for product, name in zip(products, of_products, strict=True):
        matrix = None if name is None else matrices[name]
        if isinstance(matrix, CodebookMatrix):
            writer.replace_product_by_codebook_(product, matrix)
        elif matrix is not None:
            writer.replace_product_(product, *_parts(matrix, product.x, accuracy_level))
    for node, name in zip(tables, of_tables, strict=True):
        matrix = None if name is None else matrices[name]
        if isinstance(matrix, QuantizedMatrix) and matrix.offsets is None:  # GatherBlockQuantized has none
            writer.replace_lookup_(node, matrix)
    sites = tuple(QuantizedSite(name, matrices[name].bits, matrices[name].shape, 0.0) for name in dict.fromkeys(placed))
    kept = tuple(product.name for product, name in zip(products, of_products, strict=True) if name is None)
    return QuantizationReport("weights", sites, kept, before, constants_size(model))


def _parts(matrix: QuantizedMatrix, x: ir.Value, accuracy_level: int) -> tuple[QuantizedMatrix, ...]:
    """What is written for a matrix: itself, or its halves where there is no kernel for the whole.

    For 8 bits and float32 activations the CPU provider dequantizes the matrix in every call: 7 ms for one row of
    1536 × 2048, and 0.14 ms for each half.
    """
    is_slow = matrix.bits == 8 and not accuracy_level and x.dtype in (None, ir.DataType.FLOAT)
    return nibbles(matrix) if is_slow else (matrix,)


def _rows(node: ir.Node) -> Array:
    table = node.inputs[0]
    assert table is not None
    assert table.const_value is not None
    return table.const_value.numpy()


def _find(matrices: Mapping[str, Matrix], path: str, weight: Array) -> str | None:
    """The name of the matrix that a weight (o, d) is made of; the one called `path` is tried first."""
    candidates = [name for name, matrix in matrices.items() if matrix.shape == weight.shape]
    candidates.sort(key=lambda name: name.removesuffix(".weight") != path)
    return next((name for name in candidates if _is_same(matrices[name], weight)), None)


def _is_same(matrix: Matrix, weight: Array) -> bool:
    """Whether a weight is the matrix dequantized, in the weight's dtype; one row tells most that are not."""
    parts = [slice(0, 1), *(slice(start, start + ROWS) for start in range(0, len(weight), ROWS))]
    values = matrix.loaded_values if isinstance(matrix, CodebookMatrix) else matrix.values
    return all(np.array_equal(values(part).astype(weight.dtype), weight[part]) for part in parts)


def _check_complete(
    matrices: Mapping[str, Matrix], placed: Collection[str], shapes: Collection[tuple[int, int]]
) -> None:
    findings = [
        f"{name}: {matrix.bits} bits, {matrix.shape}: "
        + ("equals none of the weights of its shape" if matrix.shape in shapes else "no weight has its shape")
        for name, matrix in matrices.items()
        if name not in placed
    ]
    if findings:
        raise GraphError(
            f"{len(findings)} of {len(matrices)} quantized matrices have no place in the graph",
            findings=findings,
            hint="the graph must be exported from the dequantized base itself, with reflections and not with folded "
            "weights",
        )
