"""`hra-export bench`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console, table

if TYPE_CHECKING:
    from hra_export.bench import BenchReport


@click.command("bench")
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.base
@click.option("--adapter", "adapters", metavar="ADAPTER", multiple=True, help="Also measure PyTorch with it.")
@options.provider
@click.option(
    "--operator",
    "operators",
    metavar="auto|none|FILE",
    type=options.OperatorWord(),
    multiple=True,
    default=["auto"],
    show_default=True,
    help="Library with kernels for the reflections; given again, each is measured: none and auto show the gain.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of a run.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of a row.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Turns of each contender.")
@click.option("--threads", type=click.IntRange(min=1), help="Of one operator on the CPU.  [default: all cores]")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw it; .png, .svg or .pdf.")
@options.talk
def command(
    directories: tuple[Path, ...],
    base: str | None,
    adapters: tuple[str, ...],
    provider: str,
    operators: "tuple[Path | str, ...]",
    batch: int,
    tokens: int,
    rounds: int,
    threads: int | None,
    plot: Path | None,
    console: Console,
) -> int:
    """Measure how fast the graphs in DIRs run, with bound inputs, warm, in turns; the first is what others are held to.

    DIRs are outputs of `hra-export onnx` from one base. A swappable graph is measured with its default and with its
    first adapter. With a cache, prefill and decoding are measured apart.

    Example: hra-export bench merged reflect --operator none --operator auto
    """
    from hra_export.bench import BenchPlan, bench
    from hra_export.bench import plot as draw
    from hra_export.cli.sources import resolve_adapter, resolve_base

    if base is not None and not adapters:
        raise click.UsageError("--base: only with --adapter, for PyTorch")
    if plot is not None:
        _check_plot(plot)
    read = [resolve_adapter(name) for name in adapters]
    directory = resolve_base(base, read, console) if read else None
    plan = BenchPlan(
        directories,
        directory,
        read,
        provider,  # type: ignore[arg-type]  # click has checked it against the choices
        batch=batch,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
        operators=[None if each == "none" else each for each in dict.fromkeys(operators)],  # type: ignore[misc]  # a word is `auto` by now
    )
    report = bench(plan, say=console.say)
    if plot is not None:
        draw(report, plot)
        console.say(f"drew `{plot}`")
    console.result(_text(report), {"verb": "bench", **report.to_json()})
    return 0


def _check_plot(path: Path) -> None:
    """Before anything is measured.

    Raises:
        DeviceError: there is nothing to draw with.
    """
    from importlib.util import find_spec

    from hra_export.errors import DeviceError

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot: expected .png, .svg or .pdf, got `{path.name}`")
    if find_spec("matplotlib") is None:
        raise DeviceError("--plot needs matplotlib", hint="pip install 'hra-export[train]'")


def _text(report: "BenchReport") -> str:
    rows = [["load", "of", "median", "9 of 10 below", "tokens or rows/s", "÷ first"]]
    for load in report.loads:
        for each in report.of(load):
            seconds = [f"{1000 * each.median:.2f} ms", f"{1000 * each.slow:.2f} ms"]
            rows.append([load, each.contender, *seconds, f"{each.throughput:.1f}", f"{report.ratio(each):.2f}"])
    return "\n".join([table(rows, right=range(2, 6)), *report.notes])
