"""ONNX Runtime's own adapter files, `NAME.onnx_adapter`, for a graph that exists.

    swappable graphs of `hra-export onnx`    U and V of every place: the chain itself, which needs no base
    graphs whose LoRA factors are inputs     A and B with ΔW = B A, which is valid for one base alone

What the file must look like (names, which way round, type, rank, scale) is read from the graph. A file has every input
that the graph takes: ONNX Runtime would run what is missing as the default, in silence.

Limits: biases and saved modules are part of a graph's weights, and no file can bring them. Factors of convolutions and
embeddings are not written, nor quantized ones. Of several graphs with LoRA inputs, pass one.

Letters: d in_features, o out_features, r rank.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.converted import ConvertedTarget, ConvertReport
from hra_export.errors import ConversionError, GraphError, OutputError, UnsupportedModelError
from hra_export.file_output import check_file, staged_file
from hra_export.graph.adapter_file import SUFFIX, AdapterContent, adapter_content, described_by
from hra_export.graph.base_check import check_base
from hra_export.graph.document import open_graph
from hra_export.graph.lora_content import FLOATS, lora_content
from hra_export.graph.lora_inputs import lora_sites
from hra_export.graph.operator import exact_operands
from hra_export.graph.swap_sites import SwapContract
from hra_export.graph.swapping import read_contract
from hra_export.low_rank import DeltaSource, HraSource, rounded

FORMAT = "adapter of ONNX Runtime"


@dataclass(frozen=True)
class AdapterFiles:
    """What will be written: by the stem of each graph, the content of its file.

    Attributes:
        quantity: what norms and errors of the targets are of; a graph that multiplies by W itself takes R − I.
    """

    contents: Mapping[str, AdapterContent]
    targets: tuple[ConvertedTarget, ...]
    notes: tuple[str, ...]
    quantity: str = "ΔW"


def convert(
    source: DeltaSource | Sequence[HraAdapter],
    output: Path,
    *,
    graph: Path,
    base: Checkpoint | None = None,
    strength: float = 1.0,
    overwrite: bool = False,
) -> ConvertReport:
    """Write the adapter file of a graph, and `NAME.onnx_adapter.json` beside it.

    Args:
        source: adapters that compose in the order given, or anything else that changes weights by W + B A.
        output: ends in `.onnx_adapter`. An encoder and a decoder get `NAME.encoder_model.onnx_adapter`, and so on.
        graph: an ONNX file, or a directory of them.
        base: the base of adapter and graph; a swappable graph does without, and is checked against it when given.
        strength: s in ΔW = s (W R − W), for adapters.
        overwrite: replace files that exist.

    Raises:
        ValueError: a strength is given to what is no adapter.
        GraphError: the graph takes no adapters, or cannot be read.
        MismatchError: adapter, graph and base do not fit; all findings at once.
        ConversionError: the file cannot express the source, or a base is missing.
        NumericalError: a factor leaves the range of the graph's type.
        UnsupportedModelError: factors of a kind that is not written.
        OutputError: the output has another ending, exists, or cannot be written; nothing is left behind.
    """
    if output.suffix != SUFFIX:
        raise OutputError(f"output `{output}`: expected a name that ends in `{SUFFIX}`")
    origin = _as_source(source, strength)
    files = _graph_files(graph)
    protected = [*origin.paths, *files.values(), *([] if base is None else [base.root])]
    check_file(output, overwrite=overwrite, protected=protected)
    made = plan_files(origin, graph=graph, base=base)
    written = _places(output, list(made.contents))
    with ExitStack() as stack:
        for stem, path in written.items():
            beside, partial = (
                stack.enter_context(staged_file(each, overwrite=overwrite, protected=protected))
                for each in (described_by(path), path)
            )
            made.contents[stem].write(partial, beside)
    size = sum(each.stat().st_size for path in written.values() for each in (path, described_by(path)))
    notes = (*origin.notes, *made.notes)
    return ConvertReport(FORMAT, output, size, made.targets, notes, quantity=made.quantity)


def _places(output: Path, stems: Sequence[str]) -> dict[str, Path]:
    """Stem of a graph → its adapter file."""
    if len(stems) == 1:
        return {stems[0]: output}
    return {stem: output.with_name(f"{output.stem}.{stem}{SUFFIX}") for stem in stems}


def _as_source(source: DeltaSource | Sequence[HraAdapter], strength: float) -> DeltaSource:
    if isinstance(source, Sequence):
        return HraSource(source, strength=strength)
    if strength != 1:
        raise ValueError("strength: is part of a source that is no list of adapters")
    return source


def _graph_files(graph: Path) -> dict[str, Path]:
    """Stem → ONNX file."""
    files = sorted(graph.glob("*.onnx")) if graph.is_dir() else [graph]
    if not files:
        raise GraphError(f"`{graph}` holds no ONNX file", hint="pass what `hra-export onnx --swappable` wrote")
    return {path.stem: path for path in files}


def plan_files(source: DeltaSource, *, graph: Path, base: Checkpoint | None = None) -> AdapterFiles:
    """Check everything and compute everything; arguments and errors as of `convert`, and nothing is written."""
    models = {stem: open_graph(path) for stem, path in _graph_files(graph).items()}
    contracts = {stem: contract for stem, model in models.items() if (contract := read_contract(model)) is not None}
    if not contracts:
        if len(models) > 1:
            raise UnsupportedModelError(
                f"{len(models)} graphs, and none that `hra-export onnx --swappable` wrote", hint="pass one of the files"
            )
        ((stem, model),) = models.items()
        if base is None:
            _ = lora_sites(model)  # a graph without inputs for adapters needs no base to be refused
            raise ConversionError(
                "a graph with LoRA inputs takes ΔW, which is made of the base's weights", hint="name it with `--base`"
            )
        made = lora_content(source, model, base)
        return AdapterFiles({stem: made.content}, made.targets, made.notes)
    if not isinstance(source, HraSource):
        raise ConversionError(
            f"{source.label} is no chain before a layer, which is what a swappable graph takes",
            hint="`--to lora` is exact for one base, and so is `--to merged`",
        )
    notes: tuple[str, ...] = ()
    if base is not None:
        renamed = {name: target for contract in contracts.values() for name, target in contract.renamed.items()}
        notes = check_base(source, [models[stem] for stem in contracts], base, renamed)
    return _swappable(source, contracts, notes)


def _swappable(source: HraSource, contracts: Mapping[str, SwapContract], notes: tuple[str, ...]) -> AdapterFiles:
    _ = source.parameters  # adapters that carry different values for one do not compose
    known = {
        stem: {name for site in each.sites for name in each.names(site.target)} for stem, each in contracts.items()
    }
    nowhere = set(source.modules).difference(*known.values())
    contents = {
        stem: adapter_content(_part(source, known[stem] | nowhere), contract, strength=source.strength)
        for stem, contract in contracts.items()
    }
    if any(contract.swapping == "rows" for contract in contracts.values()):
        notes = (
            *notes,
            "each row of the graph names its adapter: `GraphSession` loads this file, the runtime does not",
        )
    return AdapterFiles(contents, tuple(_measured(source, contracts)), notes, "R − I")


def _part(source: HraSource, targets: Collection[str]) -> list[HraAdapter]:
    """The chains that one graph of a model has, an encoder's, say; and those that none has, to be refused."""
    return [
        replace(adapter, chains={path: u for path, u in adapter.chains.items() if path in targets})
        for adapter in source.adapters
    ]


def _measured(source: HraSource, contracts: Mapping[str, SwapContract]) -> list[ConvertedTarget]:
    """What rounding U and V cost."""
    found = []
    for contract in contracts.values():
        for site in contract.sites:
            module = next((name for name in contract.names(site.target) if name in source.modules), None)
            if module is not None:
                left, right = exact_operands([source.reflector(module)], strength=source.strength)
                rank = source.rank(module)
                *_, error, norm = rounded(left, right, rank, FLOATS[site.dtype])
                found.append(ConvertedTarget(module, rank, norm, error))
    return found
