"""Plain operators that reflect x before its products: MatMul, MatMul, Add, and close relatives.

Each takes reflections of one x, and puts operators in the place of theirs; their outputs keep their names.

Letters: d in_features, r rank, k reflections that share an input.
"""

from collections.abc import Sequence

import onnx_ir as ir

from hra_export.graph.constants import add_constant_, among_zeros, dtype_of, exact, joint_u
from hra_export.graph.grouping import ReflectionSite
from hra_export.graph.splitting import take_over_


def add_(sites: Sequence[ReflectionSite]) -> None:
    """x + (x U) V, each site by itself; U and V stay what they are, constant or fed."""
    for site in sites:
        change = _change(site, product(site.x, site.u, site.node, "XU"), site.v)
        _replace_(site, change, ir.node("Add", [site.x, change[-1].outputs[0]], name=site.name))


def subtract_(sites: Sequence[ReflectionSite]) -> None:
    """x − (x U)(−V), each site by itself."""
    for site in sites:
        negated = add_constant_(site.graph, f"{site.target}.hra_minus_V", -exact(site.v), dtype_of(site.v))
        change = _change(site, product(site.x, site.u, site.node, "XU"), negated)
        _replace_(site, change, ir.node("Sub", [site.x, change[-1].outputs[0]], name=site.name))


def gemm_(sites: Sequence[ReflectionSite]) -> None:
    """Gemm(x U, V, x), each site by itself, for an x of two dimensions."""
    for site in sites:
        coefficients = product(site.x, site.u, site.node, "XU")  # (n, r)
        total = ir.node("Gemm", [coefficients.outputs[0], site.v, site.x], name=site.name)
        _replace_(site, [coefficients], total)


def grouped_(sites: Sequence[ReflectionSite]) -> None:
    """x + (x [U_1 | … | U_k]) V_i with the rows of V_i among zeros: one first product, whose result is not split."""
    coefficients = joint_coefficients_(sites)
    for site in sites:
        name = f"{site.target}.hra_V_among_zeros"
        v = add_constant_(site.graph, name, among_zeros(exact(site.v), sites, site), dtype_of(site.v))  # (k r, d)
        change = product(coefficients, v, site.node, "XUV")
        _replace_(site, [change], ir.node("Add", [site.x, change.outputs[0]], name=site.name))


def joint_coefficients_(sites: Sequence[ReflectionSite]) -> ir.Value:
    """x [U_1 | … | U_k] (…, k r), in front of the first site; a site alone keeps its U."""
    first, u = sites[0], sites[0].u
    if len(sites) > 1:
        u = add_constant_(first.graph, f"{first.target}.hra_U_and_{len(sites) - 1}_more", joint_u(sites), dtype_of(u))
    node = product(first.x, u, first.node, "XU")
    first.graph.insert_before(first.node, node)
    return node.outputs[0]


def product(x: ir.Value, matrix: ir.Value, at: ir.Node, suffix: str) -> ir.Node:
    """A MatMul that is named after the node it works for, and its output after that node's."""
    node = ir.node("MatMul", [x, matrix], name=f"{at.name}/{suffix}")
    node.outputs[0].name = f"{at.outputs[0].name}_{suffix}"
    return node


def _change(site: ReflectionSite, coefficients: ir.Node, v: ir.Value) -> list[ir.Node]:
    return [coefficients, product(coefficients.outputs[0], v, site.node, "XUV")]


def _replace_(site: ReflectionSite, inner: Sequence[ir.Node], total: ir.Node) -> None:
    graph = site.graph
    graph.insert_before(site.node, [*inner, total])
    take_over_(site.y, total.outputs[0])
    graph.remove(site.node, safe=True)
