"""`hra-export validate`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console, table

if TYPE_CHECKING:
    from hra_export.parity import ParityReport

PARITY_FAILED = 3


@click.command("validate")
@options.adapters
@options.base
@click.option("--candidate", type=click.Path(path_type=Path), required=True, help="Merged directory to judge.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Storage dtype that was promised.  [default: the manifest's, else the base's]",
)
@click.option("--strength", type=float, help="At which it was merged.  [default: the manifest's, else 1]")
@options.talk
def command(
    adapters: tuple[str, ...],
    base: str | None,
    candidate: Path,
    dtype: str | None,
    strength: float | None,
    console: Console,
) -> int:
    """Prove that CANDIDATE computes what PyTorch computes with live HRA layers.

    The adapter's effect comes first: 0 % off is perfect, 100 % off is the base. Ends with exit code 3 when the numbers
    differ by more than the storage dtype explains.

    Example: hra-export validate runs/adapter --base models/base --candidate merged
    """
    from hra_export.cli.sources import resolve_adapter, resolve_base
    from hra_export.validate import validate_merged

    _hide_loading_bars()
    read = [resolve_adapter(name) for name in adapters]
    directory = resolve_base(base, read, console)
    report = validate_merged(read, directory, candidate, dtype=dtype, strength=strength, say=console.say)
    console.result(_text(report), {"verb": "validate", **report.to_json()})
    return 0 if report.ok else PARITY_FAILED


def _hide_loading_bars() -> None:
    """transformers draws a bar for each model it loads, terminal or not."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _text(report: "ParityReport") -> str:
    rows = [["output", "effect off by", "effect", "max abs", "relative", "KL", "top-1"]]
    for output in report.outputs:
        kl = "" if output.kl is None else f"{output.kl:.1e}"
        top1 = "" if output.top1 is None else f"{output.top1:.1%}"
        figures = [f"{output.effect_error:.2e}", f"{output.effect_size:.2g}", f"{output.max_abs:.1e}"]
        rows.append([output.name, *figures, f"{output.relative:.1e}", kl, top1])
    verdict = "parity holds" if report.ok else f"parity FAILS ({len(report.findings)} findings)"
    worst = f"off by at most {report.effect_error:.2e} (allowed {report.tolerance.effect:.2g})"
    lines = [
        table(rows, right=range(1, 7)),
        *report.notes,
        *(f"finding: {finding}" for finding in report.findings),
        f"{verdict}: {report.dtype} weights, the adapter's effect is {worst}",
    ]
    return "\n".join(lines)
