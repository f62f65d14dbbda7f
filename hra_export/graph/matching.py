"""Which sites of an existing graph are the targets of an adapter. Strict: one answer, or every finding.

A target is looked up by its own name, then in the GenAI builder's spelling, then with one prefix for the whole
adapter that the graph's names lack or add (`bert.`). A fused target may be split over several sites of the graph, which
then share its chain; a site may pack several targets, and is then split by its outputs.
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hra_export.graph.grouped_operator import is_operator
from hra_export.graph.sites import LOOKUPS, Site

# Products that some graphs split and others pack, in the order of their outputs.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Spelling of transformers → of the GenAI builder, part by part.
BUILDER_NAMES = {"self_attn": "attn"}
NEAREST = 3


@dataclass(frozen=True)
class Part:
    """A target's place inside a packed site: which of its outputs."""

    site: Site
    position: int
    members: tuple[str, ...]


@dataclass
class Matches:
    """Target → its sites, or its part of one, and everything that does not fit."""

    sites: dict[str, list[Site]] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shift: tuple[str, str] = ("", "")

    def spellings(self, name: str) -> list[str]:
        """How the graph may call a module, most literal first."""
        return spellings(name, self.shift)


class SiteIndex:
    """Sites by each of their names; a better kind of name hides the worse ones."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._kinds: tuple[dict[str, list[Site]], ...] = (defaultdict(list), defaultdict(list), defaultdict(list))
        self._nodes = {site.node.name: site for site in sites if site.node.name}
        for site in sites:
            for kind, name in zip(self._kinds, site.names, strict=True):
                if name is not None:
                    kind[name].append(site)

    def find(self, name: str) -> list[Site]:
        """The sites of a module path, by the best kind of name that has it."""
        return next((kind[name] for kind in self._kinds if name in kind), [])

    def by_node(self, name: str) -> list[Site]:
        """The site of a node's name."""
        return [self._nodes[name]] if name in self._nodes else []

    def names(self) -> list[str]:
        """Every module path that a site goes by."""
        return sorted({name for kind in self._kinds for name in kind})


def match(targets: Mapping[str, int], sites: Sequence[Site], rename: Mapping[str, str]) -> Matches:
    """Find the sites of every target.

    Args:
        targets: module path → d of its chain.
        sites: of the graph.
        rename: target → the module path or node name that it has in the graph, where that cannot be guessed.
    """
    index, matches = SiteIndex(sites), Matches()
    pending = [
        target
        for target in targets
        if not any(_take(matches, index, target, name) for name in matches.spellings(rename.get(target, target)))
    ]
    _match_shifted(matches, index, pending, rename)
    for target in targets:
        if target in matches.sites:
            matches.findings += _misfits(target, targets[target], matches.sites[target])
        elif target in matches.parts:
            matches.findings += _misfits(target, targets[target], [matches.parts[target].site])
        else:
            matches.findings.append(f"{target}: no product with weights of this name{_nearest(target, index)}")
    matches.findings += _collisions(matches)
    matches.findings += _unmatched_sharers(matches, sites)
    return matches


def _take(matches: Matches, index: SiteIndex, target: str, name: str) -> bool:
    """Note where a name leads; False when it leads nowhere."""
    found = index.find(name) or index.by_node(name)
    stem, dot, leaf = name.rpartition(".")
    if not found and leaf in FUSED:
        pieces = [index.find(f"{stem}{dot}{member}") for member in FUSED[leaf]]
        found = [site for piece in pieces for site in piece] if all(pieces) else []
        matches.notes += [f"{target}: its chain acts in front of {len(found)} products"] if found else []
    if found:
        matches.sites[target] = found
        return True
    for fused, members in FUSED.items():
        if leaf in members and len(packed := index.find(f"{stem}{dot}{fused}")) == 1:
            matches.parts[target] = Part(packed[0], members.index(leaf), members)
            return True
    return False


def _match_shifted(matches: Matches, index: SiteIndex, pending: Sequence[str], rename: Mapping[str, str]) -> None:
    """Try one prefix for all that were not found: the graph may be of a model inside the adapter's, or around it."""
    shift = common_shift([rename.get(target, target) for target in pending], index.names())
    if shift is None:
        return
    matches.shift = dropped, added = shift
    for target in pending:
        any(_take(matches, index, target, name) for name in matches.spellings(rename.get(target, target)))
    matches.notes.append(f"names matched with the prefix `{dropped or added}` {'dropped' if dropped else 'added'}")


def spellings(name: str, shift: tuple[str, str] = ("", "")) -> list[str]:
    """How a graph may call a module, most literal first.

    Args:
        name: module path.
        shift: a prefix that the graph's names lack, and one that they add.
    """
    dropped, added = shift
    shifted = added + name.removeprefix(dropped)
    return list(dict.fromkeys([name, builder_name(name), shifted, builder_name(shifted)]))


def common_shift(targets: Sequence[str], known: Sequence[str]) -> tuple[str, str] | None:
    """The prefix, dropped or added, that makes most names of a graph out of targets; None when no one leads.

    Args:
        targets: module paths that the graph has not as they are.
        known: the module paths of the graph.
    """
    shifts = Counter(shift for target in targets for shift in _shifts(target, known))
    counts = list(shifts.values())
    if not counts or counts.count(max(counts)) > 1:
        return None
    return shifts.most_common(1)[0][0]


