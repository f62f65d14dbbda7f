"""Every option of a training run, once: the command line, `--config` and `train_config.toml` are made from this table.

Standard library only, so that `hra-export train --help` stays fast.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from hra_export.training.options import About, Option, is_pattern, make_table, parse_mapping

Task = Literal["auto", "causal-lm", "sequence-classification"]
ALL_LINEAR = "all-linear"
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)

# One degree a step at rank 8: with paired vectors as PEFT draws them, a step of Adam turns a vector by about
# lr·√(1.5 r) rad, whatever d is. Vectors drawn one by one are shorter by √2, so they turn by lr·√(3 r).
LEARNING_RATE_AT_RANK_8 = 5e-3
# How often a run speaks, evaluates and saves unless told: shares of the whole.
LOG_SHARE, EVALUATE_SHARE, SAVE_SHARE = 1 / 50, 1 / 10, 1 / 10
MAX_LOG_EVERY = 10

FILES, TASK, ADAPTER = "Input and output", "Task", "Adapter"
OPTIMIZER, WATCHING, MACHINE = "Optimization", "Watching", "Machine"


@dataclass(frozen=True)
class Settings:
    """One training run. Field names are option names with `_` for `-`.

    `from_mapping` checks what it is given; settings made by hand are checked by `check`.
    """

    base: Annotated[str, About("Model directory, Hub id or .gguf file.", FILES, may_change=True)]
    data: Annotated[
        str, About("Rows to train on: .jsonl, .json, .csv, .tsv, .parquet, or a Hub id.", FILES, may_change=True)
    ]
    output: Annotated[Path, About("Directory to write.", FILES, may_change=True)]
    eval_data: Annotated[str | None, About("Held-out rows, as --data.", FILES, may_change=True)] = None
    eval_split: Annotated[float, About("Share of the rows to hold out instead.", FILES, low=0, high=0.9)] = 0.0
    data_config: Annotated[str | None, About("Configuration of a Hub data set.", FILES, may_change=True)] = None
    data_split: Annotated[str, About("Split of a Hub data set to train on.", FILES, may_change=True)] = "train"
    eval_data_split: Annotated[str, About("Split of a Hub data set to evaluate on.", FILES, may_change=True)] = (
        "validation"
    )
    resume: Annotated[bool, About("Go on from the last complete checkpoint.", FILES, is_control=True)] = False
    overwrite: Annotated[
        bool, About("Replace an output of ours, or start an interrupted run over.", FILES, is_control=True)
    ] = False

    task: Annotated[Task, About("What to learn; auto tells it from the columns.", TASK)] = "auto"
    text_column: Annotated[str, About("Column of plain text.", TASK)] = "text"
    text_pair_column: Annotated[str | None, About("Column of a second text to classify with the first.", TASK)] = None
    label_column: Annotated[str, About("Column of labels.", TASK)] = "label"
    labels: Annotated[
        tuple[str, ...], About("Names of the classes, in order.", TASK, shown_default="the base's, or the data's")
    ] = ()
    max_length: Annotated[int, About("Tokens of a row; a longer one is cut at its end.", TASK, low=2)] = 1024
    packing: Annotated[bool, About("Put several rows into one of --max-length tokens.", TASK)] = False
    completion_only_loss: Annotated[bool, About("Learn the completion, not the prompt.", TASK)] = True
    assistant_only_loss: Annotated[bool, About("Of messages, learn only the assistant's.", TASK)] = False

    rank: Annotated[int, About("Reflection vectors of a chain.", ADAPTER, low=1)] = 8
    target_modules: Annotated[
        tuple[str, ...], About("Module names, one regular expression, or all-linear.", ADAPTER)
    ] = (ALL_LINEAR,)
    exclude_modules: Annotated[
        tuple[str, ...], About("Module names, or one regular expression, to leave out.", ADAPTER)
    ] = ()
    layers_to_transform: Annotated[
        tuple[int, ...], About("Numbers of the layers to adapt.", ADAPTER, shown_default="all", low=0)
    ] = ()
    bias: Annotated[Literal["none", "hra_only", "all"], About("Biases to train.", ADAPTER)] = "none"
    modules_to_save: Annotated[
        tuple[str, ...], About("Modules to train whole.", ADAPTER, shown_default="a new head")
    ] = ()
    init: Annotated[
        Literal["paired", "random"] | None,
        About("Start at the base (paired), or anywhere.", ADAPTER, shown_default="paired; random with inf below"),
    ] = None
    regularization: Annotated[
        float,
        About("Weight of the orthogonality penalty; inf is Gram-Schmidt.", ADAPTER, low=0, may_be_infinite=True),
    ] = 0.0
    regularization_form: Annotated[
        Literal["squared", "norm"], About("The penalty of the paper, or of its authors' code.", ADAPTER)
    ] = "squared"

    epochs: Annotated[float, About("Passes over the rows.", OPTIMIZER, low=0.001)] = 1.0
    max_steps: Annotated[int | None, About("Optimizer steps.", OPTIMIZER, low=1, shown_default="from --epochs")] = None
    batch_size: Annotated[int, About("Rows that a device takes at once.", OPTIMIZER, low=1)] = 8
    gradient_accumulation: Annotated[int, About("Batches of a step.", OPTIMIZER, low=1)] = 1
    learning_rate: Annotated[
        float | None,
        About(
            "Of Adam. At the default, a step turns each vector by about 1 degree.",
            OPTIMIZER,
            low=0,
            shown_default="0.005 * sqrt(8 / rank), divided by sqrt(2) with --init random",
        ),
    ] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "constant_with_warmup"],
        About("How the learning rate falls.", OPTIMIZER),
    ] = "cosine"
    warmup: Annotated[float, About("Share of the steps; from 1 on, their number.", OPTIMIZER, low=0)] = 0.05
    weight_decay: Annotated[float, About("Of saved modules; never of reflection vectors.", OPTIMIZER, low=0)] = 0.0
    max_grad_norm: Annotated[float, About("Clip gradients to this norm; 0 does not.", OPTIMIZER, low=0)] = 1.0
    adam_beta1: Annotated[float, About("Memory of the gradient's mean.", OPTIMIZER, low=0, high=0.99999)] = 0.9
    adam_beta2: Annotated[float, About("Memory of its square.", OPTIMIZER, low=0, high=0.999999)] = 0.999
    adam_epsilon: Annotated[float, About("Added to the root of the square.", OPTIMIZER, low=0)] = 1e-8
    seed: Annotated[int, About("Of vectors, order and split.", OPTIMIZER, low=0, high=2**32 - 1)] = 0

    log_every: Annotated[
        int | None,
        About(
            "Steps between rows of history.csv.",
            WATCHING,
            low=1,
            shown_default="a fiftieth of the run, at most 10",
            may_change=True,
        ),
    ] = None
    eval_every: Annotated[
        int | None, About("Steps between evaluations.", WATCHING, low=1, shown_default="a tenth of the run")
    ] = None
    save_every: Annotated[
        int | None,
        About("Steps between checkpoints.", WATCHING, low=1, shown_default="a tenth of the run", may_change=True),
    ] = None
    save_limit: Annotated[int, About("Checkpoints to keep beside the best.", WATCHING, low=1, may_change=True)] = 2
    metric: Annotated[
        Literal["loss", "accuracy", "f1", "matthews"], About("What tells the best checkpoint.", WATCHING)
    ] = "loss"
    early_stopping: Annotated[
        int | None,
        About("Stop after so many evaluations without a better one.", WATCHING, low=1, shown_default="never"),
    ] = None
    report_to: Annotated[
        tuple[str, ...], About("Trackers that transformers knows, such as wandb.", WATCHING, may_change=True)
    ] = ()
    run_name: Annotated[str | None, About("Name of the run in a tracker.", WATCHING, may_change=True)] = None

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], About("Of the base in memory; auto is its own.", MACHINE)
    ] = "auto"
    bf16: Annotated[bool, About("Compute in bfloat16 where that is safe (autocast).", MACHINE)] = False
    quantize: Annotated[Literal["none", "8bit", "4bit"], About("Quantize the base (bitsandbytes).", MACHINE)] = "none"
    gradient_checkpointing: Annotated[bool, About("Compute activations twice to save memory.", MACHINE)] = False
    compile: Annotated[bool, About("Compile the model (torch.compile).", MACHINE)] = False
    device: Annotated[str, About("auto (a GPU if there is one), cpu, cuda or cuda:N.", MACHINE, may_change=True)] = (
        "auto"
    )
    trust_remote_code: Annotated[bool, About("Run Python code that comes with the base.", MACHINE, may_change=True)] = (
        False
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        """Make settings from option names and values, as a TOML file or the command line has them.

        Raises:
            ValueError: unknown, missing, wrong or contradictory options; a line for each.
        """
        settings = cls(**parse_mapping(OPTIONS, values))
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ValueError: a line for each contradiction.
        """
        findings = [*self._wrong_words(), *self._contradictions()]
        if findings:
            raise ValueError("\n".join(findings))

    def _wrong_words(self) -> Iterator[str]:
        if DEVICE.fullmatch(self.device) is None:
            yield f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}"
        for name in ("target-modules", "exclude-modules"):
            words = getattr(self, OPTIONS[name].attribute)
            if len(words) > 1 and any(is_pattern(word) or word == ALL_LINEAR for word in words):
                yield f"{name}: expected names, one regular expression or {ALL_LINEAR}, got {', '.join(words)}"
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            yield "labels: expected two or more different names"

    def _contradictions(self) -> Iterator[str]:
        if self.eval_data and self.eval_split:
            yield "eval-split: not with eval-data, which are the held-out rows"
        if not (self.eval_data or self.eval_split):
            if self.early_stopping:
                yield "early-stopping: needs held-out rows, from eval-data or eval-split"
            if self.metric != "loss":
                yield f"metric: {self.metric} needs held-out rows, from eval-data or eval-split"
        if self.task == "causal-lm" and self.metric != "loss":
            yield f"metric: {self.metric} is for sequence-classification"
        if self.task == "sequence-classification" and (self.packing or self.assistant_only_loss):
            yield "packing, assistant-only-loss: for causal-lm"
        if self.is_gram_schmidt and self.init == "paired":
            yield (
                "init: paired vectors are equal two by two, and Gram-Schmidt would normalize the rounding noise between"
                " them; regularization inf needs random"
            )
        if self.bf16 and self.dtype == "float16":
            yield "bf16: not with dtype float16"
        if self.layers_to_transform and any(is_pattern(word) for word in self.target_modules):
            yield "layers-to-transform: not with a regular expression, which can name the layers itself"

    @property
    def is_gram_schmidt(self) -> bool:
        """Whether the vectors are kept orthogonal (λ = ∞)."""
        return math.isinf(self.regularization)

    @property
    def has_held_out(self) -> bool:
        """Whether some rows are evaluated on."""
        return bool(self.eval_data or self.eval_split)

    @property
    def chosen_init(self) -> Literal["paired", "random"]:
        """How the vectors start, with the default worked out."""
        return self.init or ("random" if self.is_gram_schmidt else "paired")

    @property
    def chosen_learning_rate(self) -> float:
        """The learning rate, with the default worked out."""
        if self.learning_rate is not None:
            return self.learning_rate
        return default_learning_rate(self.rank, self.chosen_init)

    def resolved(self, *, task: Task, labels: tuple[str, ...], total_steps: int) -> Self:
        """The same run with every default that depends on something worked out."""
        return replace(
            self,
            task=task,
            labels=labels,
            init=self.chosen_init,
            learning_rate=self.chosen_learning_rate,
            log_every=self.log_every or max(1, min(MAX_LOG_EVERY, round(total_steps * LOG_SHARE))),
            eval_every=self.eval_every or max(1, round(total_steps * EVALUATE_SHARE)),
            save_every=self.save_every or max(1, round(total_steps * SAVE_SHARE)),
        )

    def to_mapping(self) -> dict[str, object]:
        """Option names and values, as a TOML file has them; what is unset and what only steers a call is left out."""
        values = {option: getattr(self, option.attribute) for option in OPTIONS.values()}
        return {
            option.name: option.plain(value)
            for option, value in values.items()
            if not option.about.is_control and value not in (None, ())
        }

    def trajectory(self) -> dict[str, object]:
        """The part of `to_mapping` that decides which adapter comes out; data and base are told by their digests."""
        return {name: value for name, value in self.to_mapping().items() if not OPTIONS[name].about.may_change}


OPTIONS: Mapping[str, Option] = make_table(Settings)


def default_learning_rate(rank: int, init: Literal["paired", "random"]) -> float:
    """The learning rate that turns each reflection vector by about one degree a step."""
    rate = LEARNING_RATE_AT_RANK_8 * math.sqrt(8 / rank)
    return rate if init == "paired" else rate / math.sqrt(2)


def read_toml(path: Path) -> dict[str, object]:
    """Option names and values of a `--config` file, unchecked.

    Raises:
        ValueError: it is no TOML file.
        OSError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not a TOML file: {error}") from error
