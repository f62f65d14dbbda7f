"""Constants that a form of the reflection is made of: float64 until they are rounded once.

Letters: d in_features, o out_features, r rank, k reflections that share an input.
"""

from collections.abc import Callable, Sequence
from itertools import chain, count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hra_export.graph.grouping import ReflectionSite
from hra_export.graph.products import Product

Matrix = NDArray[np.float64]
ROWS_AT_ONCE = 8192


def exact(value: ir.Value) -> Matrix:
    """A constant's elements in float64, which holds those of every narrower float type."""
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def joint_u(sites: Sequence[ReflectionSite]) -> Matrix:
    """[U_1 | … | U_k], (d, k r)."""
    return np.concatenate([exact(site.u) for site in sites], axis=1)


def among_zeros(matrix: Matrix, sites: Sequence[ReflectionSite], site: ReflectionSite) -> Matrix:
    """A matrix (r, n) of one site as its rows of one (k r, n) for all sites; the others are 0."""
    ranks = [each.rank for each in sites]
    start = sum(ranks[: sites.index(site)])
    padded = np.zeros((sum(ranks), matrix.shape[1]))
    padded[start : start + len(matrix)] = matrix
    return padded


def v_times_weight(site: ReflectionSite, product: Product) -> Matrix:
    """V W (r, o) in float64, some of W's outputs at a time."""
    v, weight = exact(site.v), product.matrix()  # (r, d), (o, d)
    starts = range(0, len(weight), ROWS_AT_ONCE)
    parts = [v @ weight[start : start + ROWS_AT_ONCE].astype(np.float64).T for start in starts]
    return np.concatenate(parts, axis=1)


def add_constant_(graph: ir.Graph, name: str, matrix: Matrix, dtype: ir.DataType) -> ir.Value:
    """A new initializer, rounded to a dtype."""
    return add_initializer_(graph, name, ir.tensor(matrix.astype(dtype.numpy()), dtype=dtype, name=name))


def add_computed_constant_(
    graph: ir.Graph, name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], Matrix]
) -> ir.Value:
    """A new initializer that is made whenever it is read, and never held: as large as a weight of the base."""

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(make().astype(dtype.numpy()), dtype=dtype, name=name)

    return add_initializer_(graph, name, ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name))


def add_initializer_(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer that holds a tensor; a number behind the name where that is taken."""
    taken = graph.initializers
    name = next(each for each in chain([name], (f"{name}_{i}" for i in count(1))) if each not in taken)
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type of a constant's elements."""
    assert value.const_value is not None
    return value.const_value.dtype
