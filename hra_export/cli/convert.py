"""`hra-export convert`."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hra_export.cli import options
from hra_export.cli.console import Console, size_text

if TYPE_CHECKING:
    from hra_export.cli.conversion import Conversion, Request
    from hra_export.converted import ConvertReport

# Which options belong to which side; any other of the list is refused.
OF_SOURCES: dict[str, tuple[str, ...]] = {
    "hra": ("strength", "interpolation"),
    "official": ("layout", "allow_pickle", "gram_schmidt", "epsilon", "strength", "interpolation"),
    "lora": ("rank",),
    "full-model": ("rank", "target_modules"),
}
OF_TARGETS: dict[str, tuple[str, ...]] = {
    "lora": ("dtype", "mixed_ranks", "library"),
    "gguf": ("dtype",),
    "ort-adapter": ("graph",),
    "hra": (),
    "merged": ("dtype",),
}
FILES = ("gguf", "ort-adapter")  # the other outputs are directories


def _not_negative(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (value >= 0 and math.isfinite(value)):
        raise click.BadParameter(f"expected a number from 0 on, got {value}", ctx, param)
    return value


@click.command("convert")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--to", "target", type=click.Choice(list(OF_TARGETS)), required=True, help="What to write.")
@click.option(
    "--from", "origin", type=click.Choice(list(OF_SOURCES)), default="hra", show_default=True, help="What SOURCE is."
)
@options.base
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory or file to write.")
@options.strength
@options.interpolation
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="lora, gguf, merged: of the factors, of the weights.  [default: float32; merged: the base's]",
)
@click.option("--mixed-ranks", is_flag=True, help="lora: each target at its own rank; servers refuse such files.")
@click.option(
    "--library",
    type=click.Choice(["peft", "diffusers"]),
    help="lora: whose files to write.  [default: diffusers for its own models, else peft]",
)
@click.option("--graph", type=click.Path(path_type=Path), help="ort-adapter: the graph that will take it.")
@click.option("--rank", type=click.IntRange(min=1), help="from lora, full-model: reflections for each target.")
@click.option("--target-modules", multiple=True, help="from full-model: what gets chains, by name or its end.")
@click.option("--layout", help="from official: which one, where the tensors fit several.")
@click.option("--allow-pickle", is_flag=True, help="from official: read pickled tensors; code in them never runs.")
@click.option(
    "--gram-schmidt/--no-gram-schmidt", default=None, help="from official: `apply_GS`, where no file says it."
)
@click.option(
    "--epsilon",
    type=float,
    callback=_not_negative,
    help="from official: that of softened reflections, where no file says it.",
)
@options.dry_run
@options.overwrite
@options.talk
def command(
    sources: tuple[str, ...],
    target: str,
    origin: str,
    base: str | None,
    output: Path,
    dry_run: bool,
    overwrite: bool,
    console: Console,
    **wishes: Any,
) -> None:
    r"""Turn adapters into formats that serving stacks take, and other formats into HRA adapters.

    \b
    lora         for PEFT, vLLM, SGLang, TGI; for diffusers where the base is its model
    gguf         for llama.cpp
    ort-adapter  for swappable graphs in ONNX Runtime and ONNX Runtime GenAI
    hra          one PEFT HRA directory: of several adapters, of the authors' own layouts, of LoRA, of a whole model
    merged       weights, from an official layout; of PEFT's adapters `hra-export merge` makes them

    A rotation becomes a low-rank update exactly, once the base is known: the result is valid for that base alone.
    Several adapters compose in the order given.

    Example: hra-export convert runs/adapter --base models/base --to lora --output lora
    """
    from hra_export.cli.conversion import Request, plan_conversion

    started = time.perf_counter()
    request = Request(sources, origin, target, base, wishes, console, dry_run)
    _refuse_strangers(request)
    _check_output(target, output, overwrite=overwrite)
    conversion = plan_conversion(request)
    plan = {"verb": "convert", **_plan_data(request, conversion, output)}
    if dry_run:
        console.result(_plan_text(request, conversion, output), {**plan, "dry_run": True})
        return
    for note in conversion.notes:
        console.say(f"note: {note}")
    with console.bytes_bar("convert", conversion.size_bytes) as progress:
        report = conversion.write(output, overwrite=overwrite, progress=progress)
    for note in report.notes:
        if note not in conversion.notes:
            console.say(f"note: {note}")
    seconds = time.perf_counter() - started
    console.result(_report_text(report, seconds), {**plan, **_report_data(report), "seconds": seconds})


def _refuse_strangers(request: "Request") -> None:
    """Options that mean nothing for this source and target are a matter of usage."""
    allowed = {*OF_SOURCES[request.origin], *OF_TARGETS[request.target]}
    defaults: dict[str, Any] = {
        "strength": 1.0,
        "interpolation": "geodesic",
        "mixed_ranks": False,
        "allow_pickle": False,
    }
    given = [name for name, value in request.wishes.items() if value not in (None, ()) and value != defaults.get(name)]
    strangers = [f"--{name.replace('_', '-')}" for name in given if name not in allowed]
    if strangers:
        raise click.UsageError(f"{', '.join(strangers)}: not for --from {request.origin} --to {request.target}")


def _check_output(target: str, output: Path, *, overwrite: bool) -> None:
    """Before anything is read; the converters look again, with the inputs in mind."""
    from hra_export import file_output, publish

    if target in FILES:
        file_output.check_file(output, overwrite=overwrite)
    else:
        publish.check_output(output, overwrite=overwrite)


def _plan_data(request: "Request", conversion: "Conversion", output: Path) -> dict[str, object]:
    return {
        "sources": list(request.sources),
        "from": request.origin,
        "to": request.target,
        "base": None if conversion.base is None else str(conversion.base),
        "output": str(output),
        "ranks": dict(conversion.ranks),
        "notes": list(conversion.notes),
    }


def _plan_text(request: "Request", conversion: "Conversion", output: Path) -> str:
    ranks = sorted(conversion.ranks.values()) or [0]
    lines = [
        f"would write `{output}` ({request.target}): {len(conversion.ranks)} targets of {_span(ranks[0], ranks[-1])}",
        *(f"note: {note}" for note in conversion.notes),
    ]
    return "\n".join(lines)


def _span(low: int, high: int) -> str:
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _report_data(report: "ConvertReport") -> dict[str, object]:
    targets = [
        {"module": each.module, "rank": each.rank, "delta_norm": each.delta_norm, "error": each.error}
        for each in report.targets
    ]
    return {
        "format": report.format,
        "size_bytes": report.size_bytes,
        "delta_norm": report.delta_norm,
        "error": report.error,
        "quantity": report.quantity,
        "floor": report.floor,
        "targets": targets,
        "notes": list(report.notes),
    }


def _report_text(report: "ConvertReport", seconds: float) -> str:
    span = _span(*report.ranks)
    worst = max(report.targets, key=lambda each: each.error, default=None)
    lines = [
        f"{len(report.targets)} targets of {span}, {report.format}: {size_text(report.size_bytes)}, {seconds:.1f} s"
    ]
    if worst is not None:
        floor = "" if report.floor is None else f", no rotation by less than {report.floor:.2g}"
        lines.append(
            f"{report.quantity} is off by {report.error:.2g} (worst {worst.error:.2g}, `{worst.module}`){floor}"
        )
    return "\n".join([*lines, f"wrote `{report.output}`"])
