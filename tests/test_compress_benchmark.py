"""The benchmark of compression at toy size: every contender is scored, and scores say what they should."""

import json
from pathlib import Path

import pytest

from benchmarks import compress, harness
from hra_export.adapter import HraAdapter, write_adapter
from hra_export.rotation import shortest_chain
from tests.synthetic import linear_modules
from tests.test_compress import turning
from tests.train_scene import save_base, sums, write_jsonl

RANKS = (2, 6)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on a tiny llama and an adapter of rank 6."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    base = save_base(tmp_path / "base", chat=False)
    modules = [name for name in linear_modules() if name.endswith(("q_proj", "up_proj"))]
    chains = {name: shortest_chain(turning([0.9, 0.6, 0.3], seed=i, width=32)) for i, name in enumerate(modules)}
    write_adapter(HraAdapter(chains, rank=6), tmp_path / "adapter")
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(6))
    places = ["--base", base, "--adapter", tmp_path / "adapter", "--calibration", rows, "--heldout", rows]
    picture = tmp_path / "picture.png"
    compress.main([*map(str, places), "--ranks", *map(str, RANKS), "--rows", "3", "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    return tmp_path / "results" / "compress.json"


# Of a whole chain that is taken apart and put together again, in float32 logits.
NOTHING_LOST = 1e-6


def test_every_contender_is_scored_and_nothing_is_lost_at_the_full_rank(results: Path) -> None:
    data = json.loads(results.read_bytes())
    assert data["whole"]["as trained"]["divergence"] == 0
    assert data["whole"]["base"]["divergence"] > 0
    assert set(data["scores"]) == {
        *("first columns", "angles", "weights", "outputs, dropped", "outputs"),
        *("LoRA, weights", "LoRA, outputs"),
    }
    for name, by_rank in data["scores"].items():
        few, all_of_it = (by_rank[str(rank)]["divergence"] for rank in RANKS)
        assert abs(all_of_it) < NOTHING_LOST < few, name
    assert len(data["table"]) == 1 + 2 + 7 * len(RANKS)
