"""`hra-export merge`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console, size_text, table

if TYPE_CHECKING:
    from hra_export.merge import MergeReport
    from hra_export.plan import DtypeChoice, MergePlan
    from hra_export.strength import Interpolation

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ByteSize(click.ParamType[int]):
    """A size such as 5GB, in powers of 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of a size."""
        text = str(value).upper().replace(" ", "")
        number, unit = text.rstrip("KMGTB"), text[len(text.rstrip("KMGTB")) :]
        try:
            size = int(float(number) * SIZE_UNITS.get(unit, 1 if unit in ("", "B") else 0))
        except (ValueError, OverflowError):
            size = 0
        if size < 1:
            self.fail(f"expected a size such as 5GB or 500MB, got {value!r}", param, ctx)
        return size


@click.command("merge")
@options.adapters
@options.base
@options.output
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Storage dtype of floating-point tensors.",
)
@options.strength
@options.interpolation
@click.option("--max-shard-size", type=ByteSize(), help="Split anew, e.g. 5GB.  [default: the base's shards]")
@options.device
@options.dry_run
@options.overwrite
@options.talk
def command(
    adapters: tuple[str, ...],
    base: str | None,
    output: Path,
    dtype: "DtypeChoice",
    strength: float,
    interpolation: "Interpolation",
    max_shard_size: int | None,
    device: str,
    dry_run: bool,
    overwrite: bool,
    console: Console,
) -> None:
    """Fold ADAPTERs into the base weights and write safetensors.

    Several adapters compose in the order given. Nothing is written unless every adapter tensor has its place, and
    OUTPUT appears only when it is complete; a merge that was killed is taken up again by the same command.

    Example: hra-export merge runs/adapter --base models/base --output merged
    """
    from hra_export import publish
    from hra_export.checkpoint import MANIFEST_NAME, open_checkpoint
    from hra_export.cli.devices import resolve_device
    from hra_export.cli.sources import resolve_adapter, resolve_base
    from hra_export.merge import merge_checkpoint
    from hra_export.planning import plan_merge

    started = time.perf_counter()
    chosen = resolve_device(device)
    read = [resolve_adapter(name) for name in adapters]
    checkpoint = open_checkpoint(resolve_base(base, read, console))
    protected = [checkpoint.root, *(adapter.path for adapter in read if adapter.path)]
    publish.check_output(output, overwrite=overwrite, protected=protected, manifest_name=MANIFEST_NAME)
    plan = plan_merge(
        checkpoint,
        read,
        strength=strength,
        interpolation=interpolation,
        dtype=dtype,
        max_shard_bytes=max_shard_size,
    )
    if dry_run:
        console.result(_plan_text(plan, output), {"verb": "merge", "dry_run": True, **_plan_data(plan, output)})
        return
    for note in plan.notes:
        console.say(f"note: {note}")
    with console.bytes_bar("merge", plan.size_bytes) as progress:
        report = merge_checkpoint(plan, output, overwrite=overwrite, device=chosen, progress=progress)
    for warning in report.warnings():
        console.warn(warning)
    seconds = time.perf_counter() - started
    console.result(_report_text(plan, report, seconds), {"verb": "merge", **_report_data(plan, report, seconds)})


def _plan_data(plan: "MergePlan", output: Path) -> dict[str, object]:
    return {
        "base": str(plan.base.root),
        "adapters": [adapter.label for adapter in plan.sources],
        "strength": plan.strength,
        "interpolation": plan.interpolation,
        "output": str(output),
        "files": [shard.name for shard in plan.shards],
        "size_bytes": plan.size_bytes,
        "flop": plan.flop(),
        "actions": {action: plan.count(action) for action in ("fold", "replace", "add", "untie", "cast", "copy")},
        "config_changes": dict(plan.config_changes),
        "not_copied": [str(path) for path in plan.base.left_out()],
        "notes": list(plan.notes),
        "tensors": [
            {"name": tensor.name, "action": tensor.action, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for tensor in plan.tensors
            if tensor.action != "copy"
        ],
    }


def _plan_text(plan: "MergePlan", output: Path) -> str:
    rows = [["action", "tensors", "size"]]
    for action in ("fold", "replace", "add", "untie", "cast", "copy"):
        sizes = [tensor.size_bytes for tensor in plan.tensors if tensor.action == action]
        if sizes:
            rows.append([action, str(len(sizes)), size_text(sum(sizes))])
    files = f"{len(plan.shards)} file{'s' * (len(plan.shards) != 1)}"
    lines = [
        table(rows, right=(1, 2)),
        f"would write {size_text(plan.size_bytes)} in {files} to `{output}`, folds of {plan.flop() / 1e9:.2f} GFLOP",
        *options.strength_lines(plan.strength, plan.interpolation),
        *(f"not copied: `{path}`, unmerged weights" for path in plan.base.left_out()),
        *(f"config.json: {key} becomes {value!r}" for key, value in plan.config_changes.items()),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _report_data(plan: "MergePlan", report: "MergeReport", seconds: float) -> dict[str, object]:
    return {
        **_plan_data(plan, report.output),
        "seconds": seconds,
        "delta_norm": report.delta_norm,
        "rounding_loss": report.loss,
        "warnings": report.warnings(),
        "tensors": [
            {
                "name": tensor.name,
                "action": tensor.action,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "delta_norm": tensor.delta_norm,
                "rounding_loss": tensor.loss,
            }
            for tensor in report.tensors
        ],
    }


def _report_text(plan: "MergePlan", report: "MergeReport", seconds: float) -> str:
    worst = max(report.folded, key=lambda tensor: tensor.loss or 0.0, default=None)
    size, files = size_text(report.size_bytes), f"{len(plan.shards)} file{'s' * (len(plan.shards) != 1)}"
    lines = [
        f"folded {len(report.folded)} tensors, copied {report.copied}: {size} in {files}, {seconds:.1f} s",
        f"rounding cost {report.loss:.2g} of ΔW"
        + (f" (worst {worst.loss or 0.0:.2g}, `{worst.name}`)" if worst else ""),
        f"wrote `{report.output}`",
    ]
    return "\n".join(lines)
