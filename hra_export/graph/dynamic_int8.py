"""Products in integers: activations rounded to 8 bits in every call, weights once.

    xq, sx, zx = DynamicQuantizeLinear(x)        y = MatMulInteger(xq, Wq, zx, zw) · (sx sw) + bias

One scale for all of x, one for each column of W. The pattern is that of ONNX Runtime's own quantizer, which its
optimizer fuses into one kernel. Weights are unsigned around 128: with signed ones, processors without VNNI add
products of pairs in 16 bits, which saturate without a word.

Letters: o out_features, d in_features.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hra_export.errors import NumericalError
from hra_export.graph.products import Array, Product, drop_unread_

MIDDLE, TOP = 128, 127


def replace_products_(model: ir.Model, products: Sequence[Product]) -> list[float]:
    """Put integer products in place of float ones, in place.

    Args:
        model: a float32 graph.
        products: of the graph, in its order.

    Returns:
        ‖Q(W) − W‖ / ‖W‖ of each.

    Raises:
        NumericalError: a weight is not finite.
    """
    rounded: dict[ir.Value, ir.Node] = {}
    weights: dict[ir.Value, tuple[tuple[ir.Value, ir.Value, ir.Value], float]] = {}
    errors = []
    for product in products:
        if product.weight not in weights:
            weights[product.weight] = _quantized(model.graph, product)
        (codes, scales, zeros), error = weights[product.weight]
        errors.append(error)
        if product.x not in rounded:
            node = ir.node("DynamicQuantizeLinear", [product.x], num_outputs=3, name=f"{product.x.name}_quantized")
            model.graph.insert_before(product.node, node)
            rounded[product.x] = node
        _replace(model.graph, product, rounded[product.x].outputs, (codes, scales, zeros))
    for product in products:
        drop_unread_(model.graph, product)
    return errors


def _replace(
    graph: ir.Graph,
    product: Product,
    x: Sequence[ir.Value],
    weight: tuple[ir.Value, ir.Value, ir.Value],
) -> None:
    codes, scales, zeros = weight
    x_codes, x_scale, x_zero = x
    old = product.node
    integers = ir.node("MatMulInteger", [x_codes, codes, x_zero, zeros], name=f"{old.name}_integer")
    floats = ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{old.name}_cast")
    scale = ir.node("Mul", [x_scale, scales], name=f"{old.name}_scale")
    made = [integers, floats, scale, ir.node("Mul", [floats.outputs[0], scale.outputs[0]], name=f"{old.name}_scaled")]
    if product.bias is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], product.bias], name=f"{old.name}_biased"))
    for node in made:
        node.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, old, [old], made, old.outputs, made[-1].outputs)


def _quantized(graph: ir.Graph, product: Product) -> tuple[tuple[ir.Value, ir.Value, ir.Value], float]:
    """Codes (d, o), scales (o,) and zero points (o,) as constants, and the relative error."""
    weight = np.asarray(product.matrix().T, np.float32)  # (d, o)
    largest = np.abs(weight).max(axis=0)
    if not np.isfinite(largest).all():
        raise NumericalError(f"`{product.name}`: a weight to be quantized is not finite")
    scales = np.where(largest > 0, largest / TOP, 1).astype(np.float32)
    steps = np.rint(weight / scales)
    size = float(np.linalg.norm(weight))
    error = float(np.linalg.norm(steps * scales - weight)) / size if size else 0.0
    codes = (steps + MIDDLE).astype(np.uint8)
    zeros = np.full(scales.shape, MIDDLE, np.uint8)
    parts = ((codes, "codes"), (scales, "scales"), (zeros, "zero_points"))
    made = [_initializer(graph, f"{product.weight.name}_{part}", array) for array, part in parts]
    return (made[0], made[1], made[2]), error


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
