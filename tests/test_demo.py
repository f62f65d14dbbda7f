"""The demo's data, and the parts of its script that can be wrong unseen. `make demo` runs the whole."""

import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = EXAMPLES / "data"


def load_script(path: Path) -> ModuleType:
    """A script as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"examples_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # as Python does for a script, whose neighbours it imports
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
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
