"""The demo's data, and the parts of its script that can be wrong unseen. `make demo` runs the whole."""

import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hra_export import compact_wy, householder
from tests.tiny_models import build

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = EXAMPLES / "data"
PAD = 0


def load_script(path: Path) -> ModuleType:
    """A script as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"examples_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    return load_script(DATA / "make_data.py")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_script(EXAMPLES / "demo.py")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_data_files_are_what_the_script_writes(make_data: ModuleType) -> None:
    train, heldout = make_data.make_rows(make_data.SEED)
    assert (DATA / "train.jsonl").read_bytes() == make_data.to_jsonl(train).encode()
    assert (DATA / "heldout.jsonl").read_bytes() == make_data.to_jsonl(heldout).encode()


def test_data_files_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.jsonl")) < 300_000


def test_heldout_rows_share_no_pair_of_values_with_training(demo: ModuleType) -> None:
    def pairs(name: str) -> set[tuple[str, str]]:
        fields = [demo.read_fields(row["completion"]) for row in rows(name)]
        return {pair for f in fields for pair in combinations((f["customer"], f["item"], f["city"]), 2)}

    assert pairs("train.jsonl").isdisjoint(pairs("heldout.jsonl"))


def test_heldout_templates_are_not_in_training(make_data: ModuleType) -> None:
    assert set(make_data.HELDOUT_TEMPLATES).isdisjoint(make_data.TRAIN_TEMPLATES)


def test_unseen_values_are_not_in_training(make_data: ModuleType) -> None:
    text = (DATA / "train.jsonl").read_text(encoding="utf-8")
    unseen = [word for values in make_data.UNSEEN.values() for value in values.split("|") for word in value.split("/")]
    assert [word for word in unseen if word in text] == []


def test_rows_are_answered_by_their_own_prompt(demo: ModuleType) -> None:
    """Every value but the quantity, which may be in words, can be read in the prompt."""
    for row in rows("train.jsonl") + rows("heldout.jsonl"):
        fields = demo.read_fields(row["completion"])
        assert list(fields) == ["customer", "item", "quantity", "city", "day"]
        assert all(fields[key] in row["prompt"] for key in ("customer", "city", "day"))
        assert fields["item"][:-2] in row["prompt"].lower()  # shelf, shelves; knife, knives
        assert fields["quantity"].isdecimal()


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ("customer: Mara Lind\nday: Friday", {"customer": "Mara Lind", "day": "Friday"}),
        (" day: Friday\n", {"day": "Friday"}),
        ("The item is a lamp.", {}),
        ("", {}),
        ("day: Friday: morning", {"day": "Friday: morning"}),
    ],
)
def test_read_fields_takes_only_key_and_value(demo: ModuleType, answer: str, fields: dict[str, str]) -> None:
    assert demo.read_fields(answer) == fields


def test_completion_loss_is_the_models_own_loss_on_the_completions(demo: ModuleType) -> None:
    """transformers' loss with every other label masked, on rows of different lengths."""
    model = build("llama")
    batch = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14, 15, 16]), ([17], [18])]
    tokens = torch.full((3, 7), PAD)
    labels = torch.full((3, 7), -100)
    for i, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        tokens[i, :end] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : end] = torch.tensor(completion)
    expected = model(input_ids=tokens, attention_mask=(labels != -100) | (tokens != PAD), labels=labels).loss
    torch.testing.assert_close(demo.completion_loss(model, batch, PAD), expected)


def test_paired_vectors_start_at_the_identity(demo: ModuleType) -> None:
    vectors = demo.paired_vectors(32, torch.Generator().manual_seed(0))
    rotation = householder.dense(compact_wy(vectors))
    torch.testing.assert_close(rotation, torch.eye(32, dtype=torch.float64))


def test_rate_warms_up_and_falls(demo: ModuleType) -> None:
    rates = [demo.rate(step, 80) for step in range(80)]
    assert rates[demo.WARMUP_STEPS - 1] == rates[demo.WARMUP_STEPS] == 1.0
    assert rates[demo.WARMUP_STEPS :] == sorted(rates[demo.WARMUP_STEPS :], reverse=True)
    assert 0.02 <= rates[-1] < 0.03
