"""The benchmark of conversions at toy size: that it measures what its tables say, and that the bars hold there."""

from pathlib import Path

import pytest

from benchmarks.convert import ANGLES, BARS, DTYPES, measure_cost, measure_errors
from benchmarks.merge import Shape


def test_errors_hold_the_bars_where_naive_factors_do_not() -> None:
    found = measure_errors(64)
    assert list(found) == [f"{dtype} {angle}" for dtype in DTYPES for angle in ANGLES]
    for dtype, bar in BARS.items():
        assert all(found[f"{dtype} {angle}"]["balanced (ours)"] <= bar for angle in ANGLES)
    # Factors of near-parallel vectors cancel: the error grows as the angle shrinks.
    assert found["bfloat16 0.005"]["naive"] > 10 * found["bfloat16 0.5"]["naive"] > 0
    # PEFT rounds ΔW before it takes it apart, and its factors once more.
    assert found["bfloat16 0.005"]["PEFT SVD"] > found["bfloat16 0.005"]["balanced (ours)"]


@pytest.mark.timeout(300)
def test_both_ways_to_a_lora_give_the_same_change(tmp_path: Path) -> None:
    """PEFT's conversion is fed with ΔW by the benchmark: were it something else, the error would be near 1."""
    row, data = measure_cost("toy", Shape(128, 192, 1), tmp_path, {"ours": 1, "peft": 1})
    assert len(row) == 8
    assert data["errors"]["ours"] < BARS["float32"]  # type: ignore[index]  # a mapping inside of plain data
    assert data["errors"]["peft"] < 1e-4  # type: ignore[index]  # float32 differences of W R and W
