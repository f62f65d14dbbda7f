"""Compressing a trained adapter: how far answers and probabilities move, by rank and by what is kept.

    python -m benchmarks.compress                       SmolLM2; trains an adapter of rank 32 first, in a few minutes
    python -m benchmarks.compress --adapter DIR         one that is there
    python -m benchmarks.compress --ranks 4 --rows 8    in a minute

Against the adapter as trained, on held-out rows: the Kullback-Leibler divergence of the next token, over the tokens of
the right answer, and how many greedy answers are right. The contenders, at K reflections or a LoRA of rank K:

    first columns       U[:, :K]
    angles              `hra-export compress --rank K`
    weights             … with --base
    outputs, dropped    … with --calibration, the planes that are kept as they are
    outputs             … with --calibration, refined: what the command does
    LoRA, weights       the best rank K of ΔW (SVD): no rotation, and K (d + o) numbers for each target, not K d
    LoRA, outputs       the best rank K of ΔW x on the calibration rows, likewise

Limits: one adapter, one task, one seed, and a task that is easy once it is learned.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import report, say, work_folder
from hra_export.adapter import HraAdapter, read_adapter
from hra_export.attachment import attach
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.compression.calibration import Calibration, calibrate
from hra_export.compression.plan import CompressionPlan, plan_compression
from hra_export.householder import balanced
from hra_export.rotation import padded

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "compress.png"
TRAINING = ("--rank", "32", "--epochs", "1", "--batch-size", "8", "--warmup", "6", "--adam-beta2", "0.99")
RATE = ("--learning-rate", "0.0025", "--seed", "0")
MAX_NEW_TOKENS = 40
ROWS_PER_BATCH = 16
COLORS = ("#777777", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7")  # Okabe and Ito's


@dataclass(frozen=True)
class Score:
    """A candidate beside the adapter as trained.

    Attributes:
        divergence: KL in nats, mean over the tokens of the right answers.
        agreement: share of those tokens whose likeliest next one is the same.
        right: share of the rows whose greedy answer is the row's own.
    """

    divergence: float
    agreement: float
    right: float


@dataclass(frozen=True)
class Bench:
    """A model with everything that scores it."""

    model: Any
    tokenizer: Any
    rows: Sequence[dict[str, str]]

    @torch.inference_mode()
    def log_probabilities(self) -> Tensor:
        """(tokens, vocabulary) of the right answers, given the prompt and what of the answer came before."""
        found = []
        for row in self.rows:
            prompt, answer = (list(self.tokenizer(row[key])["input_ids"]) for key in ("prompt", "completion"))
            logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1))
        return torch.cat(found)

    @torch.inference_mode()
    def right(self) -> float:
        """The share of greedy answers that are the row's own."""
        count = 0
        for first in range(0, len(self.rows), ROWS_PER_BATCH):
            batch = self.rows[first : first + ROWS_PER_BATCH]
            prompts = [row["prompt"] for row in batch]
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            options = {
                "do_sample": False,
                "max_new_tokens": MAX_NEW_TOKENS,
                "pad_token_id": self.tokenizer.pad_token_id,
            }
            tokens = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            count += sum(text.strip() == row["completion"].strip() for text, row in zip(texts, batch, strict=True))
        return count / len(self.rows)

    def score(self, reference: Tensor) -> Score:
        """The model as it stands."""
        found = self.log_probabilities()
        divergence = (reference.exp() * (reference - found)).sum(-1).mean()
        agreement = (reference.argmax(-1) == found.argmax(-1)).double().mean()
        return Score(float(divergence), float(agreement), self.right())


@dataclass(frozen=True)
class Source:
    """What is compressed, and what with."""

    adapter: HraAdapter
    base: Checkpoint
    calibration: Calibration

    def plan(self, by: str, rank: int, *, refine: bool = True) -> CompressionPlan:
        """A compression by `angles`, `weights` or `outputs`."""
        base = None if by == "angles" else self.base
        calibration = self.calibration if by == "outputs" else None
        return plan_compression(self.adapter, rank=rank, base=base, calibration=calibration, refine=refine)

    def chains(self, by: str, *, refine: bool = True) -> Callable[[int], HraAdapter]:
        """What a compression keeps, as it would be stored."""

        def made(rank: int) -> HraAdapter:
            plan = self.plan(by, rank, refine=refine)
            kept = {target.module: padded(target.vectors(), plan.rank).float() for target in plan.kept}
            return HraAdapter(kept, plan.rank)

        return made

    def first_columns(self, rank: int) -> HraAdapter:
        """Simple truncation."""
        return HraAdapter({module: vectors[:, :rank] for module, vectors in self.adapter.chains.items()}, rank)

    def low_rank(self, by: str) -> Callable[[int], dict[str, Tensor]]:
        """The best ΔW (o, d) of a rank, for every target."""
        plan = self.plan(by, self.adapter.rank)

        def made(rank: int) -> dict[str, Tensor]:
            found = {}
            for target in plan.targets:
                rotation, measure = target.parts.rotation, target.measures["weights" if by == "weights" else "outputs"]
                assert target.weight is not None
                left, right = target.weight.times(rotation.basis) @ rotation.core(), rotation.basis.T
                if measure.inputs is None:
                    b, a = balanced(left, right)
                    found[target.module] = b[:, :rank] @ a[:rank]
                else:  # the best rank of ΔW Nᵀ, and N taken away again
                    b, a = balanced(left, measure.inputs.T)
                    inside = torch.linalg.lstsq(measure.inputs, a[:rank].T, driver="gelsd").solution.T
                    found[target.module] = b[:, :rank] @ inside @ right
            return found

        return made


