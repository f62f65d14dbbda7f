"""What a run leaves to be read: the history of its figures as a table, and its losses as a picture."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, Any]
# In this order where present; everything else that was logged follows by name.
COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "angle_degrees", "penalty")
RENAMED = {"angle": "angle_degrees"}
# What depends on the machine's mood, or on where a run was taken up: the table is the same for the same run.
LEFT_OUT = ("runtime", "per_second", "total_flos", "train_loss", "num_tokens")
INCHES, DOTS_PER_INCH = (7.0, 4.2), 120


def history_rows(log: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a step, from the log of transformers' `Trainer`, which has one entry a kind of figures."""
    rows: dict[int, Row] = {}
    for entry in log:
        figures = {
            RENAMED.get(key, key): value for key, value in entry.items() if not any(word in key for word in LEFT_OUT)
        }
        if figures.keys() - {"step", "epoch"}:
            rows.setdefault(figures["step"], {}).update(figures)
    return [rows[step] for step in sorted(rows)]


def history_csv(rows: Sequence[Row]) -> str:
    """The table as text."""
    present = {key for row in rows for key in row}
    columns = [column for column in COLUMNS if column in present or column in ("step", "epoch", "loss")]
    columns += sorted(present - set(COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def loss_png(rows: Sequence[Row], *, title: str, best_step: int | None) -> bytes:
    """Training and held-out loss over the steps; the same bytes for the same rows."""
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plot(axes, rows, "loss", "training", color="#4477aa", linewidth=1.2)
    _plot(axes, rows, "eval_loss", "held out", color="#cc3311", linewidth=1.2, marker="o", markersize=4)
    if best_step is not None:
        axes.axvline(best_step, color="0.5", linestyle="--", linewidth=1, label=f"published: step {best_step}")
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (cross-entropy, nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _plot(axes: Any, rows: Sequence[Row], key: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
