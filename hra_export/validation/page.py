"""A parity report as one page of HTML that needs nothing else: plots, tables, findings."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from hra_export.filesystem import as_output_error
from hra_export.parity import OutputParity, ParityReport, departures, is_departure
from hra_export.validation.plots import Bar, log_bars, log_curve, share_bars

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #fff; --soft: #8796a5; --line: #d8dfe6; --right: #2a6f97;
  --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde5ec; --paper: #12181f; --soft: #8796a5; --line: #2c3641;
  --right: #6aaed6; --wrong: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 900px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.verdict { font-weight: 600; } .verdict.wrong, li.wrong { color: var(--wrong); }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.right { fill: var(--right); } rect.wrong, circle.wrong { fill: var(--wrong); } .back { fill: var(--line); }
.grid { stroke: var(--line); } .mark { stroke: var(--ink); stroke-width: 2; }
.curve { fill: none; stroke: var(--right); stroke-width: 1.5; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.15rem 0.6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } p.why { color: var(--soft); }
"""


def write_page(report: ParityReport, path: Path, *, title: str) -> None:
    """Write a report as HTML.

    Raises:
        OutputError: the file cannot be written.
    """
    with as_output_error(f"write `{path}`"):
        path.write_text(page(report, title=title), encoding="utf-8")


def page(report: ParityReport, *, title: str) -> str:
    """The page: what is wrong first, then pictures, then figures."""
    sections = [*_verdict(report), *_effect(report), *_layers(report), *_agreement(report), *_figures(report)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def _verdict(report: ParityReport) -> Iterator[str]:
    word = "parity holds" if report.ok else f"parity fails: {len(report.findings)} findings"
    where = f", on {report.provider}" if report.provider else ""
    yield f'<p class="verdict {"right" if report.ok else "wrong"}">{word} ({escape(report.dtype)}{where})</p>'
    items = [("wrong", finding) for finding in report.findings] + [("note", note) for note in report.notes]
    items += [("note", str(run)) for run in report.operators]
    items += [("note", str(report.cost))] if report.cost is not None else []
    if items:
        yield "<ul>" + "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in items) + "</ul>"
    yield f'<p class="why">What is allowed, and why: {escape(report.tolerance.reason)}.</p>'


def _effect(report: ParityReport) -> Iterator[str]:
    if not report.outputs:
        return
    if report.tolerance.share is None:
        yield "<h2>Error of the adapter's effect</h2><p>0 is perfect, 1 is the base; the mark is what is allowed.</p>"
        allowed = report.tolerance.allowed_effect
        bars = [
            Bar(each.name, each.effect_error, allowed(each.effect_size), _is_wrong(each, report))
            for each in report.outputs
        ]
        yield log_bars(bars, title="error of the adapter's effect, by output")
        return
    yield "<h2>Share of the adapter's effect that arrived</h2>"
    shares = [Bar(each.name, each.effect_share, None, _is_wrong(each, report)) for each in report.outputs]
    yield share_bars(shares, title="share of the adapter's effect that arrived, by output")


def _layers(report: ParityReport) -> Iterator[str]:
    if not report.layers:
        return
    first = report.first_departure
    yield "<h2>Layer by layer</h2>"
    yield f"<p>The first that departs is <code>{escape(first.name)}</code>.</p>" if first else "<p>None departs.</p>"
    points = [Bar(layer.name, layer.relative, None, is_departure(layer, report.tolerance)) for layer in report.layers]
    yield log_curve(points, title="relative error of each layer's output, in the order they run")


def _agreement(report: ParityReport) -> Iterator[str]:
    bars = [Bar(each.name, each.top1, None, each.top1 < 1) for each in report.outputs if each.top1 is not None]
    bars += [
        Bar(f"decoding `{_short(each.prompt)}`", each.agreed / each.count, None, each.agreed < each.count)
        for each in report.decodings
    ]
    if bars:
        yield "<h2>Most likely token: the same on both sides</h2>"
        yield share_bars(bars, title="share of positions with the same most likely token")
    found = report.perplexity
    if found is not None:
        rows = [["base", f"{found.base:.4f}"], ["reference", f"{found.reference:.4f}"]]
        rows.append(["candidate", f"{found.candidate:.4f}"])
        yield f"<h2>Perplexity over {found.tokens:,} tokens</h2>{_table(['side', 'perplexity'], rows)}"


def _figures(report: ParityReport) -> Iterator[str]:
    headings = ["output", "effect off by", "effect", "arrived", "max abs", "relative", "cosine", "KL", "base off by"]
    for title, measured in (
        ("All figures", report.outputs),
        ("With activations that are not rounded", report.exact),
        ("Layers", report.layers),
    ):
        if measured:
            yield f"<h2>{title}</h2>{_table(headings, [_row(each) for each in measured])}"


def _row(each: OutputParity) -> list[str]:
    figures = [each.effect_error, each.effect_size, each.effect_share, each.max_abs, each.relative, each.cosine]
    return [each.name, *(f"{value:.3g}" for value in figures), *(_optional(v) for v in (each.kl, each.base_error))]


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _is_wrong(output: OutputParity, report: ParityReport) -> bool:
    return any(departures(output, report.tolerance))


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:29]}…"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