def contenders(source: Source) -> dict[str, Callable[[int], Any]]:
    """Name → what makes a candidate of a rank: an adapter, or ΔW by module."""
    return {
        "first columns": source.first_columns,
        "angles": source.chains("angles"),
        "weights": source.chains("weights"),
        "outputs, dropped": source.chains("outputs", refine=False),
        "outputs": source.chains("outputs"),
        "LoRA, weights": source.low_rank("weights"),
        "LoRA, outputs": source.low_rank("outputs"),
    }


@contextmanager
def applied(model: nn.Module, candidate: Any) -> Iterator[None]:
    """The candidate at work, inside the block."""
    if isinstance(candidate, HraAdapter):
        attachment = attach(model, candidate)
        yield
        attachment.detach()
        return
    weights = {module: model.get_parameter(f"{module}.weight") for module in candidate}
    before = {module: weight.detach().clone() for module, weight in weights.items()}
    for module, weight in weights.items():
        weight.data += candidate[module].float()
    yield
    for module, weight in weights.items():
        weight.data.copy_(before[module])


def measure(source: Source, bench: Bench, ranks: Sequence[int]) -> tuple[dict[str, Score], dict[str, dict[int, Score]]]:
    """Scores of the base and of the adapter as trained; then name → rank → score."""
    with applied(bench.model, source.adapter):
        reference = bench.log_probabilities()
        trained = Score(0.0, 1.0, bench.right())
    whole = {"base": bench.score(reference), "as trained": trained}
    say(f"base {whole['base']}\nas trained {trained}")
    scores: dict[str, dict[int, Score]] = {}
    for name, make in contenders(source).items():
        for rank in ranks:
            with applied(bench.model, make(rank)):
                scores.setdefault(name, {})[rank] = bench.score(reference)
            say(f"{name}, {rank}: {scores[name][rank]}")
    return whole, scores


def draw(whole: dict[str, Score], scores: dict[str, dict[int, Score]], path: Path) -> None:
    """Divergence and right answers by rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, by_rank), color in zip(scores.items(), COLORS, strict=True):
        style = {"color": color, "label": name, "linestyle": "--" if name.startswith("LoRA") else "-", "marker": "o"}
        ranks = [rank for rank in by_rank if by_rank[rank].divergence > 0]
        left.plot(ranks, [by_rank[rank].divergence for rank in ranks], markersize=4, **style)
        right.plot(list(by_rank), [100 * score.right for score in by_rank.values()], markersize=4, **style)
    left.set(xscale="log", yscale="log", xlabel="rank kept", ylabel="KL to the adapter as trained, nats a token")
    right.set(xscale="log", xlabel="rank kept", ylabel="right answers, %")
    right.axhline(100 * whole["as trained"].right, color="black", linewidth=0.8, linestyle=":")
    ticks = sorted({rank for by_rank in scores.values() for rank in by_rank})
    for axes in (left, right):
        axes.set_xticks(ticks, [str(rank) for rank in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = parse(arguments)
    with work_folder(options.work) as folder:
        base = open_checkpoint(options.base or smollm2(folder / "base"))
        adapter = read_adapter(options.adapter or trained(base.root, folder / "adapter"))
        source = Source(adapter, base, calibrate(base, adapter, options.calibration))
        bench = load(base, adapter, options.heldout, options.rows)
        whole, scores = measure(source, bench, options.ranks)
    header = ["kept", "rank", "KL, nats a token", "same next token %", "right answers %"]
    rows = [[name, "-", *cells(score)] for name, score in whole.items()]
    rows += [[name, str(rank), *cells(score)] for name, by_rank in scores.items() for rank, score in by_rank.items()]
    data = {name: {rank: vars(score) for rank, score in by_rank.items()} for name, by_rank in scores.items()}
    facts = {"rank": adapter.rank, "targets": len(adapter.chains), "rows": len(bench.rows)}
    report(
        "compress",
        header,
        rows,
        {"whole": {name: vars(score) for name, score in whole.items()}, "scores": data} | facts,
    )
    draw(whole, scores, options.picture)


def cells(score: Score) -> list[str]:
    """A score as text."""
    return [f"{score.divergence:.2g}", f"{100 * score.agreement:.1f}", f"{100 * score.right:.0f}"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model directory; left out, SmolLM2 is fetched")
    parser.add_argument("--adapter", type=Path, help="HRA adapter; left out, one of rank 32 is trained")
    parser.add_argument("--calibration", type=Path, default=EXAMPLES / "train.jsonl")
    parser.add_argument("--heldout", type=Path, default=EXAMPLES / "heldout.jsonl")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 24, 32])
    parser.add_argument("--rows", type=int, default=32, help="how many held-out rows are scored")
    parser.add_argument("--work", type=Path, help="where base and adapter are kept; left out, they are deleted")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    return parser.parse_args(arguments)


def load(base: Checkpoint, adapter: HraAdapter, heldout: Path, count: int) -> Bench:
    """The base in float32, and the first held-out rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()][:count]
    model = AutoModelForCausalLM.from_pretrained(base.root, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base.root)
    return Bench(model, tokenizer, rows)


def smollm2(folder: Path) -> Path:
    """SmolLM2 as a float32 directory."""
    from hra_export.registry import load_converter
    from tests.real_models import smollm2_gguf

    if not folder.exists():
        load_converter("from_gguf").convert(smollm2_gguf(), folder)
    return folder


def trained(base: Path, folder: Path) -> Path:
    """An adapter of rank 32 on the example rows, as `examples/demo.py` trains one of rank 8."""
    from hra_export import cli

    if not folder.exists():
        data = ("--data", str(EXAMPLES / "train.jsonl"), "--output", str(folder))
        try:
            cli.main(["train", "--base", str(base), *data, *TRAINING, *RATE])
        except SystemExit as end:
            if end.code:
                raise
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
