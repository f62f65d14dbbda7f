"""Plain operators that leave x as it is and give its products ΔW's part: x W + (x U)(V W), and close relatives.

V W is computed in float64 from the constants of the graph, and rounded once. Each form takes reflections of one x whose
outputs only products with constant matrices read; the outputs of these keep their names. For a Gemm, W stands for its
matrix as it multiplies, and the rest of the Gemm stays.

Letters: d in_features, o out_features, r rank, k reflections that share an input.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from hra_export.graph.constants import (
    Matrix,
    add_computed_constant_,
    add_constant_,
    add_initializer_,
    among_zeros,
    dtype_of,
    exact,
    v_times_weight,
)
from hra_export.graph.grouping import ReflectionSite, matrix_shape
from hra_export.graph.input_forms import joint_coefficients_, product
from hra_export.graph.products import Product
from hra_export.graph.splitting import take_over_


def output_(sites: Sequence[ReflectionSite]) -> None:
    """x W + (x U)(V W), each site by itself: what LoRA with A = U and B = V W looks like."""
    for site in sites:
        output_grouped_([site])


def output_grouped_(sites: Sequence[ReflectionSite]) -> None:
    """The same with one x [U_1 | … | U_k] for all sites, and the rows of V W among zeros."""
    x, coefficients = sites[0].x, joint_coefficients_(sites)
    for site, each, change in _changes(sites):
        node, (y,) = each.node, each.node.outputs
        vw = add_constant_(site.graph, f"{site.target}.hra_VW", change, dtype_of(each.weight))  # (k r, o)
        added = product(coefficients, vw, node, "hra_XUVW")
        total = ir.node("Add", [y, added.outputs[0]], name=f"{node.name}/hra")
        node.replace_input_with(0, x)
        take_over_(y, total.outputs[0])
        total.replace_input_with(0, y)  # take_over_ has put the sum there too
        site.graph.insert_after(node, [added, total])
    _remove_(sites)


def packed_(sites: Sequence[ReflectionSite]) -> None:
    """x [W | U] and a Split, each site by itself: x W and x U are one product. For one MatMul a site."""
    for site in sites:
        (each,) = site.products
        graph, node, (y,) = site.graph, each.node, each.node.outputs
        (d, o), dtype = matrix_shape(each.weight), dtype_of(each.weight)
        make = partial(_beside, each.weight, site.u)
        wide = add_computed_constant_(graph, f"{site.target}.hra_W_U", (d, o + site.rank), dtype, make)
        vw = add_constant_(graph, f"{site.target}.hra_VW", v_times_weight(site, each), dtype)
        sizes = add_initializer_(graph, f"{site.target}.hra_sizes", ir.tensor(np.array([o, site.rank])))
        both = product(site.x, wide, node, "hra_XW_XU")
        split = ir.node("Split", [both.outputs[0], sizes], {"axis": -1}, num_outputs=2, name=f"{node.name}/hra_split")
        for output, suffix in zip(split.outputs, ("XW", "XU"), strict=True):
            output.name = f"{y.name}_hra_{suffix}"
        added = product(split.outputs[1], vw, node, "hra_XUVW")
        total = ir.node("Add", [split.outputs[0], added.outputs[0]], name=f"{node.name}/hra")
        graph.insert_before(node, [both, split, added, total])
        take_over_(y, total.outputs[0])
        graph.remove(node, safe=True)
    _remove_(sites)


def augmented_(sites: Sequence[ReflectionSite]) -> None:
    """[x | x U_1 | … | x U_k] times [W; V W], V W's rows among zeros: two small operators for all sites."""
    first, coefficients = sites[0], joint_coefficients_(sites)
    graph = first.graph
    wide = ir.node("Concat", [first.x, coefficients], {"axis": -1}, name=f"{first.name}/X_XU")
    wide.outputs[0].name = f"{first.y.name}_X_XU"
    graph.insert_before(first.node, wide)
    for site, each, change in _changes(sites):
        rows, columns = matrix_shape(each.weight)
        more = len(change)
        shape = (rows, columns + more) if each.is_transposed else (rows + more, columns)
        make = partial(_below, each, change)
        weight = add_computed_constant_(graph, f"{site.target}.hra_W_VW", shape, dtype_of(each.weight), make)
        each.node.replace_input_with(0, wide.outputs[0])
        each.node.replace_input_with(1, weight)
    _remove_(sites)


def _changes(sites: Sequence[ReflectionSite]) -> Iterator[tuple[ReflectionSite, Product, Matrix]]:
    """Every product with its V W (k r, o), zero but for the rows of its site."""
    for site in sites:
        for each in site.products:
            yield site, each, among_zeros(v_times_weight(site, each), sites, site)


def _beside(weight: ir.Value, u: ir.Value) -> Matrix:
    return np.concatenate([exact(weight), exact(u)], axis=1)


def _below(each: Product, change: Matrix) -> Matrix:
    """[W; V W] as the product's matrix is stored."""
    if each.is_transposed:
        return np.concatenate([exact(each.weight), change.T], axis=1)
    return np.concatenate([exact(each.weight), change], axis=0)


def _remove_(sites: Sequence[ReflectionSite]) -> None:
    for site in sites:
        site.graph.remove(site.node, safe=True)
