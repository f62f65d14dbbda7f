"""`hra-export train` on causal language models: what is learned, what is written, what is said."""

import csv
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.householder import compact_wy, dense
from tests.command_line import ENVIRONMENT, Outcome, run
from tests.test_from_gguf import write_gguf
from tests.train_scene import chats, save_base, sums, tree, write_jsonl

ROWS = 40
FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "history.csv"),
    *("hra_export_manifest.json", "loss.png", "tokenizer.json", "tokenizer_config.json", "train_config.toml"),
}
PNG = b"\x89PNG\r\n\x1a\n"
# One float32 rounding of a sum, 2⁻²⁴, grown by the thousands of additions of a pass through a tiny model.
RTOL = 1e-4
# With this ε in Adam's denominator, far above the tiny models' gradients' roots, a step is nearly lr·g/ε: rounding of
# the gradient moves a vector in proportion, instead of flipping the sign of a step of full size where g is near zero.
STEADY = ["--adam-epsilon", "0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and rows for it."""
    folder = tmp_path_factory.mktemp("causal")
    save_base(folder / "base")
    write_jsonl(folder / "sums.jsonl", sums(ROWS))
    write_jsonl(folder / "chats.jsonl", chats(ROWS))
    write_jsonl(folder / "texts.jsonl", [{"text": row["prompt"] + row["completion"]} for row in sums(ROWS)])
    return folder


def train(folder: Path, output: Path, *more: str | int | float | Path, data: str = "sums.jsonl") -> Outcome:
    outcome = run(*("train", "--base", folder / "base", "--data", folder / data, "--output", output), *map(str, more))
    assert outcome.code == 0, outcome.stderr
    return outcome


def history(output: Path) -> list[dict[str, str]]:
    with (output / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def movement(one: HraAdapter, other: HraAdapter) -> float:
    """‖U − U'‖ over all chains."""
    parts = [(one.chains[name] - other.chains[name]).square().sum() for name in one.chains]
    return float(torch.stack(parts).sum().sqrt())


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, Outcome]:
    """A run with everything that is usual: held-out rows, several evaluations and checkpoints."""
    output = folder / "trained"
    return output, train(folder, output, "--rank", 4, "--epochs", 8, "--eval-split", 0.2, "--json")


def test_run_learns(trained: tuple[Path, Outcome]) -> None:
    rows = history(trained[0])
    held_out = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert held_out[-1] < 0.6 * held_out[0]


def test_run_writes_exactly_these_files(trained: tuple[Path, Outcome]) -> None:
    assert {path.name for path in trained[0].iterdir()} == FILES


def test_run_leaves_nothing_beside_its_output(trained: tuple[Path, Outcome]) -> None:
    assert [path.name for path in trained[0].parent.iterdir() if path.name.startswith(".")] == []


def test_adapter_holds_a_moved_chain_for_every_linear_layer_of_every_block(trained: tuple[Path, Outcome]) -> None:
    adapter = read_adapter(trained[0])
    assert len(adapter.chains) == 2 * 7
    assert all(vectors.dtype == torch.float32 for vectors in adapter.chains.values())
    for vectors in adapter.chains.values():
        rotation = dense(compact_wy(vectors))
        assert torch.linalg.matrix_norm(rotation - torch.eye(len(vectors), dtype=torch.float64)) > 0.01


def test_adapter_leads_back_to_its_base_from_any_directory(
    trained: tuple[Path, Outcome], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config = json.loads((trained[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert config["task_type"] == "CAUSAL_LM"
    monkeypatch.chdir(tmp_path)
    outcome = run("merge", trained[0], "--output", tmp_path / "merged", "-q")
    assert outcome.code == 0, outcome.stderr
    outcome = run("validate", trained[0], "--candidate", tmp_path / "merged", "-q")
    assert outcome.code == 0, outcome.stdout + outcome.stderr


def test_gguf_base_is_remembered_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = write_gguf(tmp_path / "tiny.gguf")
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b c"}] * 4)
    outcome = run(
        *("train", "--base", base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"),
        *("--max-steps", "1", "--rank", "2"),
    )
    assert outcome.code == 0, outcome.stderr
    assert read_adapter(tmp_path / "out").base == str(base)
    outcome = run("merge", tmp_path / "out", "--output", tmp_path / "merged")
    assert outcome.code == 0, outcome.stderr


def test_history_has_a_row_a_step_with_loss_rate_and_angle(trained: tuple[Path, Outcome]) -> None:
    rows = history(trained[0])
    assert [int(row["step"]) for row in rows] == list(range(1, 33))
    assert list(rows[0])[:7] == ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "angle_degrees"]
    angles, rates = ([float(row[key]) for row in rows] for key in ("angle_degrees", "learning_rate"))
    assert angles[0] == rates[0] == 0  # the warm-up begins at zero
    assert 0.4 < max(angles) < 1.6  # the default aims at a degree
    assert angles[-1] < 0.2 * max(angles)


def test_picture_is_a_picture(trained: tuple[Path, Outcome]) -> None:
    picture = (trained[0] / "loss.png").read_bytes()
    assert picture.startswith(PNG)
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert width > 600
    assert height > 300


def test_report_is_one_object_with_the_figures_of_the_files(trained: tuple[Path, Outcome]) -> None:
    output, outcome = trained
    report = outcome.json
    manifest = json.loads((output / "hra_export_manifest.json").read_text())
    assert report["adapter_digest"] == manifest["adapter"]["digest"] == read_adapter(output).digest
    assert report["trainable_parameters"] == sum(u.numel() for u in read_adapter(output).chains.values())
    assert report["steps"] == report["steps_taken"] == 32
    assert (report["rows"], report["held_out"], report["learned"]) == (32, 8, 64)
    assert report["figures"]["eval_loss"] == float(history(output)[report["step"] - 1]["eval_loss"])
    assert report["peak_bytes"] > 50e6
    assert report["seconds"] > 0


def test_card_says_what_it_is(trained: tuple[Path, Outcome]) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(trained[0] / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a path on this machine says nothing to others
    assert "hra" in card.data.tags
    assert "14 of rank 4" in card.text


def test_written_configuration_repeats_the_run(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    config = tomllib.loads((trained[0] / "train_config.toml").read_text())
    assert (config["task"], config["rank"], config["learning-rate"]) == ("causal-lm", 4, pytest.approx(0.005 * 2**0.5))
    outcome = run("train", "--config", trained[0] / "train_config.toml", "--output", tmp_path / "again")
    assert outcome.code == 0, outcome.stderr
    assert weights(tmp_path / "again") == weights(trained[0])
    assert history(tmp_path / "again") == history(trained[0])


def test_another_seed_gives_another_adapter(folder: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        train(folder, tmp_path / name, "--max-steps", 2, "--seed", seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    left = {name: content for name, content in tree(tmp_path / "a").items() if name not in NAMED_AFTER_OUTPUT}
    right = {name: content for name, content in tree(tmp_path / "b").items() if name not in NAMED_AFTER_OUTPUT}
    assert left == right


# These name the output, or a digest of what does.
NAMED_AFTER_OUTPUT = {"README.md", "loss.png", "train_config.toml"}


def test_overwrite_replaces_an_adapter_of_ours(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out", "--max-steps", 1)
    before = weights(tmp_path / "out")
    train(folder, tmp_path / "out", "--max-steps", 3, "--overwrite")
    assert weights(tmp_path / "out") != before


# What is learned


def sample(outcome: Outcome) -> list[tuple[str, bool]]:
    return [(part["text"], part["is_learned"]) for part in outcome.json["sample"]]


PROMPT, ANSWER = "zero plus zero is", " zero </s>"


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        ("sums.jsonl", [], [(PROMPT, False), (ANSWER, True)]),
        ("sums.jsonl", ["--no-completion-only-loss"], [("zero", False), (f" plus zero is{ANSWER}", True)]),
        ("texts.jsonl", [], [("zero", False), (f" plus zero is{ANSWER}", True)]),
        ("chats.jsonl", [], [("<user>", False), (f" {PROMPT} <assistant>{ANSWER}", True)]),
        ("chats.jsonl", ["--assistant-only-loss"], [(f"<user> {PROMPT} <assistant>", False), (ANSWER, True)]),
    ],
)
def test_sample_shows_what_is_learned(
    folder: Path, tmp_path: Path, data: str, options: list[str], expected: list[tuple[str, bool]]
) -> None:
    outcome = train(folder, tmp_path / "out", *options, "--dry-run", "--json", data=data)
    assert sample(outcome) == expected
    learned = sum(len(text.split()) for text, is_learned in expected if is_learned)
    assert outcome.json["learned"] == ROWS * learned
    marked = "".join(text if is_learned else f"[[{text}]]" for text, is_learned in expected)
    assert marked in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("data", "options"), [("sums.jsonl", []), ("chats.jsonl", ["--assistant-only-loss"])])
def test_only_what_is_learned_moves_the_loss(folder: Path, tmp_path: Path, data: str, options: list[str]) -> None:
    """The first loss, before any step, is the base's own on exactly the tokens that are marked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(folder, tmp_path / "out", *options, "--max-steps", 1, "--batch-size", ROWS, data=data)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    total, count = 0.0, 0
    for row in sums(ROWS):
        before = f"<user> {row['prompt']} <assistant>" if data == "chats.jsonl" else row["prompt"]
        prompt, answer = (tokenizer(text)["input_ids"] for text in (before, row["completion"] + " </s>"))
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(scores, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert float(history(tmp_path / "out")[0]["loss"]) == pytest.approx(total / count, rel=RTOL)


def test_packed_rows_do_not_see_each_other(folder: Path, tmp_path: Path) -> None:
    """The same loss as unpacked: a row that saw its neighbour would be guessed differently."""
    same = ["--max-steps", "1", "--batch-size", str(ROWS)]
    plain = train(folder, tmp_path / "plain", *same, "--json")
    packed = train(folder, tmp_path / "packed", *same, "--packing", "--max-length", 30, "--json")
    assert packed.json["sequences"] < plain.json["sequences"] == ROWS
    assert packed.json["learned"] == plain.json["learned"]
    first, second = (float(history(tmp_path / name)[0]["loss"]) for name in ("plain", "packed"))
    assert second == pytest.approx(first, rel=RTOL)


def test_rows_cut_before_what_is_learned_are_left_out_aloud(folder: Path, tmp_path: Path) -> None:
    long = [{"prompt": "one plus " * 20, "completion": " two"}, *sums(4)]
    write_jsonl(tmp_path / "rows.jsonl", long)
    outcome = run(
        *("train", "--base", folder / "base", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"),
        *("--max-length", "16", "--dry-run", "--json"),
    )
    assert (outcome.json["rows"], outcome.json["sequences"]) == (5, 4)
    assert "note: 1 rows are left out: --max-length cuts them" in outcome.stderr


# How it is learned


def test_batches_of_a_step_add_up(folder: Path, tmp_path: Path) -> None:
    """Rows of one batch, or of four: the same gradient, so the same adapter up to rounding."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": " two" * (1 + i % 7)} for i in range(16)])
    adapters = []
    for name, options in {"start": [8, 1, 0], "one": [8, 1, 3], "four": [2, 4, 3]}.items():
        rate = ["--learning-rate", "0"] if options[2] == 0 else ["--learning-rate", "0.05"]
        outcome = run(
            *("train", "--base", folder / "base", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / name),
            *("--batch-size", str(options[0]), "--gradient-accumulation", str(options[1]), "--max-steps", "3"),
            *("--warmup", "0", "--regularization", "0.01", "--init", "random", *STEADY, *rate),
        )
        assert outcome.code == 0, outcome.stderr
        adapters.append(read_adapter(tmp_path / name))
    start, one, four = adapters
    moved = movement(start, one)
    assert moved > 0.01
    assert movement(one, four) < 1e-3 * moved  # float32 sums in another order: a few units of 2⁻²⁴ of larger gradients


def test_penalty_is_weighted_logged_and_not_part_of_the_loss(folder: Path, tmp_path: Path) -> None:
    options = ["--learning-rate", "0", "--max-steps", "1", "--init", "random", "--rank", "4"]
    train(folder, tmp_path / "free", *options)
    train(folder, tmp_path / "bound", *options, "--regularization", "0.25", "--gradient-accumulation", "2")
    train(folder, tmp_path / "norm", *options, "--regularization", "0.25", "--regularization-form", "norm")
    adapter = read_adapter(tmp_path / "bound")  # nothing has moved at a rate of zero
    offs = [off_orthogonal(vectors) for vectors in adapter.chains.values()]
    squared, norm = (0.25 * sum(float(off.norm() ** power) for off in offs) for power in (2, 1))
    assert float(history(tmp_path / "bound")[0]["penalty"]) == pytest.approx(squared, rel=1e-5)
    assert float(history(tmp_path / "norm")[0]["penalty"]) == pytest.approx(norm, rel=1e-5)
    free, again = (float(history(tmp_path / name)[0]["loss"]) for name in ("free", "norm"))
    assert again == pytest.approx(free, rel=RTOL)
    assert "penalty" not in history(tmp_path / "free")[0]


def off_orthogonal(vectors: Tensor) -> Tensor:
    units = vectors.double() / vectors.double().norm(dim=0)
    return torch.eye(vectors.shape[1], dtype=torch.float64) - units.T @ units


def test_penalty_pulls_the_vectors_apart(folder: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "15", "--init", "random", "--rank", "4"]
    train(folder, tmp_path / "free", *options)
    train(folder, tmp_path / "bound", *options, "--regularization", "10")

    def distance(name: str) -> float:
        return sum(float(off_orthogonal(u).norm()) for u in read_adapter(tmp_path / name).chains.values())

    assert distance("bound") < 0.5 * distance("free")


def test_infinite_regularization_trains_the_gram_schmidt_form(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out", "--max-steps", 2, "--regularization", "inf")
    adapter = read_adapter(tmp_path / "out")
    assert adapter.orthogonalize
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_weights"] is False
    for module in adapter.chains:
        adapter.reflector(module)  # no pivot breaks down


def test_weight_decay_leaves_reflection_vectors_alone(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "none", "--max-steps", 3)
    train(folder, tmp_path / "much", "--max-steps", 3, "--weight-decay", "5")
    assert weights(tmp_path / "none") == weights(tmp_path / "much")


def test_gradient_checkpointing_changes_no_digit_that_counts(folder: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "3", "--learning-rate", "0.05", "--warmup", "0", *STEADY]
    train(folder, tmp_path / "plain", *options)
    train(folder, tmp_path / "saving", *options, "--gradient-checkpointing")
    plain, saving = (read_adapter(tmp_path / name) for name in ("plain", "saving"))
    assert movement(plain, saving) < 1e-4


@pytest.mark.parametrize(
    "options", [["--dtype", "bfloat16"], ["--bf16"], ["--quantize", "4bit"], ["--quantize", "8bit"]]
)
def test_reflection_vectors_are_float32_whatever_the_base_is(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """In bfloat16 a late, small step would vanish in rounding."""
    train(folder, tmp_path / "out", "--max-steps", 3, *options)
    values = torch.cat([u.flatten() for u in read_adapter(tmp_path / "out").chains.values()])
    assert values.dtype == torch.float32
    assert (values.bfloat16().float() != values).float().mean() > 0.9


def targets(output: Path) -> set[str]:
    return set(read_adapter(output).chains)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target-modules", "q_proj,v_proj"], r"model\.layers\.[01]\.self_attn\.[qv]_proj"),
        (["--target-modules", r".*\.1\.mlp\.(up|down)_proj"], r"model\.layers\.1\.mlp\.(up|down)_proj"),
        (["--target-modules", "o_proj", "--layers-to-transform", "0"], r"model\.layers\.0\.self_attn\.o_proj"),
        (["--exclude-modules", "gate_proj", "--layers-to-transform", "1"], r"model\.layers\.1\.(?!.*gate).*_proj"),
    ],
)
def test_targets_are_those_that_were_named(folder: Path, tmp_path: Path, options: Sequence[str], expected: str) -> None:
    train(folder, tmp_path / "out", "--max-steps", 1, *options)
    found = targets(tmp_path / "out")
    everything = {
        f"model.layers.{i}.{part}_proj"
        for i in range(2)
        for part in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    assert found == {name for name in everything if re.fullmatch(expected, name)}


# The best checkpoint


def test_best_checkpoint_is_published_and_training_stops_early(folder: Path, tmp_path: Path) -> None:
    """Answers to the held-out rows are all wrong: guessing gets better while only the form is learned, then worse."""
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{**row, "completion": " ten"} for row in sums(8)])
    options: list[str | float | Path] = [
        "--eval-data",
        wrong,
        "--learning-rate",
        0.02,
        "--schedule",
        "constant",
        "--eval-every",
        2,
    ]
    stop: list[str | int] = ["--epochs", 12, "--early-stopping", 3, "--save-limit", 1, "--save-every", 100]
    report = train(folder, tmp_path / "out", *options, *stop, "--json").json
    losses = {int(row["step"]): float(row["eval_loss"]) for row in history(tmp_path / "out") if row["eval_loss"]}
    best = min(losses, key=lambda step: losses[step])
    assert 2 < best < max(losses)
    assert report["step"] == best
    assert report["steps_taken"] == max(losses) == best + 3 * 2 < report["steps"]
    train(folder, tmp_path / "short", *options, "--max-steps", best)
    assert weights(tmp_path / "out") == weights(tmp_path / "short")


# From Python


def test_train_can_be_called_without_the_command_line(folder: Path, tmp_path: Path) -> None:
    """It returns what it did, and prints nothing."""
    script = f"""
from pathlib import Path
from hra_export.training.loop import train
from hra_export.training.settings import Settings
seen = []
report = train(
    Settings(base={str(folder / "base")!r}, data={str(folder / "sums.jsonl")!r}, output=Path("out"), max_steps=3),
    tell=lambda progress: seen.append(progress.step),
)
assert report.published.step == report.plan.steps == 3, report
assert report.stopped_at is report.resumed_from is None
assert set(seen) == {{1, 2, 3}}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert len(read_adapter(tmp_path / "out").chains) == 14


# What is said


def test_quiet_run_says_nothing_but_its_result(folder: Path, tmp_path: Path) -> None:
    outcome = train(folder, tmp_path / "out", "--max-steps", 1, "--eval-split", 0.2, "-q")
    assert outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("trained 14 chains of rank 8 in 1 steps")
    assert lines[2] == f"wrote `{tmp_path / 'out'}`"


def test_run_without_a_terminal_draws_no_bar(folder: Path, tmp_path: Path) -> None:
    outcome = train(folder, tmp_path / "out", "--max-steps", 2, "--eval-split", 0.2)
    assert "\r" not in outcome.stderr
    assert "%|" not in outcome.stderr
    assert "step 2 of 2: loss" in outcome.stderr


def test_colour_does_not_carry_the_mask(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hra_export.cli import console

    monkeypatch.setattr("hra_export.cli.console.click.echo", lambda text, err: said.append(text))
    said: list[str] = []
    console.Console().say_masked([("read", False), ("learned", True)])
    assert said == ["\x1b[2m[[read]]\x1b[0mlearned"]
    monkeypatch.setenv("NO_COLOR", "1")
    console.Console().say_masked([("read", False), ("learned", True)])
    assert said[1] == "[[read]]learned"


def test_nothing_is_counted_by_anybody(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports each trainer to its makers."""
    calls: list[Any] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **options: calls.append(options))
    monkeypatch.delenv("CI", raising=False)
    train(folder, tmp_path / "out", "--max-steps", 1)
    assert calls == []


def test_dry_run_tells_the_plan_and_touches_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    outcome = train(folder, tmp_path / "a" / "out", "--epochs", 2, "--rank", 2, "--dry-run", "--json")
    plan = outcome.json
    assert plan["dry_run"] is True
    assert plan["steps"] == 10
    assert plan["trainable_parameters"] == 2 * sum((32, 32, 32, 32, 32, 32, 48)) * 2
    assert plan["settings"]["learning-rate"] == pytest.approx(0.01)
    assert len(plan["targets"]) == 14
    assert sorted(path.name for path in folder.iterdir()) == before
    assert list(tmp_path.iterdir()) == []
