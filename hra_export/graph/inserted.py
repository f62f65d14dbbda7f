"""Graphs from graphs: a file of the base that exists already, into which the reflections are put."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph.document import open_graph
from hra_export.graph.families import Family
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.making import MadeGraphs, Say
from hra_export.graph.options import GraphOptions
from hra_export.graph.traced import all_targets

SAMPLE_BYTES = 4096
# By the first input that a graph has of these; the rest are encoders.
FAMILIES: dict[str, Family] = {"timestep": "denoiser", "pixel_values": "image", "input_ids": "encoder"}


@dataclass(frozen=True)
class InsertedSource:
    """An ONNX file of the base.

    Attributes:
        path: of the file.
        adapters: composed in the order given.
    """

    path: Path
    adapters: Sequence[HraAdapter]

    @property
    def root(self) -> Path:
        """The file."""
        return self.path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the file, and over both ends of every weight that lies outside of it."""
        digest = hashlib.sha256(self.path.read_bytes())
        for value in open_graph(self.path).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                data = tensor.numpy().reshape(-1).view("uint8")
                digest.update(data[:SAMPLE_BYTES].tobytes())
                digest.update(data[-SAMPLE_BYTES:].tobytes())
        return digest.hexdigest()

    def make(self, options: GraphOptions, scratch: Path, *, say: Say) -> MadeGraphs:
        """Insert the reflections.

        Raises:
            GraphError: the file cannot be used.
            MismatchError: a target has no place in the graph, or more than one; all of them.
            UnsupportedModelError: `merged` was asked for.
        """
        if options.mode == "merged":
            raise UnsupportedModelError(
                f"`{self.path}` is a graph: its weights are not folded into",
                hint="ask for `--mode reflect`, or merge the checkpoint that the graph was exported from",
            )
        say(f"inserting reflections into `{self.path}`")
        model = open_graph(self.path)
        adapters = self.adapters if options.swap == "none" else (all_targets(self.adapters),)
        report = insert_reflections_(model, adapters, strength=options.linear)
        return MadeGraphs({"model": model}, family_of(model), "", report.notes, {}, self._companions())

    def _companions(self) -> dict[str, Path]:
        """What lies beside the file and describes the model: its configurations and tokenizer."""
        kinds = (".json", ".txt", ".jinja", ".model")
        beside = sorted(path for path in self.path.parent.iterdir() if path.is_file() and path.suffix in kinds)
        return {path.name: path for path in beside if path.name != MANIFEST_NAME}


def graph_file(base: Path) -> Path | None:
    """The ONNX file that a base is, or that its directory holds instead of a checkpoint; None for a checkpoint.

    Raises:
        GraphError: the directory holds several graphs.
    """
    if base.suffix == ".onnx" and base.is_file():
        return base
    if not base.is_dir() or any(base.glob("*.safetensors*")) or (base / "model_index.json").exists():
        return None
    found = sorted(base.glob("*.onnx"))
    if len(found) > 1:
        raise GraphError(f"base `{base}` holds {len(found)} graphs", hint="pass one of the files as base")
    return found[0] if found else None


def family_of(model: ir.Model) -> Family:
    """What kind of model a graph is of, by its inputs."""
    names = {str(value.name) for value in model.graph.inputs}
    if any(name.startswith("past_key_values") for name in names):
        return "decoder"
    return next((family for name, family in FAMILIES.items() if name in names), "encoder")
