"""`hra-export train` on sequence classifiers: heads, labels, metrics."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hra_export.adapter import read_adapter
from hra_export.training.classification import mean_cross_entropy, metrics
from tests.command_line import Outcome, run
from tests.train_scene import opinions, save_base, save_encoder, save_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    save_encoder(folder / "bert")
    save_base(folder / "llama")
    write_jsonl(folder / "opinions.jsonl", opinions(40))
    return folder


def train(folder: Path, output: Path, *more: str | int | float | Path, base: str = "bert") -> Outcome:
    outcome = run(
        *("train", "--base", folder / base, "--data", folder / "opinions.jsonl", "--output", output), *map(str, more)
    )
    assert outcome.code == 0, outcome.stderr
    return outcome


def history(output: Path) -> list[dict[str, str]]:
    with (output / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, Outcome]:
    output = folder / "out"
    options: list[str | float] = ["--eval-split", 0.25, "--epochs", 8, "--metric", "matthews", "--json"]
    return output, train(folder, output, *options)


def test_classifier_learns_and_the_best_is_published(trained: tuple[Path, Outcome]) -> None:
    report = trained[1].json
    assert report["figures"]["eval_accuracy"] == report["figures"]["eval_f1"] == 1
    assert report["figures"]["eval_matthews"] == 1
    first = history(trained[0])[0]
    best = next(row for row in history(trained[0]) if row["eval_matthews"] == "1.0")
    assert report["step"] == int(best["step"])  # the first of equals
    assert float(best["eval_loss"]) < float(first["loss"])


def test_head_is_saved_beside_the_chains(trained: tuple[Path, Outcome]) -> None:
    adapter = read_adapter(trained[0])
    assert {"classifier.weight", "classifier.bias"} == set(adapter.parameters)
    assert adapter.parameters["classifier.weight"].shape == (2, 32)
    assert len(adapter.chains) == 2 * 6 + 1
    config = json.loads((trained[0] / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier", "score"]  # PEFT's names for heads


def test_names_of_the_classes_are_kept(trained: tuple[Path, Outcome]) -> None:
    assert 'labels = [\n    "down",\n    "up",\n]' in (trained[0] / "train_config.toml").read_text()
    assert "| classes | down, up |" in (trained[0] / "README.md").read_text()
    assert trained[1].json["sample"][1] == {"text": "up", "is_learned": True}


def test_merged_classifier_answers_as_the_adapted_one(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    merged = run("merge", trained[0], "--output", tmp_path / "merged", "-q")
    assert merged.code == 0, merged.stderr
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = opinions(40)
    with torch.no_grad():
        scores = model(**tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)).logits
    assert [("down", "up")[index] for index in scores.argmax(-1)] == [row["label"] for row in rows]


def test_part_of_the_base_that_is_missing_is_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    """A pooler drawn at random, left frozen and not saved, would be another one at the next load."""
    save_encoder(tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    tensors = {name: value for name, value in load_file(weights).items() if "pooler" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    outcome = run(
        *("train", "--base", tmp_path / "bert", "--data", folder / "opinions.jsonl", "--output", tmp_path / "out"),
        *("--max-steps", "2"),
    )
    assert outcome.code == 0, outcome.stderr
    assert "note: `bert.pooler.dense` is new and trained whole" in outcome.stderr
    adapter = read_adapter(tmp_path / "out")
    assert "bert.pooler.dense.weight" in adapter.parameters
    assert "bert.pooler.dense" not in adapter.chains


def test_trained_head_keeps_its_classes(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    names = {0: "up", 1: "sideways", 2: "down"}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=3, id2label=names)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    outcome = run(
        *("train", "--base", tmp_path / "base", "--data", folder / "opinions.jsonl", "--output", tmp_path / "out"),
        *("--learning-rate", "0", "--max-steps", "1", "--json"),
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["settings"]["labels"] == ["up", "sideways", "down"]
    assert "is new" not in outcome.stderr
    saved = read_adapter(tmp_path / "out").parameters["classifier.weight"]
    assert torch.equal(saved, model.classifier.weight.detach())


def test_decoder_can_classify(folder: Path, tmp_path: Path) -> None:
    outcome = train(folder, tmp_path / "out", "--max-steps", 2, "--eval-split", 0.2, "--json", base="llama")
    assert read_adapter(tmp_path / "out").parameters["score.weight"].shape == (2, 32)
    assert 0 <= outcome.json["figures"]["eval_accuracy"] <= 1


def test_pairs_of_texts_are_read_together(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "second": "the one", "label": row["label"]} for row in opinions(8)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    outcome = run(
        *("train", "--base", folder / "bert", "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "out"),
        *("--text-pair-column", "second", "--max-steps", "1", "--json"),
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["sample"][0]["text"].endswith("good the one")


def test_half_base_trains_its_head_in_float32(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out", "--dtype", "bfloat16", "--max-steps", 2)
    values = read_adapter(tmp_path / "out").parameters["classifier.weight"]
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_weight_decay_shrinks_the_head_and_no_chain(folder: Path, tmp_path: Path) -> None:
    options = ["--learning-rate", "0.01", "--warmup", "0", "--max-steps", "1"]
    adapters = []
    for name, decay in {"none": "0", "much": "10"}.items():
        train(folder, tmp_path / name, *options, "--weight-decay", decay)
        adapters.append(read_adapter(tmp_path / name))
    none, much = adapters
    assert all(torch.equal(none.chains[name], much.chains[name]) for name in none.chains)
    head = "classifier.weight"
    # AdamW takes lr·decay = 0.1 of a weight before its step, which is the same in both
    torch.testing.assert_close(
        none.parameters[head] - much.parameters[head], 0.1 * start_of(folder, none, head), rtol=1e-4, atol=1e-6
    )


def start_of(folder: Path, adapter: Any, name: str) -> torch.Tensor:
    """The head before the first step: its draw is repeated under the same seed."""
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    return dict(model.named_parameters())[name].detach()


# Metrics


def test_metrics_are_those_of_their_definitions() -> None:
    """Counted by hand: three classes, eight rows, one class never guessed."""
    truth, guess = [0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 0, 0, 1]
    found = metrics(np.eye(3)[guess], np.array(truth))
    precisions, recalls = [3 / 5, 1 / 3, 0], [3 / 4, 1 / 2, 0]
    f1 = sum(2 * p * r / (p + r) if p + r else 0 for p, r in zip(precisions, recalls, strict=True)) / 3
    rows, right = 8, 4
    counts_truth, counts_guess = [4, 2, 2], [5, 3, 0]
    product = sum(t * g for t, g in zip(counts_truth, counts_guess, strict=True))
    matthews = (right * rows - product) / math.sqrt(
        (rows**2 - sum(g * g for g in counts_guess)) * (rows**2 - sum(t * t for t in counts_truth))
    )
    assert found["accuracy"] == pytest.approx(right / rows)
    assert found["f1"] == pytest.approx(f1)
    assert found["matthews"] == pytest.approx(matthews)


def test_metrics_take_the_scores_out_of_a_tuple() -> None:
    assert metrics((np.eye(2), "hidden states"), np.array([0, 1]))["accuracy"] == 1


def test_loss_is_the_mean_over_all_rows_of_a_step() -> None:
    scores, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    whole = torch.nn.functional.cross_entropy(scores, labels)
    parts = [
        mean_cross_entropy({"logits": scores[rows]}, labels[rows], num_items_in_batch=6)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(mean_cross_entropy({"logits": scores}, labels), whole)
