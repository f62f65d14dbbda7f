"""Graphs by tracing: a checkpoint, loaded, with the adapters at work or folded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from torch import Tensor

from hra_export import modelcard
from hra_export.adapter import HraAdapter
from hra_export.attachment import Attachment, attach
from hra_export.checkpoint import WEIGHT_SUFFIXES
from hra_export.companions import changed_config, companion_files
from hra_export.errors import CheckpointError, MismatchError
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import graph_specs
from hra_export.graph.labelling import check_reflections
from hra_export.graph.making import MadeGraphs, Say
from hra_export.graph.options import GraphOptions
from hra_export.graph.tracing import make_traceable_, used_reflections
from hra_export.loading import load_model
from hra_export.plan import MergePlan


@dataclass(frozen=True)
class TracedSource:
    """A checkpoint; `plan` is of the merge that the graph computes the same as."""

    plan: MergePlan

    @property
    def root(self) -> Path:
        """The directory of the base."""
        return self.plan.base.root

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's weights and configuration."""
        return self.plan.base.fingerprint()

    def make(self, options: GraphOptions, scratch: Path, *, say: Say) -> MadeGraphs:
        """Trace the base with its adapters, folded or live, in float32.

        Raises:
            CheckpointError: the base cannot be loaded, or lacks parameters that the adapters do not bring.
            MismatchError: adapters that are swapped bring different biases or saved modules.
            UnsupportedModelError: no graph is known for this architecture.
        """
        say(f"loading `{self.root}`")
        model, missing = load_model(self.plan.base, {**self.plan.base.config, **self.plan.config_changes})
        adapters = self.plan.adapters if options.swap == "none" else (all_targets(self.plan.adapters),)
        attachment = attach(model, *adapters, strength=options.linear, interpolation="linear")
        if untrained := missing - {name for adapter in adapters for name in adapter.parameters}:
            raise CheckpointError(
                f"base `{self.root}` lacks parameters that no adapter brings", findings=sorted(untrained)
            )
        notes = _rotate_(attachment, options)
        specs = graph_specs(model)
        graphs = {}
        for spec in specs:
            say(f"tracing {spec.name}: {type(model).__name__}, {spec.task}")
            graphs[spec.name] = export_graph(spec, opset=options.opset, fusions=options.fusions)
        used, idle = used_reflections(model)
        check_reflections(list(graphs.values()), used)
        if idle:
            notes = (
                *notes,
                f"{len(idle)} targets never run in this model, so their chains do nothing: {', '.join(idle)}",
            )
        files = graph_files(self.plan, options)
        companions = {name: path for name, path in graph_companions(self.plan).items() if name not in files}
        return MadeGraphs(graphs, specs[0].family, specs[0].task, notes, files, companions, attachment.renamed)


def graph_companions(plan: MergePlan) -> dict[str, Path]:
    """Output name → file to copy: what a merge of this component would carry along, weights apart."""
    component = plan.base.component
    found = companion_files(plan)
    if component:  # a pipeline's other components stay with the pipeline
        prefix = f"{component}/"
        found = {name.removeprefix(prefix): path for name, path in found.items() if name.startswith(prefix)}
    return {name: path for name, path in found.items() if PurePosixPath(name).suffix not in WEIGHT_SUFFIXES}


def graph_files(plan: MergePlan, options: GraphOptions) -> dict[str, bytes]:
    """The model card, and a configuration that must change."""
    config = {PurePosixPath(name).name: data for name, data in changed_config(plan).items()}
    return {"README.md": modelcard.graph_card(plan, options.mode).encode(errors="replace"), **config}


def _rotate_(attachment: Attachment, options: GraphOptions) -> tuple[str, ...]:
    """Fold the live layers, or make them traceable; what a user should know of it."""
    if options.mode == "merged":
        attachment.fold_()
        return ()
    folded = make_traceable_(attachment)
    if not folded:
        return ()
    return (f"{len(folded)} targets lie inside stacked parameters and are folded: {', '.join(folded[:3])}, …",)


def all_targets(adapters: Sequence[HraAdapter]) -> HraAdapter:
    """One adapter with every target that any has: the places of a swappable graph.

    Raises:
        MismatchError: biases or saved modules differ; they are part of the graph and cannot be swapped.
    """
    chains = {path: vectors for adapter in reversed(adapters) for path, vectors in adapter.chains.items()}
    findings = []
    parameters: dict[str, Tensor] = {}
    for adapter in adapters:
        for name in sorted(adapter.parameters.keys() | parameters.keys()):
            value, known = adapter.parameters.get(name), parameters.get(name)
            if adapter is not adapters[0] and (value is None or known is None or not value.equal(known)):
                findings.append(f"{name}: `{adapter.label}` has another value than `{adapters[0].label}`, or none")
        parameters = parameters or dict(adapter.parameters)
    if findings:
        raise MismatchError(
            "these adapters cannot be swapped for one another",
            findings=findings,
            hint="biases and saved modules are part of the graph: export one graph for each",
        )
    first = adapters[0]
    return HraAdapter(
        chains,
        first.rank,
        orthogonalize=first.orthogonalize,
        parameters=parameters,
        modules_to_save=first.modules_to_save,
    )
