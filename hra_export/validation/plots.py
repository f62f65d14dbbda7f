"""Small SVG pictures on logarithmic axes, as text; no library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, BAR = 22, 12
LABELS, WIDTH, RIGHT = 330, 420, 90
HEIGHT, BOTTOM, TOP = 220, 24, 12
SMALLEST = 1e-9  # everything below is drawn here


@dataclass(frozen=True)
class Bar:
    """One row: a value, and a mark that it should not pass."""

    label: str
    value: float
    mark: float | None
    is_wrong: bool = False


def log_bars(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars on a logarithmic axis, each with a mark at what is allowed."""
    values = [bar.value for bar in bars] + [bar.mark for bar in bars if bar.mark is not None]
    low, high = _decades(values)
    height = ROW * len(bars) + BOTTOM
    parts = [_axis(low, high, height)]
    for index, bar in enumerate(bars):
        y = index * ROW + (ROW - BAR) / 2
        x = _place(bar.value, low, high)
        parts.append(_text(LABELS - 8, y + BAR - 2, bar.label, "end"))
        parts.append(_rectangle(_class(bar.is_wrong), y, max(x - LABELS, 1)))
        parts.append(_text(x + 6, y + BAR - 2, f"{bar.value:.1e}", "start"))
        if bar.mark is not None:
            mark = _place(bar.mark, low, high)
            parts.append(f'<line class="mark" x1="{mark:.1f}" x2="{mark:.1f}" y1="{y - 3:g}" y2="{y + BAR + 3:g}"/>')
    return _svg(LABELS + WIDTH + RIGHT, height, title, parts)


def share_bars(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars from 0 to 1."""
    parts = []
    for index, bar in enumerate(bars):
        y = index * ROW + (ROW - BAR) / 2
        width = WIDTH * min(max(bar.value, 0.0), 1.0) if math.isfinite(bar.value) else 0.0
        parts.append(_text(LABELS - 8, y + BAR - 2, bar.label, "end"))
        parts.append(_rectangle("back", y, WIDTH))
        parts.append(_rectangle(_class(bar.is_wrong), y, width))
        parts.append(_text(LABELS + WIDTH + 6, y + BAR - 2, f"{bar.value:.1%}", "start"))
    return _svg(LABELS + WIDTH + RIGHT, ROW * len(bars), title, parts)


def log_curve(points: Sequence[Bar], *, title: str) -> str:
    """A curve over the points in order, on a logarithmic axis; hovering a dot names it."""
    low, high = _decades([point.value for point in points])
    step = (WIDTH + LABELS) / max(len(points) - 1, 1)
    places = [(60 + index * step, _height(point.value, low, high)) for index, point in enumerate(points)]
    parts = []
    for decade in range(low, high + 1):
        y = _height(10.0**decade, low, high)
        parts.append(f'<line class="grid" x1="60" x2="{60 + WIDTH + LABELS}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(52, y + 4, f"1e{decade}", "end"))
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), point in zip(places, points, strict=True):
        parts.append(
            f'<circle class="{_class(point.is_wrong)}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if point.is_wrong else 3}">'
            f"<title>{escape(point.label)}: {point.value:.1e}</title></circle>"
        )
    return _svg(LABELS + WIDTH + RIGHT, HEIGHT, title, parts)


def _class(is_wrong: bool) -> str:
    return "wrong" if is_wrong else "right"


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Whole decades that hold all values."""
    logs = [math.log10(max(value, SMALLEST)) for value in values if math.isfinite(value)] or [0.0]
    return math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)


def _share(value: float, low: int, high: int) -> float:
    if not math.isfinite(value):
        return 1.0
    return min(max((math.log10(max(value, SMALLEST)) - low) / (high - low), 0.0), 1.0)


def _place(value: float, low: int, high: int) -> float:
    return LABELS + WIDTH * _share(value, low, high)


def _height(value: float, low: int, high: int) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * _share(value, low, high)


def _axis(low: int, high: int, height: int) -> str:
    lines = []
    for decade in range(low, high + 1):
        x = _place(10.0**decade, low, high)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - BOTTOM}"/>')
        lines.append(_text(x, height - 8, f"1e{decade}", "middle"))
    return "".join(lines)


def _rectangle(kind: str, y: float, width: float) -> str:
    return f'<rect class="{kind}" x="{LABELS}" y="{y:g}" width="{width:.1f}" height="{BAR}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
