"""What `hra-export convert` does for each source and target: it reads the one and calls the converter of the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.cli.console import Console
from hra_export.cli.sources import Based, quantized_base, resolve_adapter, resolve_base, resolve_lora, resolve_model
from hra_export.converted import ConvertReport
from hra_export.errors import ConversionError
from hra_export.lora.plan import plan_lora
from hra_export.low_rank import DeltaSource, HraSource
from hra_export.nearest.chains import write_nearest
from hra_export.official.layouts import LAYOUTS
from hra_export.official.soft_chain import SoftSource
from hra_export.registry import load_converter
from hra_export.strength import take_strength

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """A conversion that was checked as far as headers tell.

    Attributes:
        base: whose weights are read; None where none are.
        ranks: target → its rank in the output.
        size_bytes: what will be read or written, for the progress bar.
        notes: what a user should know, one sentence each.
        run: carries it out, with the arguments `overwrite` and, where `reports` says so, `progress`.
    """

    base: Path | None
    ranks: Mapping[str, int]
    size_bytes: int
    notes: tuple[str, ...]
    run: Callable[..., ConvertReport]
    reports: bool = True

    def write(self, output: Path, *, overwrite: bool, progress: Progress) -> ConvertReport:
        """Carry it out."""
        further = {"progress": progress} if self.reports else {}
        return self.run(output, overwrite=overwrite, **further)


@dataclass(frozen=True)
class Request:
    """One call of the command, its options checked against source and target."""

    sources: tuple[str, ...]
    origin: str
    target: str
    base: str | None
    wishes: Mapping[str, Any]
    console: Console
    dry_run: bool = False


def plan_conversion(request: Request) -> Conversion:
    """Read the sources and find the converter; nothing is written.

    Raises:
        click.UsageError: something is missing, or too much.
        HraExportError: as the readers and converters.
    """
    if request.origin in ("lora", "full-model"):
        return _nearest(request)
    adapters, linear, notes = _read(request)
    if request.target == "merged":
        return _merged(request, adapters, linear, notes)
    if request.target == "hra":
        return _hra(request, adapters, notes)
    source = _delta_source(adapters, linear)
    if request.target == "ort-adapter":
        return _ort_adapter(request, source, notes)
    base = _open_base(request, [source])
    return _lora(request, source, base, notes) if request.target == "lora" else _gguf(request, source, base, notes)


# Adapters, or the one source of factors that is no adapter.
Read = tuple[HraAdapter, ...] | SoftSource


def _read(request: Request) -> tuple[Read, float, tuple[str, ...]]:
    """The sources at their strength, the linear factor that is left, and notes."""
    strength, interpolation = request.wishes["strength"], request.wishes["interpolation"]
    if request.origin == "official":
        found = _official(request)
        if isinstance(found.adapter, SoftSource):
            if interpolation == "geodesic" and strength not in (0, 1):
                raise ConversionError(
                    f"`{request.sources[0]}` is no rotation, so no part of one can be taken",
                    hint="`--interpolation linear` takes a part of ΔW",
                )
            return replace(found.adapter, strength=strength), 1.0, ()  # its notes are its own
        read, notes = [found.adapter], found.notes
    else:
        read, notes = [resolve_adapter(name) for name in request.sources], ()
    if request.target == "hra":  # whose converter takes the strength itself
        return tuple(read), 1.0, notes
    taken = take_strength(read, strength, interpolation)
    return taken.adapters, taken.linear, (*notes, *taken.notes)


def _official(request: Request) -> Any:
    if len(request.sources) > 1:
        raise click.UsageError("--from official: expected one SOURCE; convert each `--to hra`, and compose those")
    wishes, converter = request.wishes, load_converter("from_official")
    if wishes["layout"] not in (None, *LAYOUTS):
        raise click.UsageError(f"--layout: expected one of {', '.join(LAYOUTS)}, got {wishes['layout']!r}")
    settings = converter.Settings(orthogonalize=wishes["gram_schmidt"], epsilon=wishes["epsilon"])
    base = None if request.base is None else open_checkpoint(resolve_base(request.base, [], request.console))
    return converter.read(
        Path(request.sources[0]),
        layout=wishes["layout"],
        allow_pickle=wishes["allow_pickle"],
        base=base,
        settings=settings,
    )


def _delta_source(read: Read, linear: float) -> DeltaSource:
    return read if isinstance(read, SoftSource) else HraSource(read, strength=linear)


def _open_base(request: Request, based: Sequence[Based]) -> Checkpoint:
    return open_checkpoint(resolve_base(request.base, based, request.console, dequantize=True))


def _lora(request: Request, source: DeltaSource, base: Checkpoint, notes: tuple[str, ...]) -> Conversion:
    converter, wishes = load_converter("to_lora"), request.wishes
    options = {
        "base": base,
        "dtype": wishes["dtype"] or "float32",
        "mixed_ranks": wishes["mixed_ranks"],
        "layout": wishes["library"] or "auto",
    }
    plan = plan_lora(source, **options)
    run = partial(converter.convert, source, **options)
    return Conversion(base.root, plan.ranks, plan.read_bytes, notes, run)


def _gguf(request: Request, source: DeltaSource, base: Checkpoint, notes: tuple[str, ...]) -> Conversion:
    quantized = quantized_base(request.base, [source])
    file = quantized if quantized is not None and quantized.suffix == ".gguf" else None
    converter = load_converter("to_gguf")
    plan = converter.plan(source, base=base, file=file)
    dtype = request.wishes["dtype"] or "float32"
    run = partial(converter.convert, source, base=base, file=file, dtype=dtype)
    return Conversion(base.root, plan.ranks, plan.read_bytes, notes, run)


def _ort_adapter(request: Request, source: DeltaSource, notes: tuple[str, ...]) -> Conversion:
    graph = request.wishes["graph"]
    if graph is None:
        raise click.UsageError("--to ort-adapter: pass the graph that will take the adapter with --graph")
    base = None if request.base is None else _open_base(request, [source])
    converter = load_converter("to_ort_adapter")
    run = partial(converter.convert, source, graph=graph, base=base)
    ranks = {module: source.rank(module) for module in source.modules}
    if request.dry_run:  # everything is computed to be checked, which a run would do a second time
        planned = converter.plan_files(source, graph=graph, base=base)
        ranks, notes = {target.module: target.rank for target in planned.targets}, (*notes, *planned.notes)
    return Conversion(None if base is None else base.root, ranks, 0, notes, run, reports=False)


def _hra(request: Request, read: Read, notes: tuple[str, ...]) -> Conversion:
    if isinstance(read, SoftSource):
        raise ConversionError(
            f"{read.label} is not HRA: no HRA adapter stands for it",
            findings=read.notes,
            hint="`--to lora` is exact for one base, and so is `--to merged`",
        )
    converter = load_converter("to_hra")
    options = {name: request.wishes[name] for name in ("strength", "interpolation")}
    product, further = converter.plan_product(read, **options)
    ranks = dict.fromkeys(product.chains, product.rank)
    size = sum(4 * vectors.numel() for vectors in product.chains.values())
    return Conversion(None, ranks, size, (*notes, *further), partial(converter.convert, read, **options))


def _merged(request: Request, read: Read, linear: float, notes: tuple[str, ...]) -> Conversion:
    if request.origin == "hra":
        raise click.UsageError("--to merged is for layouts other than PEFT's: use `hra-export merge`")
    if linear != 1:
        raise click.UsageError("--strength: convert `--to hra`, and give it to `hra-export merge`")
    source = read if isinstance(read, SoftSource) else read[0]
    base = open_checkpoint(resolve_base(request.base, [source], request.console))
    converter, options = load_converter("to_merged"), {"dtype": request.wishes["dtype"] or "keep"}
    plan = converter.plan_conversion(source, base, **options)
    whole = _delta_source(read, linear)
    ranks = {module: whole.rank(module) for module in whole.modules}
    run = partial(converter.convert, source, base=base, **options)
    return Conversion(base.root, ranks, plan.size_bytes, notes, run)


def _nearest(request: Request) -> Conversion:
    rank = request.wishes["rank"]
    if request.target != "hra" or len(request.sources) > 1:
        raise click.UsageError(f"--from {request.origin}: expected one SOURCE, and --to hra")
    if rank is None:
        raise click.UsageError(f"--from {request.origin}: pass the number of reflections with --rank")
    (name,) = request.sources
    if request.origin == "lora":
        adapter = resolve_lora(name)
        base = _open_base(request, [adapter])
        plan = load_converter("from_lora").plan(adapter.path, base=base, rank=rank)
    else:
        if request.base is None:
            raise click.UsageError("--from full-model: pass the model that it was fine-tuned from with --base")
        base = _open_base(request, [])
        targets = request.wishes["target_modules"] or None
        plan = load_converter("from_full_model").plan(
            resolve_model(name), base=base, rank=rank, targets=targets, base_name=request.base
        )
    return Conversion(base.root, plan.ranks, plan.size_bytes, plan.notes, partial(write_nearest, plan))
