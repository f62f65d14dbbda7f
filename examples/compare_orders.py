"""Adapt SmolLM2-135M to the demo's orders: HRA, LoRA at equal trainable parameters, full fine-tuning.

The model learns to turn an order in English into five fields; an answer counts when all five are right. Each method
searches its learning rate on 32 of the training rows, which it does not train on, then trains with every seed and
answers the 64 held-out rows.

Limits: made-up data; 64 rows, so that one row is 1.6 %; the search minimizes the loss, not the number of wrong answers.

Example: python examples/compare_orders.py --seeds 3 --output build/orders
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from comparison import (
    Result,
    Run,
    Score,
    compare,
    draw,
    keep,
    kept,
    parse_options,
    peak_bytes,
    table,
    write_results,
)
from demo import DATA, evaluate, fastest_dtype, fetch_base, read_rows, run_script, say
from methods import adapt, count_trainable, fit, linear_names
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
from transformers.utils import logging as transformers_logging

TARGETS = r"\.layers\."  # every linear layer but the head, whose weights are the embedding's
GRIDS = {"hra": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4)}
STEPS = 80
ROWS_PER_STEP = 8
DEV_EVERY = 20  # one training row of so many is for development
NO_LABEL = -100
SCORES = (Score("exact", "all fields right"), Score("fields", "single fields"))

Row = dict[str, list[int]]


def main() -> int:
    """Run the comparison, or one run of it."""
    options = parse_options(__doc__, Path("build/orders"), STEPS, ROWS_PER_STEP)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    base, _ = fetch_base(options.cache / "demo")
    train, dev, test = read_parts()
    if options.run:
        keep(train_and_test(Run(**options.run), base, (train, dev, test)), options.output)
        return 0
    first = Run("", 0, 0, options.steps, options.rows_per_step, 0, fastest_dtype() is torch.bfloat16)
    arguments = ["--cache", str(options.cache)]
    outcomes = compare(GRIDS, first, options.seeds, lambda run: kept(Path(__file__), options.output, arguments, run))
    rows = {"train": len(train), "dev": len(dev), "test": len(test)}
    write_results(outcomes, options.output / "results.json", rows=rows, grids=GRIDS)
    title = "SmolLM2-135M on orders; the band and the dots are seeds"
    curve = Score("loss", "development loss", is_share=False)
    draw(outcomes, options.output / "orders.png", curve=curve, test=SCORES[0], title=title)
    print(table(outcomes, SCORES))
    say(f"\n{options.output / 'results.json'}\n{options.output / 'orders.png'}")
    return 0


def read_parts() -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on, to choose by, and to test with."""
    rows = read_rows(DATA / "train.jsonl")
    train = [row for i, row in enumerate(rows) if i % DEV_EVERY]
    return train, rows[::DEV_EVERY], read_rows(DATA / "heldout.jsonl")


def train_and_test(run: Run, base: Path, parts: tuple[Sequence[dict[str, str]], ...]) -> Result:
    """One run: load, adapt, train, merge, answer the held-out rows in float32."""
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = adapt(model, run.method, linear_names(model, TARGETS))
    trainable, head = count_trainable(model)
    rows = tuple([encode(tokenizer, row) for row in part] for part in parts[:2])
    trainer, watch = fit(
        model, run, rows=(rows[0], rows[1]), collate=padder(tokenizer.pad_token_id), trainer_type=AnswerTrainer
    )
    trained = trainer.model
    plain = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    answers = evaluate(plain.eval(), tokenizer, parts[2], f"{run.method} answers")
    return Result(
        run=run,
        trainable=trainable,
        head=head,
        seconds=watch.seconds,
        peak_bytes=peak_bytes(),
        curve=tuple((step, found["eval_loss"]) for step, found in watch.evaluations),
        dev_loss=watch.evaluations[-1][1]["eval_loss"],
        test={"exact": answers.exact / len(parts[2]), "fields": answers.fields},
    )


class AnswerTrainer(Trainer):  # type: ignore[misc]  # transformers is Any to mypy
    """A trainer that scores the vocabulary only where an answer is learned: half of a step would be the prompts'."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the answers' tokens."""
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        labels = inputs["labels"][:, 1:]
        is_answer = labels != NO_LABEL
        # accelerate puts autocast around the model's own forward, which is not called here
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            hidden = whole.model(input_ids=inputs["input_ids"][:, :-1], use_cache=False).last_hidden_state
            scores = whole.lm_head(hidden[is_answer])
        loss = nn.functional.cross_entropy(scores.float(), labels[is_answer])
        return (loss, {}) if return_outputs else loss


def encode(tokenizer: Any, row: dict[str, str]) -> Row:
    """Tokens of prompt and completion; labels are the completion's and the end's."""
    prompt = tokenizer(row["prompt"]).input_ids
    completion = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [NO_LABEL] * len(prompt) + completion}


def padder(padding: int) -> Callable[[list[Row]], dict[str, Tensor]]:
    """Makes batches of rows, padded on the right, where causal attention ignores it."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        columns = {"input_ids": padding, "labels": NO_LABEL}
        return {
            name: nn.utils.rnn.pad_sequence(
                [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
            )
            for name, value in columns.items()
        }

    return collate


if __name__ == "__main__":
    run_script(main)
