"""`hra-export compress`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console, hide_loading_bars, size_text, table

if TYPE_CHECKING:
    from hra_export.compression.outcome import CompressionReport
    from hra_export.compression.plan import Aspect, CompressionPlan


def _between_zero_and_one(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:  # click's own range lets NaN through
        raise click.BadParameter(f"expected a number between 0 and 1, got {value}", ctx, param)
    return value


@click.command("compress")
@options.adapter
@options.output
@click.option("--rank", type=click.IntRange(min=1), help="K: keep at most K reflections for each target.")
@click.option(
    "--tolerance",
    type=float,
    callback=_between_zero_and_one,
    help="E: the largest relative error over all targets, with the fewest reflections in all.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="Measure errors of ΔW in this model directory, Hub id or .gguf file.  [default: none, or with --calibration "
    "the adapter's own]",
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure errors of outputs: text, or .jsonl rows as for training, that the model then reads.",
)
@options.device
@click.option("--dry-run", is_flag=True, help="Print what would be kept and its error, and write nothing.")
@options.overwrite
@options.talk
def command(
    adapter: str,
    output: Path,
    rank: int | None,
    tolerance: float | None,
    base: str | None,
    calibration: Path | None,
    device: str,
    dry_run: bool,
    overwrite: bool,
    console: Console,
) -> None:
    """Write ADAPTER with fewer reflections for nearly the same rotation, in PEFT's layout.

    A chain turns planes; those are dropped that count least: by their angles alone, by what they change in the weights
    of a base, or by what they change in its outputs on a text. The error is told before anything is written, and
    measured again from what was.

    Example: hra-export compress runs/adapter --rank 8 --base models/base --output runs/adapter-8
    """
    if (rank is None) == (tolerance is None):
        raise click.UsageError("give either --rank or --tolerance")
    from hra_export import publish
    from hra_export.checkpoint import open_checkpoint
    from hra_export.cli.devices import resolve_device
    from hra_export.cli.sources import resolve_adapter, resolve_base
    from hra_export.compression.calibration import calibrate
    from hra_export.compression.outcome import compress_adapter
    from hra_export.compression.plan import plan_compression

    started = time.perf_counter()
    chosen = resolve_device(device)
    read = resolve_adapter(adapter)
    checkpoint = None
    if base is not None or calibration is not None:
        checkpoint = open_checkpoint(resolve_base(base, [read], console))
    protected = [path for path in (read.path, checkpoint.root if checkpoint else None, calibration) if path]
    publish.check_output(output, overwrite=overwrite, protected=protected)
    hide_loading_bars()
    with console.stages() as tell:
        seen = None
        if checkpoint is not None and calibration is not None:
            tell(f"reading `{calibration}`")
            seen = calibrate(checkpoint, read, calibration, device=chosen)
        plan = plan_compression(read, rank=rank, tolerance=tolerance, base=checkpoint, calibration=seen, tell=tell)
    for note in plan.notes:
        console.say(f"note: {note}")
    if dry_run:
        console.result(_plan_text(plan), {"verb": "compress", "dry_run": True, "output": str(output), **plan.to_json()})
        return
    console.say(_errors("predicted", plan.predicted))
    report = compress_adapter(plan, output, overwrite=overwrite)
    seconds = time.perf_counter() - started
    console.result(_report_text(report, seconds), {"verb": "compress", **report.to_json(), "seconds": seconds})


def _plan_text(plan: "CompressionPlan") -> str:
    return "\n".join([_table(plan), _errors("predicted", plan.predicted)])


def _report_text(report: "CompressionReport", seconds: float) -> str:
    plan = report.plan
    written = f"{len(plan.kept)} chains of rank {plan.rank}, {size_text(report.size_bytes)}, {seconds:.1f} s"
    lines = [
        _table(plan),
        _errors("predicted", plan.predicted),
        _errors("achieved", report.achieved),
        f"wrote `{report.output}`: {written}",
    ]
    return "\n".join(lines)


def _table(plan: "CompressionPlan") -> str:
    """The targets by the last word of their path: how many reflections were stored, are needed, and are kept."""
    rows = [["kind", "targets", "stored", "shortest", "kept", "error"]]
    for kind, targets in plan.targets_by_kind().items():
        deviation = targets[0].predicted(plan.by)
        for target in targets[1:]:
            deviation += target.predicted(plan.by)
        shortest, kept = (_spread([getattr(target, name) for target in targets]) for name in ("shortest", "rank"))
        rows.append([kind, str(len(targets)), str(plan.adapter.rank), shortest, kept, _share(deviation.relative)])
    return table(rows, right=range(1, 6))


def _spread(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _errors(when: str, errors: "Mapping[Aspect, float]") -> str:
    from hra_export.compression.outcome import ERROR_OF

    return f"{when} error: " + ", ".join(
        f"{_share(error)} of the {ERROR_OF[aspect]}" for aspect, error in errors.items()
    )


def _share(error: float) -> str:
    """12.3%, and 3e-07 where a percentage would be all zeros."""
    return f"{error:.2g}" if error < 1e-4 else f"{error:.2%}"
