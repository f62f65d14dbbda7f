"""What `hra-export train` publishes, loaded by stock PEFT: the same figures as the run reported."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.hra.layer import HRALinear
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.command_line import run
from tests.train_scene import opinions, save_base, save_encoder, sums, write_jsonl

# PEFT multiplies by a dense rotation, ours by thin factors: sums of float32 in another order, through two blocks.
RTOL = 1e-4


def train(base: Path, rows: list[Any], folder: Path, *more: str) -> dict[str, str]:
    """Run the command; the last row of its history."""
    data = write_jsonl(folder / "rows.jsonl", rows)
    outcome = run(*("train", "--base", base, "--data", data, "--output", folder / "out", "--eval-data", data), *more)
    assert outcome.code == 0, outcome.stderr
    with (folder / "out" / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))[-1]


def stock(model: Any) -> Any:
    """The model, once it is certain that PEFT's own layers are in it."""
    layers = [module for module in model.modules() if isinstance(module, HRALinear)]
    assert layers
    assert {type(layer) for layer in layers} == {HRALinear}
    return model.eval()


@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning")  # replaced by what is loaded
@pytest.mark.parametrize(
    "options",
    [[], ["--rank", "3"], ["--init", "random"], ["--regularization", "inf"], ["--bias", "all"]],
    ids=["paired", "odd rank", "random", "Gram-Schmidt", "biases"],
)
def test_stock_peft_finds_the_held_out_loss_of_a_language_model(tmp_path: Path, options: list[str]) -> None:
    base = save_base(tmp_path / "base", "llama-biases")
    last = train(base, sums(12), tmp_path, "--max-steps", "6", "--batch-size", "12", *options)
    model = stock(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    tokenizer = tokenizer_of(tmp_path / "out")
    losses: list[Tensor] = []
    for row in sums(12):
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["completion"] + " </s>"))
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += cross_entropy(scores, torch.tensor(answer), reduction="none")
    assert float(torch.stack(losses).mean()) == pytest.approx(float(last["eval_loss"]), rel=RTOL)


def test_stock_peft_finds_the_metrics_of_a_classifier(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = save_encoder(tmp_path / "base")
    rows = opinions(16)
    last = train(base, rows, tmp_path, "--epochs", "5", "--batch-size", "16", "--bias", "all", "--save-every", "1")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = stock(PeftModel.from_pretrained(model, tmp_path / "out"))
    batch = tokenizer_of(tmp_path / "out")([row["text"] for row in rows], return_tensors="pt", padding=True)
    truth = torch.tensor([("down", "up").index(row["label"]) for row in rows])
    with torch.no_grad():
        scores = model(**batch).logits
    assert float(cross_entropy(scores, truth)) == pytest.approx(float(last["eval_loss"]), rel=RTOL)
    assert float((scores.argmax(-1) == truth).float().mean()) == pytest.approx(float(last["eval_accuracy"]))


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
