"""`hra-export inspect`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console, size_text, table

if TYPE_CHECKING:
    from hra_export.effect import Effect
    from hra_export.inspection import AdapterReport, TargetReport

LOSS_HEADINGS = {"bfloat16": "bf16 loses", "float16": "fp16 loses", "float32": "fp32 loses"}


@click.command("inspect")
@options.adapter
@click.option("--base", metavar="BASE", help="Also measure ΔW in this model directory, Hub id or .gguf file.")
@options.talk
def command(adapter: str, base: str | None, console: Console) -> None:
    """Show what ADAPTER does: its targets, ranks, angles and orthogonality.

    Two neighbouring vectors at an angle turn a plane by twice that angle; parallel ones do nothing. With a base, also
    how large ΔW is, and how much of it each storage dtype would lose.

    Example: hra-export inspect runs/adapter --base models/base
    """
    from hra_export.checkpoint import open_checkpoint
    from hra_export.cli.sources import resolve_adapter, resolve_base
    from hra_export.inspection import inspect_adapter

    read = resolve_adapter(adapter)
    checkpoint = None
    if base is not None:
        checkpoint = open_checkpoint(resolve_base(base, [read], console))
        console.say(f"measuring ΔW in `{checkpoint.root}`")
    report = inspect_adapter(read, checkpoint)
    for warning in report.warnings():
        console.warn(warning)
    console.result(_text(report), {"verb": "inspect", **report.to_json()})


def _text(report: "AdapterReport") -> str:
    return "\n\n".join([_summary(report), _kinds(report), _targets(report)])


def _summary(report: "AdapterReport") -> str:
    kind = "Gram-Schmidt chains (apply_GS)" if report.orthogonalize else "chains"
    odd = ", odd: the last vector stands alone and det R = -1" if report.rank % 2 else ""
    rows = [
        ["adapter", report.label],
        ["digest", report.digest or "(in memory)"],
        ["files", ", ".join(f"{name} ({size_text(size)})" for name, size in report.files.items()) or "(in memory)"],
        ["base", report.base or "(not named)"],
        ["chains", f"{len(report.targets)} {kind} of rank {report.rank}{odd}; {report.chain_size:,} parameters"],
    ]
    if report.parameters:
        rows.append(["also", f"{len(report.parameters)} trained tensors, {report.parameter_size:,} parameters"])
        rows.append(["", ", ".join(report.parameters)])
    if report.effect is not None:
        losses = ", ".join(f"{dtype} {_share(report.effect.loss(dtype))}" for dtype in LOSS_HEADINGS)
        rows.append(["measured in", str(report.measured_in)])
        rows.append(["ΔW", f"{report.effect.delta_norm:.3g}, {report.effect.relative:.2%} of the targets' W"])
        rows.append(["lost of ΔW", f"{losses} when stored so"])
    return table(rows, header=False)


def _kinds(report: "AdapterReport") -> str:
    rows = [["kind", "targets", "d", "pair angle min", "median", "max", "rotation", *_effect_headings(report)]]
    for kind in report.kinds:
        features = "/".join(map(str, kind.features))
        angles = [_angle(angle) for angle in kind.pair_angles] if kind.pair_angles else ["", "", ""]
        rotation = _angle(max(target.rotation for target in kind.targets))
        rows.append([kind.kind, str(len(kind.targets)), features, *angles, rotation, *_effect_cells(kind.effect)])
    return table(rows, right=range(1, len(rows[0])))


def _targets(report: "AdapterReport") -> str:
    rows = [["target", "d", "r", "pair angles", "rotation", "‖ÛᵀÛ-I‖", "‖RᵀR-I‖", *_effect_headings(report)]]
    for target in report.targets:
        figures = [_angle(target.rotation), f"{target.column_penalty:.3g}", f"{target.orthogonality_error:.0e}"]
        shape = [str(target.features), str(target.rank)]
        rows.append([target.module, *shape, _pairs(target), *figures, *_effect_cells(target.effect)])
    return table(rows, right=range(1, len(rows[0])))


def _pairs(target: "TargetReport") -> str:
    """Smallest to largest; the JSON has each of them."""
    angles = target.pair_angles
    spread = f"{_angle(min(angles))} to {_angle(max(angles))}" if len(angles) > 1 else "".join(map(_angle, angles))
    return spread or "(one vector)"


def _effect_headings(report: "AdapterReport") -> Sequence[str]:
    return ["‖ΔW‖", "of ‖W‖", *LOSS_HEADINGS.values()] if report.effect is not None else []


def _effect_cells(effect: "Effect | None") -> Sequence[str]:
    if effect is None:
        return []
    return [
        f"{effect.delta_norm:.3g}",
        f"{effect.relative:.2%}",
        *(_share(effect.loss(dtype)) for dtype in LOSS_HEADINGS),
    ]


def _angle(degrees: float) -> str:
    return f"{degrees:.3g}°"


def _share(loss: float | None) -> str:
    """A relative error for people: 45.2%, 0.23%, 3e-06."""
    if loss is None:
        return "-"
    return f"{loss:.3g}" if loss < 1e-4 else f"{loss:.2%}"
