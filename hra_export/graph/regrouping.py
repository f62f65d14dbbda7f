"""Reflections that share an input become one node, and nodes of several reflections become single ones again.

    group_      the last of all passes: what runs with one launch each becomes one launch for all
    ungroup_    before any pass that looks at reflections one by one

U, V and outputs keep their names, so adapters are swapped as before, and nothing else of the graph changes.
"""

import itertools
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from hra_export.graph.grouped_operator import (
    GROUP_SIZES,
    Member,
    declare_used_,
    is_group,
    joint_node,
    members,
    single_node,
)
from hra_export.graph.operator import DOMAIN
from hra_export.graph.splitting import take_over_


def group_(model: ir.Model) -> int:
    """Join reflections that read the same X, with the same A, in the same graph; in place.

    The joint node stands where the first of them stood, and has its metadata. More than eight become several nodes of
    about the same size. One whose U or V is computed in the graph stays alone: it may come too late for the others.

    Args:
        model: with opaque reflections or with functions; those that are grouped already are grouped anew.

    Returns:
        How many joint nodes there are.
    """
    ungroup_(model)
    found: dict[tuple[int, ...], list[Member]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for each in members(node):
            if each.u.producer() is None and each.v.producer() is None:
                found.setdefault((id(node.graph), id(each.x), id(each.index)), []).append(each)
    parts = [part for sharing in found.values() for part in _parts(sharing) if len(part) > 1]
    for part in parts:
        _join_(part)
    _refresh_bodies_(model)
    return len(parts)


def ungroup_(model: ir.Model) -> None:
    """Replace every node of several reflections by single ones, named `<target>/hra`, in place."""
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    taken = {str(node.name) for node in nodes if not is_group(node)}
    groups = [node for node in nodes if is_group(node)]
    for node in groups:
        reflections = members(node)
        names = [_unused(f"{each.target}/hra", taken) for each in reflections]
        singles = [single_node(each, name=name) for each, name in zip(reflections, names, strict=True)]
        _replace_(node, singles, reflections)
    if groups:
        _refresh_bodies_(model)


def _parts(sharing: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """As few parts as eight allow, none more than one longer than another."""
    count = -(-len(sharing) // GROUP_SIZES[-1])
    bounds = [len(sharing) * i // count for i in range(count + 1)]
    yield from (sharing[start:end] for start, end in itertools.pairwise(bounds))


def _join_(part: Sequence[Member]) -> None:
    first = part[0].node
    _replace_(first, [joint_node(part, name=f"{first.name}_and_{len(part) - 1}_more")], part)


def _replace_(place: ir.Node, made: Sequence[ir.Node], old: Sequence[Member]) -> None:
    """Put nodes before another one, give them the outputs of the old ones, and take those out."""
    graph = place.graph
    assert graph is not None
    graph.insert_before(place, made)
    for each, y in zip(old, [output for node in made for output in node.outputs], strict=True):
        take_over_(each.y, y)
    graph.remove(dict.fromkeys(each.node for each in old), safe=True)


def _unused(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; taken by now."""
    found, i = name, 1
    while found in taken:
        i += 1
        found = f"{name}.{i}"
    taken.add(found)
    return found


def _refresh_bodies_(model: ir.Model) -> None:
    """A graph whose operators have bodies has those of its new ones; opaque nodes stay opaque."""
    if any(identifier[0] == DOMAIN for identifier in model.functions):
        declare_used_(model)
