"""What graphs are made of: a source, which is a base with its adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from hra_export.graph.families import Family
from hra_export.graph.options import GraphOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class MadeGraphs:
    """Graphs with opaque reflections, not yet finished, and what else belongs into the directory.

    Their activations are float32, or already what the options ask for.

    Attributes:
        graphs: file stem → graph; they may share the memory of their initializers.
        family: what kind of model they belong to; decides how they are fed.
        task: in the words of the Hub; empty when it is not known.
        notes: what a user should know, one sentence each.
        files: further files, by name.
        companions: files to copy, by their name in the output.
        renamed: target of an adapter → its name in the graphs, where they differ.
    """

    graphs: Mapping[str, ir.Model]
    family: Family
    task: str = ""
    notes: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    companions: Mapping[str, Path] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


class GraphSource(Protocol):
    """A base with adapters that graphs can be made of."""

    @property
    def root(self) -> Path:
        """The file or directory of the base."""

    @property
    def fingerprint(self) -> str:
        """A digest that tells the base from every other."""

    def make(self, options: GraphOptions, scratch: Path, *, say: Say) -> MadeGraphs:
        """The graphs, each call anew; weights may lie in the folder `scratch` until they are saved."""
