"""Resident peaks of whole merges and conversions: bounded by the largest tensor, whatever the size of the model.

The checkpoints have the shapes of an 8B llama and are made of holes; what is merged from them is written in full.
"""

import sys
from pathlib import Path

import pytest

from benchmarks.memory import MemoryRun, gpt2, llama, measure
from hra_export.stream import available_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

# What a worker holds of a block: as read, in float64, its copy, and rounded.
BLOCKS_BYTES = 20 * 2**20
# Two runs of the same merge differ by the blocks that happen to be under way, 16 MiB for each worker.
NOISE_BYTES = 100 * 2**20
# Of a conversion: pages of the weight at hand, its factors in float64, and SciPy. 0.2 GB were seen.
CONVERSION_BYTES = 400 * 2**20


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> MemoryRun:
    return measure(llama(1, 6144), tmp_path_factory.mktemp("memory"))


def test_merge_stays_within_its_bound(one_layer: MemoryRun) -> None:
    assert one_layer.idle_bytes > 100 * 2**20  # torch is in there
    assert 0 < one_layer.beyond_bytes <= one_layer.bound_bytes


def test_merge_takes_blocks_and_no_whole_tensor(one_layer: MemoryRun) -> None:
    """The largest one has 112 MiB in bfloat16, 224 in float32."""
    assert one_layer.beyond_bytes < 64 * 2**20 + BLOCKS_BYTES * available_cores()


def test_merge_of_three_layers_takes_no_more_than_one_of_one(one_layer: MemoryRun, tmp_path: Path) -> None:
    three = measure(llama(3, 6144), tmp_path)
    assert three.checkpoint_bytes > 1.5 * one_layer.checkpoint_bytes
    assert three.beyond_bytes <= three.bound_bytes
    assert three.peak_bytes <= one_layer.peak_bytes + NOISE_BYTES


def test_merge_that_casts_stays_within_its_bound(one_layer: MemoryRun, tmp_path: Path) -> None:
    """Every tensor goes through memory then, and comes out twice as large."""
    cast = measure(llama(1, 6144), tmp_path, options=["--dtype", "float32"])
    assert cast.beyond_bytes <= cast.bound_bytes
    assert cast.peak_bytes <= one_layer.peak_bytes + NOISE_BYTES


def test_merge_of_weights_stored_in_out_stays_within_its_bound(tmp_path: Path) -> None:
    """Their chains act on columns, which lie scattered over the whole tensor."""
    run = measure(gpt2(1), tmp_path)
    assert run.beyond_bytes <= run.bound_bytes


def test_conversion_to_lora_takes_one_weight_at_a_time(tmp_path: Path) -> None:
    run = measure(llama(3, 6144), tmp_path, verb="convert", options=["--to", "lora"])
    assert run.checkpoint_bytes > 3 * CONVERSION_BYTES
    assert run.beyond_bytes < CONVERSION_BYTES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_merge_of_an_8b_model_stays_within_the_bound_of_a_small_one(one_layer: MemoryRun, tmp_path: Path) -> None:
    """16 GB, written in full to the temporary folder and deleted."""
    run = measure(llama(), tmp_path)
    assert run.checkpoint_bytes > 16e9
    assert run.beyond_bytes <= min(run.bound_bytes, one_layer.bound_bytes)