def _shifts(target: str, known: Sequence[str]) -> set[tuple[str, str]]:
    """The prefixes (dropped, added) that would make a name of the graph out of a target."""
    found = set()
    forms = {target, builder_name(target)}
    for form in list(forms):
        stem, dot, leaf = form.rpartition(".")
        forms |= {f"{stem}{dot}{fused}" for fused, members in FUSED.items() if leaf in members}
        forms |= {f"{stem}{dot}{member}" for member in FUSED.get(leaf, ())}
    for form in forms:
        for name in known:
            if name.endswith(f".{form}"):
                found.add(("", name.removesuffix(form)))
            elif form.endswith(f".{name}"):
                found.add((form.removesuffix(name), ""))
    return found


def builder_name(name: str) -> str:
    """A module path in the spelling of the GenAI builder."""
    return ".".join(BUILDER_NAMES.get(part, part) for part in name.split("."))


def _nearest(target: str, index: SiteIndex) -> str:
    near = difflib.get_close_matches(target, index.names(), NEAREST, cutoff=0.6)
    return f"; nearest: {', '.join(f'`{name}`' for name in near)}" if near else ""


def _misfits(target: str, features: int, sites: Sequence[Site]) -> Iterator[str]:
    if not _is_one_module(sites):
        yield f"{target}: {len(sites)} places go by this name: {', '.join(site.label for site in sites)}"
    for site in sites:
        if site.refusal is not None:
            yield f"{target}: {site.label}: {site.refusal}"
        elif site.features != features:
            yield f"{target}: {site.label}: expected U of shape ({site.features}, r), got ({features}, r)"
        elif _is_reflected(site):
            yield f"{target}: {site.label} is reflected already"


def _is_one_module(sites: Sequence[Site]) -> bool:
    """Whether sites are one weight used several times, or different products of one input: parts of a fused target."""
    if len({site.kind for site in sites}) > 1:
        return False
    if len(sites) == 1 or (len({id(site.node.inputs[0]) for site in sites}) == 1 and _are_parts(sites)):
        return True
    return all(_is_same_weight(sites[0], site) for site in sites[1:])


def _are_parts(sites: Sequence[Site]) -> bool:
    leaves = {name.rpartition(".")[2] for site in sites for name in site.names if name is not None}
    return any(set(members) <= leaves and len(sites) == len(members) for members in FUSED.values())


def _is_same_weight(one: Site, other: Site) -> bool:
    if one.weight_source is other.weight_source:
        return True
    if one.weight is None or other.weight is None or one.weight.shape != other.weight.shape:
        return False
    return np.array_equal(one.weight.array(), other.weight.array())


def _is_reflected(site: Site) -> bool:
    """Whether a chain acts on a site already, under whatever name."""
    if site.kind == "lookup":
        return any(is_operator(node) for node in site.node.outputs[0].consumers())
    if site.kind == "convolution":
        sums = [node for node in site.node.outputs[0].consumers() if node.op_type == "Add"]
        return any(_is_small_convolution(value) for node in sums for value in node.inputs)
    producer = site.node.inputs[0].producer() if site.node.inputs[0] is not None else None
    if producer is None or not is_operator(producer):
        return False
    before = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return before is None or before.op_type not in LOOKUPS  # behind a lookup it is the lookup's


def _is_small_convolution(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    constants = producer.inputs[1:] if producer is not None and producer.op_type == "Conv" else ()
    return any((constant.name or "").endswith(".hra_B") for constant in constants if constant is not None)


def _collisions(matches: Matches) -> Iterator[str]:
    """Targets that lead to one node: a whole node is for one target, a part of one too."""
    users: dict[tuple[int, int | None], list[str]] = defaultdict(list)
    labels: dict[int, str] = {}
    for target, sites in matches.sites.items():
        for site in sites:
            users[id(site.node), None].append(target)
            labels[id(site.node)] = site.label
    for target, part in matches.parts.items():
        whole = users.get((id(part.site.node), None), [])
        users[id(part.site.node), part.position] += [*whole, target]
        labels[id(part.site.node)] = part.site.label
    for (key, _), names in users.items():
        if len(names) > 1:
            yield f"{', '.join(names)}: all lead to {labels[key]}"


def _unmatched_sharers(matches: Matches, sites: Sequence[Site]) -> Iterator[str]:
    """A weight that is used again where no target leads: one module that runs twice, of which one run was found."""
    taken = {id(site.node) for found in matches.sites.values() for site in found}
    taken |= {id(part.site.node) for part in matches.parts.values()}
    sharers: dict[tuple[int, str], list[Site]] = defaultdict(list)
    for site in sites:
        sharers[id(site.weight_source), site.kind].append(site)
    for target, found in matches.sites.items():
        for site in found:
            for other in sharers[id(site.weight_source), site.kind]:
                if id(other.node) not in taken:
                    yield f"{target}: {other.label} uses the same weight, and no target leads to it"
