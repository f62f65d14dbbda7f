"""Resident peaks of whole merges: bounded by the largest tensor, whatever the size of the model.

The checkpoints have the shapes of an 8B llama and are made of holes; what is merged from them is written in full.
"""

import sys
from pathlib import Path

import pytest

from benchmarks.memory import MemoryRun, llama_8b, measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

# Two runs of the same merge differ by the blocks that happen to be under way, 16 MiB for each worker.
NOISE_BYTES = 100 * 2**20


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> MemoryRun:
    return measure(llama_8b(1, vocabulary=16384), tmp_path_factory.mktemp("memory"))


def test_merge_stays_within_its_bound(one_layer: MemoryRun) -> None:
    assert one_layer.idle_bytes > 100 * 2**20  # torch is in there
    assert 0 < one_layer.beyond_bytes <= one_layer.bound_bytes


def test_merge_of_three_layers_takes_no_more_than_one_of_one(one_layer: MemoryRun, tmp_path: Path) -> None:
    three = measure(llama_8b(3, vocabulary=16384), tmp_path)
    assert three.checkpoint_bytes > 1.5 * one_layer.checkpoint_bytes
    assert three.beyond_bytes <= three.bound_bytes
    assert three.peak_bytes <= one_layer.peak_bytes + NOISE_BYTES


def test_merge_that_casts_stays_within_its_bound(one_layer: MemoryRun, tmp_path: Path) -> None:
    """Every tensor goes through memory then, and comes out twice as large."""
    cast = measure(llama_8b(1, vocabulary=16384), tmp_path, options=["--dtype", "float32"])
    assert cast.beyond_bytes <= cast.bound_bytes
    assert cast.peak_bytes <= one_layer.peak_bytes + NOISE_BYTES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_merge_of_an_8b_model_stays_within_the_bound_of_a_small_one(one_layer: MemoryRun, tmp_path: Path) -> None:
    """16 GB, written in full to the temporary folder and deleted."""
    run = measure(llama_8b(), tmp_path)
    assert run.checkpoint_bytes > 16e9
    assert run.beyond_bytes <= min(run.bound_bytes, one_layer.bound_bytes)
