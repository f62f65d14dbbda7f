"""Which adapters a candidate is judged with: what is built in, or one adapter file after another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hra_export.adapter import HraAdapter
from hra_export.graph.swap_sites import ADAPTER_INDEX, U_SUFFIX
from hra_export.validation.candidates import ADAPTER_SUFFIX, GraphCandidate, Strength, promised_strength


@dataclass(frozen=True)
class Case:
    """Adapters at work, on both sides.

    Attributes:
        adapters: of the reference, in the order they compose.
        files: to switch on in the candidate, by the role of the graph; empty for what is built in.
        name: of the case; empty when there is only one.
        strength: of the adapters, and its interpolation.
    """

    adapters: Sequence[HraAdapter]
    files: Mapping[str, Path] = field(default_factory=dict)
    name: str = ""
    strength: Strength = (1.0, "geodesic")

    @property
    def suffix(self) -> str:
        """Behind a title."""
        return f", {self.name}" if self.name else ""

    def label(self, text: str) -> str:
        """A name in the report that says which case it belongs to."""
        return f"{self.name}: {text}" if self.name else text


def is_swappable(candidate: GraphCandidate) -> bool:
    """Whether a graph takes its adapter as an input."""
    defaults = (name for graph in candidate.graphs.values() for name in graph.signature.defaults)
    return any(name.endswith(U_SUFFIX) for name in defaults)


def names_rows(candidate: GraphCandidate) -> bool:
    """Whether each row of a batch names its adapter."""
    return is_swappable(candidate) and ADAPTER_INDEX in candidate.main.signature.inputs


def cases_of(candidate: GraphCandidate, adapters: Sequence[HraAdapter]) -> tuple[list[Case], list[str], list[str]]:
    """The cases of a candidate, findings and notes.

    An adapter file belongs to the adapters whose digests stand beside it; one that nothing stands beside, to all.
    """
    built_in = Case(adapters, strength=promised_strength(candidate.manifest))
    if not is_swappable(candidate):
        return [built_in], [], []
    by_digest = {adapter.digest: adapter for adapter in adapters if adapter.digest}
    cases: list[Case] = []
    notes: list[str] = []
    used: set[str] = set()
    for name, files in candidate.adapter_files.items():
        descriptions = [_description(file) for file in files.values()]
        digests = list(dict.fromkeys(digest for each in descriptions for digest in _digests(each)))
        unknown = [digest for digest in digests if digest not in by_digest]
        if unknown:
            notes.append(f"`{name}{ADAPTER_SUFFIX}` was not judged: its adapter is not among those that were given")
            continue
        chosen = [by_digest[digest] for digest in digests] if digests else list(adapters)
        used.update(digests or by_digest)
        cases.append(Case(chosen, files, name, promised_strength(descriptions[0])))
    if len(cases) == 1:
        cases = [replace(cases[0], name="")]
    findings = [
        f"`{adapter.label}`: the candidate has no file of this adapter"
        for digest, adapter in by_digest.items()
        if digest not in used
    ]
    if not cases and candidate.manifest.get("default") == "adapter":
        return [built_in], [], notes
    return cases, findings, notes


def _description(file: Path) -> Mapping[str, Any]:
    """What lies beside an adapter file."""
    beside = file.with_name(file.name + ".json")
    description: Mapping[str, Any] = json.loads(beside.read_bytes()) if beside.is_file() else {}
    return description


def _digests(description: Mapping[str, Any]) -> list[str]:
    """Of the adapters that a file was made of."""
    return [str(entry["digest"]) for entry in description.get("adapters", ())]
