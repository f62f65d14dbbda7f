"""Export: base and adapters as ONNX graphs, in a directory that appears whole or not at all.

    plan_export(…)     checks everything that headers tell
    export_graphs(…)   makes the graphs, finishes them, stages and publishes

A base is a checkpoint, which is traced for ONNX Runtime or built for ONNX Runtime GenAI, or a graph that exists, into
which the reflections are inserted.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import torch

from hra_export import publish
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint, open_checkpoint
from hra_export.codebook import CodebookMatrix
from hra_export.graph import document
from hra_export.graph.built import BuiltSource
from hra_export.graph.finishing import Finished, finish_, write_adapters
from hra_export.graph.inserted import InsertedSource, graph_file
from hra_export.graph.kept_bits import Matrix
from hra_export.graph.making import GraphSource, MadeGraphs, Say
from hra_export.graph.options import FLOATS, GraphOptions
from hra_export.graph.provenance import provenance
from hra_export.graph.traced import TracedSource
from hra_export.plan import MergePlan
from hra_export.planning import plan_merge
from hra_export.strength import Strengthened, take_strength

# What decides the bytes of a graph, beside its inputs.
TOOLS = ("hra-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class ExportPlan:
    """Everything an export will do.

    Attributes:
        source: where the graphs come from.
        adapters: composed in the order given, at the strength asked for; for a swappable graph each stands for itself.
        options: how they are written.
        notes: what a user should know about the plan, one sentence each.
        blocks: what the weights of a quantized base are made of, by parameter name.
    """

    source: GraphSource
    adapters: tuple[HraAdapter, ...]
    options: GraphOptions
    notes: tuple[str, ...] = ()
    blocks: Mapping[str, Matrix] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[HraAdapter, ...]:
        """The adapters as they were given."""
        return tuple(source for adapter in self.adapters for source in adapter.sources)

    @property
    def targets(self) -> tuple[str, ...]:
        """Every module path that a chain stands before, in order."""
        return tuple(dict.fromkeys(path for adapter in self.adapters for path in adapter.chains))


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    output: Path
    graphs: Mapping[str, Finished]
    family: str
    task: str
    size_bytes: int
    notes: tuple[str, ...]


def plan_export(
    base: Path,
    adapters: Sequence[HraAdapter],
    options: GraphOptions,
    *,
    blocks: Mapping[str, Matrix] | None = None,
) -> ExportPlan:
    """Check that adapters and base fit, from headers only.

    Args:
        base: directory of transformers or diffusers, or an ONNX file.
        adapters: composed in the order given; for a swappable graph each stands for itself.
        options: how to write it.
        blocks: where `base` is a quantized one, dequantized: what its weights are made of, by parameter name.

    Raises:
        ValueError: precision `keep` for a checkpoint that is not quantized.
        CheckpointError, ConversionError, MismatchError, NumericalError, UnsupportedModelError: as `plan_merge`.
    """
    file = graph_file(base)
    if file is not None:
        taken = _strengthened(adapters, options)
        return ExportPlan(InsertedSource(file, taken.adapters), taken.adapters, options, taken.notes)
    if options.precision == "keep" and not blocks:
        raise ValueError(f"`{base}` is not quantized, so there are no bits to keep: ask for fp32 or another precision")
    merge = _plan_merge(open_checkpoint(base), adapters, options)
    traced = TracedSource(merge)
    source = BuiltSource(traced) if options.runtime == "genai" else traced
    return ExportPlan(source, merge.adapters, options, merge.notes, blocks or {})


def _plan_merge(base: Checkpoint, adapters: Sequence[HraAdapter], options: GraphOptions) -> MergePlan:
    """Of the merge that the graph computes the same as; of a swappable one, which shows that every adapter fits."""
    if options.swap == "none":
        return plan_merge(base, adapters, strength=options.strength, interpolation=options.interpolation)
    fits = plan_merge(base, adapters)
    taken = _strengthened(adapters, options)
    notes = (*fits.notes, *taken.notes)
    return replace(
        fits,
        adapters=taken.adapters,
        strength=options.strength,
        interpolation=options.interpolation,
        notes=notes,
    )


def _strengthened(adapters: Sequence[HraAdapter], options: GraphOptions) -> Strengthened:
    """The adapters' product, or each adapter of a swappable graph, at the strength asked for."""
    groups = [adapters] if options.swap == "none" else [[adapter] for adapter in adapters]
    taken = [take_strength(group, options.strength, options.interpolation) for group in groups]
    notes = dict.fromkeys(note for each in taken for note in each.notes)
    return Strengthened(tuple(adapter for each in taken for adapter in each.adapters), options.linear, tuple(notes))


