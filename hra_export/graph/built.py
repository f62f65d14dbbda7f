"""Graphs for ONNX Runtime GenAI: by its own builder, or traced where the builder has no graph for an architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hra_export.errors import UnsupportedModelError
from hra_export.graph.genai import build_genai, traced_genai
from hra_export.graph.making import MadeGraphs, Say
from hra_export.graph.options import GraphOptions
from hra_export.graph.traced import TracedSource, all_targets, graph_companions, graph_files
from hra_export.merge import merge_checkpoint
from hra_export.plan import DtypeChoice, MergePlan
from hra_export.planning import plan_merge

DTYPE_CHOICES: Mapping[torch.dtype, DtypeChoice] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class BuiltSource:
    """A checkpoint, and how to trace it where it cannot be built."""

    traced: TracedSource

    @property
    def plan(self) -> MergePlan:
        """Of the merge that the graph computes the same as."""
        return self.traced.plan

    @property
    def root(self) -> Path:
        """As of the traced source."""
        return self.traced.root

    @property
    def fingerprint(self) -> str:
        """As of the traced source."""
        return self.traced.fingerprint

    def make(self, options: GraphOptions, scratch: Path, *, say: Say) -> MadeGraphs:
        """Build the graph of the merged weights, or that of the base's with the chains inserted.

        Raises:
            as `build_genai`, `merge_checkpoint` and `TracedSource.make`.
        """
        directory = self._directory(options, scratch, say)
        adapters = self.plan.adapters if options.swap == "none" else (all_targets(self.plan.adapters),)
        say(f"building the graph of `{directory}`")
        try:
            made = build_genai(directory, adapters, scratch, options)
        except UnsupportedModelError as error:
            say(f"{error.message}: it is traced instead")
            made = self.traced.make(options, scratch, say=say)
            return traced_genai(made, directory, options.provider)
        files = {**graph_files(self.plan, options), **made.files}
        companions = {name: path for name, path in graph_companions(self.plan).items() if name not in files}
        return replace(made, files=files, companions=companions)

    def _directory(self, options: GraphOptions, scratch: Path, say: Say) -> Path:
        """What is built: the base, or a merge of it that holds the chains, or only what was trained beside them."""
        adapters = self.plan.adapters if options.swap == "none" else self.plan.adapters[:1]
        if options.mode == "reflect":
            adapters = tuple(replace(adapter, chains={}) for adapter in adapters if adapter.parameters)
        if not adapters:
            return self.root
        say("merging" if options.mode == "merged" else "putting biases and saved modules into the base")
        plan = plan_merge(
            self.plan.base,
            adapters,
            strength=options.linear,
            interpolation="linear",
            dtype=DTYPE_CHOICES[options.activations],
        )
        merge_checkpoint(plan, scratch / "merged")
        return scratch / "merged"
