"""The measures and the verdict, on arrays made for one property each."""

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from hra_export import parity
from hra_export.parity import OutputParity, ParityReport
from hra_export.tolerance import GRAPH_TOLERANCES, TOLERANCES, UNREAD_TOLERANCES, Tolerance
from hra_export.validation.page import page

RANDOM = np.random.default_rng(0)
BASE = RANDOM.standard_normal((5, 40))
EFFECT = 0.1 * RANDOM.standard_normal((5, 40))
QUANTIZATION = 0.3 * RANDOM.standard_normal((5, 40))  # larger than the effect


def measure(candidate: np.ndarray, start: np.ndarray | None = None, *, logits: bool = True) -> OutputParity:
    return parity.compare("x", BASE + EFFECT, candidate, BASE, logits=logits, start=start)


def report(*outputs: OutputParity, precision: str = "fp32", is_read: bool = True) -> ParityReport:
    tolerance = (GRAPH_TOLERANCES if is_read else UNREAD_TOLERANCES)[precision]
    findings = tuple(parity.departed(outputs, tolerance))
    return ParityReport(precision, tolerance, outputs, findings, layers=outputs, provider="cpu")


def test_effect_error_is_0_for_the_reference_and_1_for_the_base() -> None:
    assert measure(BASE + EFFECT).effect_error == 0
    assert measure(BASE).effect_error == pytest.approx(1)
    assert measure(BASE).effect_share == pytest.approx(0)
    assert measure(BASE + 0.5 * EFFECT).effect_share == pytest.approx(0.5)


def test_error_of_the_base_is_told_apart_from_the_adapters() -> None:
    """The candidate's base is far off, and its adapter is exact."""
    start = BASE + QUANTIZATION
    found = measure(start + EFFECT, start)
    assert found.effect_error == pytest.approx(0, abs=1e-12)
    assert found.base_error == pytest.approx(np.linalg.norm(QUANTIZATION) / np.linalg.norm(BASE))
    assert found.base_kl == pytest.approx(parity.mean_kl(BASE, start))
    assert measure(start + EFFECT).effect_error > 1  # which nothing could be judged by


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_candidate_without_its_adapter_fails_by_its_share(precision: str) -> None:
    start = BASE + 0.01 * QUANTIZATION
    assert report(measure(start + EFFECT, start), precision=precision, is_read=False).ok
    (finding, *_) = report(measure(start, start), precision=precision, is_read=False).findings
    assert "0% of the adapter's effect arrived" in finding


def test_swappable_candidate_whose_default_is_not_the_base_fails() -> None:
    """Its adapter's effect is right, on a base that is not."""
    start = BASE * 1.001
    (finding, *_) = report(measure(start + EFFECT, start)).findings
    assert "without the adapter it is off from the base" in finding


def test_divergence_is_held_against_what_the_rounded_base_explains() -> None:
    row = UNREAD_TOLERANCES["int4"]
    assert row.allowed_kl(None) == row.kl
    assert row.allowed_kl(0.01) == pytest.approx(0.04)
    assert row.allowed_kl(100.0) == row.kl
    wrong = replace(measure(BASE + EFFECT, BASE), kl=0.05, base_kl=0.01)
    assert any("KL divergence 5.0e-02 nats, allowed 4e-02" in text for text in parity.departures(wrong, row))


def test_noise_allows_more_of_a_small_effect_up_to_a_bound() -> None:
    row = Tolerance(1e-4, 1.0, "", noise=2e-5)
    assert row.allowed_effect(1.0) == 1e-4
    assert row.allowed_effect(0.01) == pytest.approx(2e-3)
    assert row.allowed_effect(1e-9) == 0.1


def test_first_departure_is_the_first_that_is_off_and_not_the_worst() -> None:
    layers = [
        replace(measure(BASE + EFFECT, logits=False), name="right"),
        replace(measure(BASE + 0.9 * EFFECT, logits=False), name="first"),
        replace(measure(BASE, logits=False), name="worst"),
    ]
    first = report(*layers).first_departure
    assert first is not None
    assert first.name == "first"


def test_layer_that_the_adapter_does_not_move_departs_by_its_own_size() -> None:
    still = parity.compare("k", BASE, BASE, BASE, logits=False)
    off = parity.compare("k", BASE, BASE * 1.01, BASE, logits=False)
    assert not parity.is_departure(still, GRAPH_TOLERANCES["fp32"])
    assert parity.is_departure(off, GRAPH_TOLERANCES["fp32"])


def test_report_is_json_without_words_that_json_has_not() -> None:
    broken = BASE.copy()
    broken[0, 0] = math.nan
    found = report(measure(broken))
    assert not found.ok
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["outputs"][0]["max_abs"] is None


def test_page_shows_what_is_wrong_and_escapes_names() -> None:
    wrong = replace(measure(BASE), name="<script>alert(1)</script>")
    text = page(report(wrong, measure(BASE + EFFECT)), title="a & b")
    assert "<script" not in text
    assert "parity fails" in text
    assert "a &amp; b" in text
    assert 'class="wrong"' in text
    pictures = re.findall(r"<svg.*?</svg>", text)
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring(picture)


@pytest.mark.parametrize("row", [*TOLERANCES.values(), *GRAPH_TOLERANCES.values(), *UNREAD_TOLERANCES.values()])
def test_every_tolerance_has_a_reason_and_a_way_to_fail(row: Tolerance) -> None:
    assert len(row.reason) > 20
    assert row.effect is not None or row.share is not None
    assert (row.effect or row.share or 1.0) < 1  # the base alone, off by 1, never passes


def test_logits_that_are_all_zero_are_a_failure_and_no_crash() -> None:
    zeros = np.zeros((2, 5))
    found = parity.compare("logits", zeros, zeros, zeros, logits=True)
    assert math.isnan(found.relative)
