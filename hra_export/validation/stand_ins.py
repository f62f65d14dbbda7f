"""Copies of a candidate's graphs that run in its place, for as long as they are needed."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hra_export.graph.variants import make_variant, widen
from hra_export.validation.candidates import GraphCandidate


@contextmanager
def runnable(candidate: GraphCandidate, provider: str, notes: list[str]) -> Iterator[Mapping[str, Path]]:
    """The graphs as they are, or as float32 where the provider has no bfloat16."""
    graphs = {role: graph.path for role, graph in candidate.graphs.items()}
    keeps = candidate.manifest.get("precision") == "keep"  # judged as bf16 where its base is in that
    if candidate.precision != "bf16" or keeps or provider != "cpu":
        yield graphs
        return
    notes.append("the CPU computes no bfloat16: the graph was run in float32 with the same weights")
    with tempfile.TemporaryDirectory(prefix="hra-export-wide-") as folder:
        for role in graphs:
            Path(folder, role).mkdir()
        yield {role: widen(path, Path(folder, role)) for role, path in graphs.items()}


@contextmanager
def variants_of(graphs: Mapping[str, Path], change: Callable[[Any], None]) -> Iterator[Mapping[str, Path]]:
    """Changed copies of graphs, by role, for as long as they are needed."""
    with tempfile.TemporaryDirectory(prefix="hra-export-variant-") as folder:
        variants = {}
        for role, path in graphs.items():
            place = Path(folder, role)
            place.mkdir()
            variants[role] = make_variant(path, place, change)
        yield variants