def export_graphs(plan: ExportPlan, output: Path, *, overwrite: bool = False, say: Say | None = None) -> ExportReport:
    """Write the directory that `plan` describes.

    Args:
        plan: from `plan_export`.
        output: directory to be made.
        overwrite: replace an earlier output of ours.
        say: told about each stage.

    Raises:
        OutputError: the output exists, the disk is full or cannot be written, another run holds the lock.
        UnsupportedModelError: no graph is known for this architecture.
        GraphError: the graph is not as it should be: a target that the trace lost, say.
        NumericalError: weights that the precision cannot hold.
    """
    tell = say or (lambda text: None)
    protected = [plan.source.root, *(adapter.path for adapter in plan.sources if adapter.path is not None)]
    publish.check_output(output, overwrite=overwrite, protected=protected, manifest_name=MANIFEST_NAME)
    with tempfile.TemporaryDirectory(prefix="hra-export-") as folder:
        scratch = Path(folder)
        made = plan.source.make(plan.options, scratch, say=tell)
        tell("finishing")
        finished = _finish(plan, made)
        companions = {**made.companions, **_adapter_files(plan, finished, scratch)}
        size = sum(document.size_bytes(model) for model in made.graphs.values())
        total = size + sum(map(len, made.files.values())) + sum(path.stat().st_size for path in companions.values())
        key = _key(plan)
        with publish.stage(output, key=key, size_bytes=total, overwrite=overwrite, protected=protected) as stage:
            for name, model in made.graphs.items():
                tell(f"writing {name}.onnx")
                document.save_graph(model, stage, name)
            for name, path in companions.items():
                stage.copy(path, name)
            for name, data in made.files.items():
                stage.write_bytes(name, data)
            notes = (*plan.notes, *made.notes, *(note for graph in finished.values() for note in graph.notes))
            report = ExportReport(output, finished, made.family, made.task, size, notes)
            stage.publish(MANIFEST_NAME, _manifest(plan, report))
    return report


def _finish(plan: ExportPlan, made: MadeGraphs) -> dict[str, Finished]:
    properties = provenance(
        mode=plan.options.mode,
        base_fingerprint=plan.source.fingerprint,
        adapters=plan.sources,
        precision=plan.options.precision,
        strength=json.dumps(plan.options.strength),
        interpolation=plan.options.interpolation,
    )
    return {
        name: finish_(
            model,
            plan.adapters,
            plan.options,
            family=made.family,
            properties=properties,
            blocks=plan.blocks,
            renamed=made.renamed,
        )
        for name, model in made.graphs.items()
    }


def _adapter_files(plan: ExportPlan, finished: Mapping[str, Finished], scratch: Path) -> dict[str, Path]:
    """The adapters of a swappable graph as files of their own, by their names in the output."""
    files: dict[str, Path] = {}
    for name, graph in finished.items():
        if graph.contract is not None:
            written = write_adapters(plan.adapters, graph.contract, scratch, graph=name, strength=plan.options.linear)
            files.update(written)
    return files


def _key(plan: ExportPlan) -> str:
    """What makes two exports the same work: inputs, options and tools."""
    described = {
        "versions": _versions(),
        "base": plan.source.fingerprint,
        "adapters": [adapter.identity for adapter in plan.sources],
        "options": asdict(plan.options),
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _manifest(plan: ExportPlan, report: ExportReport) -> bytes:
    """What was done, for people and for `hra-export validate`. No times and no machine: equal inputs, equal bytes."""
    manifest = {
        "schema_version": 1,
        "kind": "onnx",
        "tool": _versions(),
        "base": {"name": plan.source.root.name, "fingerprint": plan.source.fingerprint},
        "adapters": [adapter.entry() for adapter in plan.sources],
        **asdict(plan.options),
        "rounding": _rounding(plan),
        "family": report.family,
        "task": report.task,
        "notes": list(report.notes),
        "graphs": [{"file": f"{name}.onnx", **asdict(graph)} for name, graph in report.graphs.items()],
    }
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(errors="replace")


def _rounding(plan: ExportPlan) -> str | None:
    """The precision by which a graph with kept bits may differ from its base; None for any other graph.

    bitsandbytes rounds what it dequantizes to the base's dtype. Graphs do not.
    """
    if plan.options.precision != "keep" or not plan.blocks:
        return None
    rounded = [matrix.dtype for matrix in plan.blocks.values() if isinstance(matrix, CodebookMatrix)]
    coarsest = max([plan.options.activations, *rounded], key=lambda dtype: torch.finfo(dtype).eps)
    return next(name for name, dtype in FLOATS.items() if dtype == coarsest)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in TOOLS}
