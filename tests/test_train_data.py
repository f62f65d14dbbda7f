"""Rows to train on: which task their columns mean, what is wrong with them and where, and which are held out."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hra_export.errors import FormatError, HraExportError, MismatchError, OutputError
from hra_export.training import labels
from hra_export.training.rows import TaskRows, read_rows, split_rows
from hra_export.training.settings import Settings
from tests.train_scene import chats, opinions, sums, write_jsonl

RowsOf = Any


def settings(data: Path | str, **options: object) -> Settings:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return Settings.from_mapping({"base": "b", "data": str(data), "output": "o", **named})


def read(data: Path | str, tmp_path: Path, *, known: tuple[str, ...] = (), **options: object) -> TaskRows:
    return read_rows(settings(data, **options), tmp_path / "cache", known_classes=known)


def findings(data: Path | str, tmp_path: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(HraExportError) as caught:
        read(data, tmp_path, **options)
    assert caught.value.exit_code == 4
    return caught.value.findings


# Formats


def as_json(path: Path, rows: Sequence[RowsOf]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def as_parquet(path: Path, rows: Sequence[RowsOf]) -> Path:
    import pyarrow  # type: ignore[import-untyped]  # ships no types
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def as_csv(path: Path, rows: Sequence[RowsOf]) -> Path:
    import csv

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {".jsonl": write_jsonl, ".json": as_json, ".csv": as_csv, ".tsv": as_csv, ".parquet": as_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": 'say "a,\tb"', "completion": "null"}, {"prompt": "007", "completion": " one\ntwo "}]
    found = read(WRITERS[suffix](tmp_path / f"rows{suffix}", rows), tmp_path)
    assert found.train.to_list() == rows
    reference = read(write_jsonl(tmp_path / "reference.jsonl", rows), tmp_path)
    assert found.digests == reference.digests


def test_columns_that_are_not_used_stay_outside(tmp_path: Path) -> None:
    """TRL would take a column `input_ids` or `images` for its own."""
    rows = [{**row, "input_ids": [1, 2], "images": "x", "labels": 3} for row in sums(3)]
    assert set(read(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path).train.column_names) == {
        "prompt",
        "completion",
    }


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.txt", b"a", "`.txt` is not read"),
        ("rows.parquet", b"PAR1", "cannot be read"),
        ("rows.json", b"{}", "1 row is unusable"),
        ("rows.csv", b"a,a\n1,2\n", "1 row is unusable"),
        ("rows.jsonl", b"", "1 row is unusable"),
    ],
)
def test_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=says):
        read(tmp_path / name, tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        read(tmp_path / "none.jsonl", tmp_path)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is a directory; expected a file"):
        read(tmp_path, tmp_path)


def test_hub_id_is_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot fetch data `somebody/rows` from the Hub"):  # it is off in tests
        read("somebody/rows", tmp_path)


# Malformed rows


def test_malformed_lines_are_all_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n\n{"prompt": 1, "completion": "b"}\n{"prompt": "a"\n[1]\n\xff\n'
    )
    lines = findings(path, tmp_path)
    assert [line.partition(":")[0] for line in lines] == ["row 2", "row 3", "row 4", "row 5", "row 6"]
    assert lines[0] == "row 2: empty"
    assert lines[1] == "row 3: `prompt` is a number, and text in row 1"


def test_csv_rows_of_another_length_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",up\nno label\n\na,b,c\n')
    assert findings(path, tmp_path) == (
        "row 2: expected 2 fields, got 1",
        "row 3: empty",
        "row 4: expected 2 fields, got 3",
    )


def test_many_findings_are_counted_and_not_all_shown(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 500)
    with pytest.raises(FormatError, match="500 rows are unusable") as caught:
        read(rows, tmp_path)
    assert caught.value.findings[-1] == "and 480 more"
    assert len(caught.value.findings) == 21


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WRONG = {
    "empty completion": ({"prompt": "a", "completion": " "}, "`completion` is empty"),
    "no completion": ({"prompt": "a", "completion": None}, "`completion` is missing; expected text"),
    "no prompt": ({"prompt": None, "completion": "b"}, "`prompt` is missing; expected text"),
    "empty text": ({"text": "\n"}, "`text` is empty"),
    "no messages": ({"messages": None}, "`messages` is missing; expected a list of messages"),
    "empty messages": ({"messages": []}, "`messages` is empty"),
    "no role": ({"messages": [USER, {"role": None, "content": "b"}]}, "message 2 of `messages` has no role"),
    "no content": ({"messages": [USER, {"role": "user", "content": ""}]}, "message 2 of `messages` is empty"),
    "no label": ({"text": "a", "label": None}, "`label` is missing"),
    "empty label": ({"text": "a", "label": ""}, "`label` is missing"),
    "text without words": ({"text": "", "label": "up"}, "`text` is empty"),
}
RIGHT: dict[str, RowsOf] = {
    "completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [USER, ASSISTANT]},
    "label": {"text": "a", "label": "up"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize(("row", "says"), WRONG.values(), ids=WRONG)
def test_row_that_cannot_be_learned_is_named(tmp_path: Path, row: RowsOf, says: str) -> None:
    right = next(RIGHT[key] for key in RIGHT if key in row)
    path = write_jsonl(tmp_path / "rows.jsonl", [right, right, row, right])
    assert findings(path, tmp_path) == (f"row 3: {says}",)


def test_label_that_is_a_fraction_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": 0.5}])
    assert findings(path, tmp_path) == ("row 1: `label` is 0.5; expected a whole number or a name",)


def test_rows_without_the_assistant_are_refused_when_only_it_is_learned(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [RIGHT["messages"], {"messages": [USER]}])
    assert read(path, tmp_path).layout == "messages"
    (line,) = findings(path, tmp_path, assistant_only_loss=True)
    assert line.startswith("row 2: no message of the assistant")


def test_rows_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    def render(messages: list[Any], row: Any) -> object:
        if messages[0]["role"] != "user":
            raise RuntimeError("roles must alternate")
        return ""

    path = write_jsonl(tmp_path / "rows.jsonl", [RIGHT["messages"], {"messages": [ASSISTANT]}])
    with pytest.raises(FormatError) as caught:
        read_rows(settings(path), tmp_path / "cache", render=render)
    assert caught.value.findings == ("row 2: the chat template refuses it: roles must alternate",)


# Tasks


@pytest.mark.parametrize(
    ("rows", "task", "layout"),
    [
        (sums(2), "causal-lm", "prompt-completion"),
        (chats(2), "causal-lm", "messages"),
        ([{"text": "a"}], "causal-lm", "text"),
        (opinions(2), "sequence-classification", "labelled"),
    ],
)
def test_task_is_told_from_the_columns(tmp_path: Path, rows: list[RowsOf], task: str, layout: str) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    assert (found.task, found.layout) == (task, layout)


def test_task_can_be_chosen_where_two_would_fit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", opinions(4))
    assert read(path, tmp_path, task="causal-lm").layout == "text"


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**sums(1)[0], **opinions(1)[0]}])
    with pytest.raises(FormatError, match="could be labelled or prompt-completion"):
        read(path, tmp_path)


def test_columns_of_no_task_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(FormatError, match=r"expected columns `messages`.*found `instruction`, `output`"):
        read(path, tmp_path)
    with pytest.raises(FormatError, match="expected columns `instruction` and `label`"):
        read(path, tmp_path, text_column="instruction", task="sequence-classification")


def test_held_out_rows_must_be_alike(tmp_path: Path) -> None:
    train, other = write_jsonl(tmp_path / "a.jsonl", sums(2)), write_jsonl(tmp_path / "b.jsonl", chats(2))
    with pytest.raises(FormatError, match="its rows are messages, and those to train on prompt-completion"):
        read(train, tmp_path, eval_data=str(other))


# Labels


def test_names_become_numbers_in_the_order_of_the_alphabet(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", opinions(4)), tmp_path)
    assert found.classes == ("down", "up")
    assert found.train["label"] == [1, 0, 1, 0]


def test_numbers_in_a_csv_file_are_numbers(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "rows.csv", [{"text": "a", "label": i} for i in (2, 0, 10, 1)] * 3)
    with pytest.raises(MismatchError, match="labels go from 0 to 10, and no row has 3"):
        read(path, tmp_path)
    path = as_csv(tmp_path / "rows.csv", [{"text": "a", "label": i} for i in (2, 0, 1)])
    assert read(path, tmp_path).train["label"] == [2, 0, 1]


def test_labels_outside_the_trained_head_are_named_by_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (0, 3, 2, -1)]
    lines = findings(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path, known=("a", "b", "c"))
    assert lines == (
        "row 2: `label` is 3; expected 0 to 2, or a, b, c",
        "row 4: `label` is -1; expected 0 to 2, or a, b, c",
    )


def test_held_out_labels_must_be_classes_too(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", opinions(4))
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": "sideways"}])
    assert findings(train, tmp_path, eval_data=str(other)) == (
        "row 1: `label` is 'sideways'; expected 0 to 1, or down, up",
    )


def test_labels_option_gives_the_order(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "rows.jsonl", opinions(2)), tmp_path, labels="up,down,none")
    assert found.classes == ("up", "down", "none")
    assert found.train["label"] == [0, 1]


@pytest.mark.parametrize("values", [[1, 2, 3], [-1, 0, 1], [0, 10**12], [0, 0], ["up", "up"]])
def test_new_head_needs_two_classes_and_rows_for_each(values: list[int | str]) -> None:
    with pytest.raises(MismatchError):
        labels.find_names("rows", values)


@pytest.mark.parametrize(
    ("config", "classes"),
    [
        ({"architectures": ["BertModel"], "id2label": {"0": "a", "1": "b"}}, ()),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"architectures": ["BertForSequenceClassification"]}, ("LABEL_0", "LABEL_1")),
        ({}, ()),
    ],
)
def test_trained_head_is_told_by_its_architecture(config: dict[str, object], classes: tuple[str, ...]) -> None:
    assert labels.trained_head(config) == classes


# Holding out


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.01), (2, 0.9), (10, 0.2), (1000, 0.05)])
def test_split_keeps_every_row_once_and_both_parts_filled(count: int, fraction: float) -> None:
    kept, out = split_rows(count, fraction, seed=3)
    assert sorted(kept + out) == list(range(count))
    assert kept
    assert out
    assert abs(len(out) - count * fraction) <= 1


def test_split_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    assert split_rows(100, 0.2, seed=1) == split_rows(100, 0.2, seed=1)
    assert split_rows(100, 0.2, seed=1) != split_rows(100, 0.2, seed=2)


def test_split_gives_every_label_its_share() -> None:
    strata = ["common"] * 900 + ["rare"] * 100
    _, out = split_rows(1000, 0.1, seed=0, strata=strata)
    assert Counter(strata[index] for index in out) == {"common": 90, "rare": 10}


def test_split_of_many_small_groups_adds_up_to_the_share() -> None:
    """Each group alone would round to nothing."""
    _, out = split_rows(300, 0.1, seed=0, strata=[index // 3 for index in range(300)])
    assert len(out) == 30


def test_single_row_cannot_be_split() -> None:
    with pytest.raises(FormatError, match="cannot hold out a part of 1 row"):
        split_rows(1, 0.5, seed=0)


def test_digest_follows_content_and_order(tmp_path: Path) -> None:
    rows = sums(6)
    digests = [
        read(write_jsonl(tmp_path / f"{i}.jsonl", each), tmp_path).digests["data"]
        for i, each in enumerate([rows, rows, rows[::-1], rows[:-1]])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
