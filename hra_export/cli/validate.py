"""`hra-export validate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hra_export.cli import options
from hra_export.cli.console import Console, hide_loading_bars
from hra_export.cli.parity_text import report_text

if TYPE_CHECKING:
    from hra_export.adapter import HraAdapter
    from hra_export.parity import ParityReport

PARITY_FAILED = 3
# Options that only one kind of candidate has.
OF_WEIGHTS = ("dtype", "strength", "interpolation")
OF_GRAPHS = ("per_layer", "text", "prompts")


@click.command("validate")
@options.adapters
@options.base
@click.option(
    "--candidate",
    type=click.Path(path_type=Path),
    required=True,
    help="What to judge: a merged directory, a directory of ONNX graphs, or an .onnx file.",
)
@options.provider
@options.operator
@click.option("--per-layer", is_flag=True, help="Graphs: also compare each layer, and name the first that departs.")
@click.option("--text", type=click.Path(path_type=Path), help="Graphs: also score this text file (perplexity).")
@click.option(
    "--prompt", "prompts", multiple=True, help="Graphs: decode this; may be given again.  [default: three neutral ones]"
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Graphs: seconds for the runtime.  [default: 1800]"
)
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with plots.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Weights: storage dtype that was promised.  [default: the manifest's, else the base's]",
)
@options.strength_asked
@options.interpolation_asked
@options.talk
def command(
    adapters: tuple[str, ...],
    base: str | None,
    candidate: Path,
    provider: str,
    operator: "Path | str",
    html: Path | None,
    console: Console,
    **asked: Any,
) -> int:
    """Prove that CANDIDATE computes what PyTorch computes with live HRA layers.

    The adapter's effect comes first: 0 % off is perfect, 100 % off is the base. Ends with exit code 3 when the numbers
    differ by more than the precision explains, and with 7 when the provider did not run all of a graph. It says
    whether a library's kernels ran the reflections (`hra-export build-op`), or their bodies.

    Example: hra-export validate runs/adapter --base models/base --candidate merged
    """
    from hra_export.cli.sources import resolve_adapter, resolve_base
    from hra_export.validation.candidates import is_graph_candidate

    hide_loading_bars()
    read = [resolve_adapter(name) for name in adapters]
    directory = resolve_base(base, read, console, dequantize=is_graph_candidate(candidate))
    report = _validate(read, directory, candidate, provider, {**asked, "operator": operator}, console)
    if html is not None:
        from hra_export.validation.page import write_page

        write_page(report, html, title=f"{candidate.name} against PyTorch")
        console.say(f"wrote `{html}`")
    console.result(report_text(report), {"verb": "validate", **report.to_json()})
    return 0 if report.ok else PARITY_FAILED


def _validate(
    adapters: "Sequence[HraAdapter]",
    base: Path,
    candidate: Path,
    provider: str,
    asked: dict[str, Any],
    console: Console,
) -> "ParityReport":
    from hra_export.validation.candidates import is_graph_candidate

    if is_graph_candidate(candidate):
        _refuse(asked, OF_WEIGHTS, "a graph holds its own precision and strength")
        from hra_export.validation.graphs import TIMEOUT, validate_graph

        chosen = {"per_layer": asked["per_layer"], "text": asked["text"], "prompts": list(asked["prompts"]) or None}
        chosen["operator"] = None if asked["operator"] == "none" else asked["operator"]
        timeout = asked["timeout"] or TIMEOUT
        with console.stages() as begin:
            return validate_graph(adapters, base, candidate, provider=provider, timeout=timeout, say=begin, **chosen)
    runs = {"provider": None if provider == "cpu" else provider}
    runs["operator"] = None if asked["operator"] == "auto" else asked["operator"]
    _refuse(asked | runs, (*OF_GRAPHS, *runs), "for graphs")
    from hra_export.validation.merged import validate_merged

    chosen = {name: asked[name] for name in OF_WEIGHTS}
    return validate_merged(adapters, base, candidate, say=console.say, **chosen)


def _refuse(asked: dict[str, Any], names: Sequence[str], reason: str) -> None:
    # `--strength 0` is given, and equals False.
    given = [name for name in names if asked.get(name) not in (None, ()) and asked[name] is not False]
    if given:
        words = ", ".join(f"--{name.rstrip('s').replace('_', '-')}" for name in given)
        raise click.UsageError(f"{words}: not for this candidate ({reason})")
