"""`hra-export onnx`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hra_export.cli import options
from hra_export.cli.console import Console, hide_loading_bars, size_text
from hra_export.cli.parity_text import report_text
from hra_export.cli.validate import PARITY_FAILED

if TYPE_CHECKING:
    from hra_export.adapter import HraAdapter
    from hra_export.export import ExportPlan, ExportReport

PRECISIONS = ["keep", "fp32", "fp16", "bf16", "int8", "int4"]


@click.command("onnx")
@options.adapters
@options.base
@options.output
@click.option(
    "--mode",
    type=click.Choice(["merged", "reflect"]),
    help="Fold the chains into the weights, or keep them as operators in front of the base's weights.  "
    "[default: merged; reflect for a swappable graph and for a quantized base]",
)
@click.option(
    "--runtime",
    type=click.Choice(["ort", "genai"]),
    default="ort",
    show_default=True,
    help="ONNX Runtime, or a directory for ONNX Runtime GenAI.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the weights; int8 and int4 quantize the base and leave the reflections outside.  "
    "[default: fp32; a quantized base keeps its bits]",
)
@click.option(
    "--block-size", type=int, default=32, show_default=True, help="Columns that share a scale, int8 and int4."
)
@click.option("--symmetric", is_flag=True, help="Quantize around zero, without zero points.")
@click.option("--swappable", is_flag=True, help="Make U and V inputs: one session serves many adapters.")
@click.option("--per-row", is_flag=True, help="Swappable, and each row of a batch names its adapter.")
@click.option(
    "--default",
    type=click.Choice(["base", "adapter"]),
    default="base",
    show_default=True,
    help="What a swappable graph computes while nothing is swapped in.",
)
@click.option("--plain-ops", is_flag=True, help="ONNX's own operators in their fastest form, no function.")
@click.option(
    "--opset", type=click.IntRange(17, 25), default=20, show_default=True, help="Version of ONNX's operators."
)
@click.option(
    "--fusions",
    type=click.Choice(["none", "cpu", "cuda"]),
    default="none",
    show_default=True,
    help="Use ONNX Runtime's own fused operators for this kind of device; the graph runs nowhere else.",
)
@options.strength
@options.interpolation
@options.provider
@click.option(
    "--validate/--no-validate", default=True, show_default=True, help="Compare what was written with PyTorch."
)
@options.dry_run
@options.overwrite
@options.talk
def command(
    adapters: tuple[str, ...],
    base: str | None,
    output: Path,
    validate: bool,
    dry_run: bool,
    overwrite: bool,
    console: Console,
    **wishes: Any,
) -> int:
    """Write the base with ADAPTERs as ONNX graphs, and prove that they compute what PyTorch computes.

    BASE may also be a graph, into which the reflections are put. Several adapters compose in the order given; in a
    swappable graph each stands for itself. OUTPUT appears only when it is complete.

    Example: hra-export onnx runs/adapter --base models/base --output onnx --mode reflect
    """
    from hra_export.cli.sources import resolve_adapter
    from hra_export.export import export_graphs
    from hra_export.graph.native import choose_operator

    started = time.perf_counter()
    hide_loading_bars()
    read = [resolve_adapter(name) for name in adapters]
    plan = _plan(base, read, wishes, console)
    if dry_run:
        console.result(_plan_text(plan, output), {"verb": "onnx", "dry_run": True, **_plan_data(plan, output)})
        return 0
    for note in plan.notes:
        console.say(f"note: {note}")
    if validate:
        choose_operator("auto", wishes["provider"])  # one that cannot be used is told before the export, not after
    with console.stages() as begin:
        report = export_graphs(plan, output, overwrite=overwrite, say=begin)
    for note in report.notes[len(plan.notes) :]:
        console.say(f"note: {note}")
    seconds = time.perf_counter() - started
    data = {"verb": "onnx", **_plan_data(plan, output), **_report_data(report), "seconds": seconds}
    reason = _not_comparable(plan)
    if not validate or reason:
        if validate:
            console.say(f"not compared with PyTorch, {reason}")
        console.result(_report_text(report, seconds), data)
        return 0
    from hra_export.validation.graphs import validate_graph

    with console.stages() as begin:
        parity = validate_graph(read, plan.source.root, output, provider=wishes["provider"], say=begin)
    text = f"{_report_text(report, seconds)}\n\n{report_text(parity)}"
    console.result(text, {**data, "validation": parity.to_json()})
    return 0 if parity.ok else PARITY_FAILED


def _not_comparable(plan: "ExportPlan") -> str:
    """Why what was written cannot be judged by what the adapters do; empty when it can."""
    if plan.source.root.suffix == ".onnx":
        return "for the base is a graph: `hra-export validate --base DIRECTORY` does"
    return "for at strength 0 the adapters do nothing" if plan.options.strength == 0 else ""


def _plan(base: str | None, adapters: list["HraAdapter"], wishes: dict[str, Any], console: Console) -> "ExportPlan":
    """The plan, with the defaults that suit the base; wishes that exclude each other are a matter of usage."""
    from hra_export.cli.sources import quantized_base, quantized_matrices, resolve_base
    from hra_export.export import plan_export
    from hra_export.graph.options import GraphOptions

    swappable, per_row = wishes.pop("swappable"), wishes.pop("per_row")
    swap = "rows" if per_row else "adapter" if swappable else "none"
    file = quantized_base(base, adapters)
    mode = wishes.pop("mode") or ("merged" if swap == "none" and file is None else "reflect")
    keeps = file is not None and mode == "reflect"
    precision = wishes.pop("precision") or ("keep" if keeps else "fp32")
    blocks = None
    try:
        options = GraphOptions(**{**wishes, "mode": mode, "precision": precision, "swap": swap})
        if file is not None and precision == "keep" and (blocks := quantized_matrices(file)):
            console.say(
                f"`{file.name}` is quantized: its bits are kept and the reflections stay outside, which is exact"
            )
        directory = resolve_base(base, adapters, console, dequantize=True)
        return plan_export(directory, adapters, options, blocks=blocks)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _plan_data(plan: "ExportPlan", output: Path) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "base": str(plan.source.root),
        "adapters": [adapter.label for adapter in plan.sources],
        "output": str(output),
        "options": asdict(plan.options),
        "targets": len(plan.targets),
        "notes": list(plan.notes),
    }


def _plan_text(plan: "ExportPlan", output: Path) -> str:
    chosen, targets = plan.options, f"{len(plan.targets)} targets"
    how = f"{targets} folded into the weights" if chosen.mode == "merged" else f"an operator before each of {targets}"
    lines = [
        f"would write `{output}` for {chosen.runtime}: {how}, {chosen.precision}, opset {chosen.opset}",
        *options.strength_lines(chosen.strength, chosen.interpolation),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _report_data(report: "ExportReport") -> dict[str, object]:
    from dataclasses import asdict

    graphs = [{"file": f"{name}.onnx", **asdict(graph)} for name, graph in report.graphs.items()]
    return {
        "family": report.family,
        "task": report.task,
        "size_bytes": report.size_bytes,
        "graphs": graphs,
        "notes": list(report.notes),
    }


def _report_text(report: "ExportReport", seconds: float) -> str:
    lines = []
    for name, graph in report.graphs.items():
        reflections = f", {len(graph.reflections)} reflections" if graph.reflections else ""
        lines.append(f"{name}.onnx: {report.task}, {graph.nodes} nodes{reflections}")
    lines.append(f"wrote `{report.output}`: {size_text(report.size_bytes)}, {seconds:.1f} s")
    return "\n".join(lines)
