"""A parity report as text for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hra_export.cli.console import table

if TYPE_CHECKING:
    from hra_export.parity import OutputParity, ParityReport

BASE_HEADINGS = ["base off by", "base KL"]
PROMPT_WIDTH = 40


def report_text(report: "ParityReport") -> str:
    """Tables, remarks and the verdict in the last line."""
    parts = [
        *_tables(report),
        *report.notes,
        *map(str, report.operators),
        *_rounding(report),
        *_decodings(report),
        *_perplexity(report),
    ]
    first = report.first_departure
    if first is not None:
        parts.append(f"the first layer that departs is {first.name}: off by {first.relative:.1e} of its output")
    parts += [f"finding: {finding}" for finding in report.findings]
    return "\n".join([*parts, _verdict(report)])


def _verdict(report: "ParityReport") -> str:
    verdict = "parity holds" if report.ok else f"parity FAILS ({len(report.findings)} findings)"
    what = f"{report.dtype} weights" if report.provider is None else f"{report.dtype} graph on `{report.provider}`"
    tolerance = report.tolerance
    if tolerance.share is not None and report.outputs:
        shares = [output.effect_share for output in report.outputs]
        allowed = f"allowed {1 - tolerance.share:.0%} to {1 + tolerance.share:.0%}"
        return f"{verdict}: {what}, {min(shares):.0%} to {max(shares):.0%} of the adapter's effect arrived ({allowed})"
    from hra_export.parity import judged_of

    judged = judged_of(report.outputs, tolerance)
    worst = max(judged, key=lambda output: output.effect_error, default=None)
    allowed_effect = tolerance.effect if worst is None else tolerance.allowed_effect(worst.effect_size)
    largest = report.effect_error if worst is None else worst.effect_error
    of_half = " in half of the outputs" if tolerance.is_typical else ""
    off = f"off by at most {largest:.2e}{of_half} (allowed {allowed_effect or 0.0:.2g})"
    return f"{verdict}: {what}, the adapter's effect is {off}"


def _tables(report: "ParityReport") -> Iterator[str]:
    has_base = any(output.base_error is not None for output in report.outputs)
    headings = ["output", "effect off by", "effect", "max abs", "relative", "KL", "top-1"]
    if has_base:
        headings += ["arrived", *BASE_HEADINGS]
    rows = [headings, *(_row(output, has_base=has_base) for output in report.outputs)]
    yield table(rows, right=range(1, len(headings)))
    if report.layers:
        rows = [["layer", *headings[1:5]], *(_row(layer, has_base=False)[:5] for layer in report.layers)]
        yield "\n" + table(rows, right=range(1, 5)) + "\n"


def _row(output: "OutputParity", *, has_base: bool) -> list[str]:
    kl = "" if output.kl is None else f"{output.kl:.1e}"
    top1 = "" if output.top1 is None else f"{output.top1:.1%}"
    effect = f"{output.effect_error:.2e}" if output.effect_size else "-"
    row = [
        output.name,
        effect,
        f"{output.effect_size:.2g}",
        f"{output.max_abs:.1e}",
        f"{output.relative:.1e}",
        kl,
        top1,
    ]
    if has_base:
        base = ["", ""] if output.base_error is None else [f"{output.base_error:.1e}", ""]
        base[1] = "" if output.base_kl is None else f"{output.base_kl:.1e}"
        row += [f"{output.effect_share:.1%}", *base]
    return row


def _rounding(report: "ParityReport") -> Iterator[str]:
    """What rounding cost, and how far the graph itself is off."""
    if report.cost is not None:
        yield str(report.cost)
    if report.exact:
        worst = max(output.effect_error for output in report.exact)
        yield f"with activations that are not rounded, the adapter's effect is off by at most {worst:.1e}"


def _decodings(report: "ParityReport") -> Iterator[str]:
    for each in report.decodings:
        prompt = each.prompt if len(each.prompt) <= PROMPT_WIDTH else f"{each.prompt[: PROMPT_WIDTH - 1]}…"
        where = f" by {each.runtime}" if each.runtime != "ONNX Runtime" else ""
        yield f"greedy decoding of `{prompt}`{where}: the first {each.agreed} of {each.count} tokens agree"


def _perplexity(report: "ParityReport") -> Iterator[str]:
    found = report.perplexity
    if found is not None:
        figures = f"base {found.base:.4f}, reference {found.reference:.4f}, candidate {found.candidate:.4f}"
        yield f"perplexity over {found.tokens:,} tokens: {figures}"
