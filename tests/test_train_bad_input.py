"""Training runs that must be refused: exit code, what the message names, and nothing written or lost.

Each case damages a good scene and may return options of its own; its decorator says how the run must end. The scene is
compared byte for byte before and after.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hra_export.adapter import read_adapter
from hra_export.training.checkpoints import RunDirectory
from tests.command_line import Outcome, run
from tests.refusals import Case, Refusals
from tests.tiny_models import build
from tests.train_scene import chats, opinions, save_base, save_encoder, save_tokenizer, sums, tree, write_jsonl


@dataclass(frozen=True)
class Scene:
    """A folder with a good `base` and good `rows.jsonl`, and the `output` still to be made."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def put_rows(self, rows: Sequence[Any]) -> None:
        write_jsonl(self.rows, rows)

    def put_base(self, save: Callable[[Path], object]) -> None:
        shutil.rmtree(self.base)
        save(self.base)

    def configure(self, name: str, **changes: object) -> None:
        """Change fields of a JSON file of the base."""
        path = self.base / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def train(self, *more: str | Path) -> Outcome:
        known: list[str | Path] = [
            "--base",
            self.base,
            "--data",
            self.rows,
            "--output",
            self.output,
            "--max-steps",
            "2",
        ]
        return run("train", *known, *more)


refused: Refusals[Scene] = Refusals()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", sums(12))
    return folder


@pytest.fixture
def scene(good: Path, tmp_path: Path) -> Scene:
    shutil.copytree(good, tmp_path / "scene")
    return Scene(tmp_path / "scene")


# The adapter


@refused(4, "no target", "nope")
def no_target_matches(scene: Scene) -> Sequence[str]:
    return ["--target-modules", "nope"]


@refused(
    4,
    "12 targets do not fit",
    "model.layers.0.self_attn.q_proj: expected a rank of 1 to 32, its input features, got 40",
    "model.layers.1.mlp.up_proj: expected a rank of 1 to 32",
)
def rank_above_the_input_features_of_some(scene: Scene) -> Sequence[str]:
    return ["--rank", "40"]


@refused(8, "a chain on the head")
def chain_on_the_head(scene: Scene) -> Sequence[str]:
    return ["--target-modules", "q_proj,lm_head"]


@refused(4, "no linear layer in a layer of these numbers")
def layers_that_are_not_there(scene: Scene) -> Sequence[str]:
    return ["--layers-to-transform", "7,8"]


# The rows


@refused(4, "data `", "none.jsonl` does not exist")
def data_missing(scene: Scene) -> Sequence[str]:
    return ["--data", str(scene.folder / "none.jsonl")]


@refused(4, "none.jsonl` does not exist")
def held_out_data_missing(scene: Scene) -> Sequence[str]:
    return ["--eval-data", str(scene.folder / "none.jsonl")]


@refused(4, "3 rows are unusable", "row 2: empty", "row 3: not JSON", "row 5: expected an object, got a list")
def malformed_rows(scene: Scene) -> None:
    first, *rest = scene.rows.read_text().splitlines(keepends=True)
    scene.rows.write_text("".join([first, "\n", '{"prompt": \n', rest[0], "[]\n", *rest]))


@refused(4, "2 rows are unusable", "row 3: `completion` is empty", "row 5: `completion` is missing; expected text")
def empty_rows(scene: Scene) -> None:
    rows: list[dict[str, Any]] = sums(6)
    rows[2]["completion"], rows[4]["completion"] = "", None
    scene.put_rows(rows)


@refused(4, "no token of the rows to train on is learned", "`--max-length 4`")
def nothing_to_learn(scene: Scene) -> Sequence[str]:
    return ["--max-length", "4"]


@refused(4, "no token of the rows to evaluate on is learned")
def nothing_to_evaluate_on(scene: Scene) -> Sequence[str]:
    held_out = write_jsonl(scene.folder / "long.jsonl", [{"prompt": "one " * 40, "completion": " two"}])
    return ["--eval-data", str(held_out), "--max-length", "16"]


@refused(4, "cannot hold out a part of 1 row")
def single_row_to_split(scene: Scene) -> Sequence[str]:
    scene.put_rows(sums(1))
    return ["--eval-split", "0.5"]


@refused(4, "2 rows are unusable", "row 2: the chat template refuses it: unknown role system", "row 4: ")
def roles_that_the_template_refuses(scene: Scene) -> None:
    rows = chats(5)
    for number in (1, 3):
        rows[number]["messages"].insert(0, {"role": "system", "content": "a"})
    scene.put_rows(rows)


@refused(4, "holds messages", "has no chat template", "hint: ")
def messages_without_a_chat_template(scene: Scene) -> None:
    scene.put_rows(chats(4))
    (scene.base / "chat_template.jinja").unlink()


@refused(4, "assistant-only-loss: the chat template", "does not mark what the assistant says")
def template_without_marks(scene: Scene) -> Sequence[str]:
    scene.put_rows(chats(4))
    path = scene.base / "chat_template.jinja"
    path.write_text(path.read_text().replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    return ["--assistant-only-loss"]


@refused(4, "assistant-only-loss: the rows of data", "are no messages")
def assistant_of_no_messages(scene: Scene) -> Sequence[str]:
    return ["--assistant-only-loss"]


@refused(
    4, "row 3: `label` is '2'; expected 0 to 1, or up, down", "row 4: `label` is 'sideways'", "row 5: `label` is '-1'"
)
def labels_out_of_range(scene: Scene) -> Sequence[str]:
    labels = ["up", "down", "2", "sideways", "-1"]
    scene.put_rows([{"text": "a", "label": label} for label in labels])
    return ["--labels", "up,down"]


@refused(4, "2 rows are unusable", "row 1: `label` is missing", "row 3: `label` is missing")
def labels_missing(scene: Scene) -> None:
    scene.put_rows([{"text": "a", "label": label} for label in (None, "up", "", "down")])


@refused(4, "labels go from 0 to 5, and no row has 2", "--labels")
def labels_with_a_gap(scene: Scene) -> None:
    scene.put_rows([{"text": "a", "label": label} for label in (0, 1, 5)])


@refused(4, "expected columns", "found `question`, `answer`", "--text-column")
def columns_of_no_task(scene: Scene) -> None:
    scene.put_rows([{"question": "a", "answer": "b"}])


# The base


@refused(4, "base `", "does not exist")
def base_missing(scene: Scene) -> Sequence[str]:
    return ["--base", str(scene.folder / "none")]


@refused(4, "safetensors")
def base_without_weights(scene: Scene) -> None:
    (scene.base / "model.safetensors").unlink()


@refused(4, "model.safetensors")
def base_torn(scene: Scene) -> None:
    os.truncate(scene.base / "model.safetensors", 5000)


@refused(4, "has no tokenizer that transformers can load")
def base_without_tokenizer(scene: Scene) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scene.base / name).unlink()


@refused(4, "has neither a padding nor an end token")
def tokenizer_that_can_neither_pad_nor_end(scene: Scene) -> None:
    scene.configure("tokenizer_config.json", pad_token=None, eos_token=None)


@refused(4, "has no end token to close a row with")
def tokenizer_that_cannot_end(scene: Scene) -> None:
    scene.configure("tokenizer_config.json", eos_token=None)


@refused(4, "is no whole causal language model", "weights are missing")
def base_without_a_head_for_language(scene: Scene) -> None:
    scene.put_base(save_encoder)


@refused(8, "is an encoder-decoder")
def base_of_two_towers(scene: Scene) -> None:
    def save(folder: Path) -> None:
        build("t5").save_pretrained(folder)
        save_tokenizer(folder)

    scene.put_base(save)


@refused(8, "which has no model for sequence-classification")
def base_without_any_head_for_the_task(scene: Scene) -> None:
    def save(folder: Path) -> None:
        build("vit").save_pretrained(folder)
        save_tokenizer(folder)

    scene.put_rows(opinions(4))
    scene.put_base(save)


@refused(8, "is a diffusers model")
def base_that_paints(scene: Scene) -> None:
    def save(folder: Path) -> None:
        build("unet").save_pretrained(folder)
        save_tokenizer(folder)

    scene.put_base(save)


# The output


@refused(6, "exists", "--overwrite")
def output_exists(scene: Scene) -> None:
    scene.output.mkdir()
    (scene.output / "precious").write_text("mine")


@refused(6, "it was not written by hra-export")
def output_of_somebody_else(scene: Scene) -> Sequence[str]:
    output_exists(scene)
    return ["--overwrite"]


@refused(6, "is, contains or lies in the input")
def output_in_the_base(scene: Scene) -> Sequence[str]:
    return ["--output", str(scene.base / "adapter")]


@refused(6, "is, contains or lies in the input")
def output_around_the_rows(scene: Scene) -> Sequence[str]:
    return ["--output", str(scene.folder), "--overwrite"]


# The machine


@refused(7, "`cuda:7` is not there")
def device_that_is_not_there(scene: Scene) -> Sequence[str]:
    return ["--device", "cuda:7"]


@refused(2, "report-to: nobody is not supported")
def tracker_that_does_not_exist(scene: Scene) -> Sequence[str]:
    return ["--report-to", "nobody"]


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_train_refuses(scene: Scene, case: Case[Scene]) -> None:
    more = case.damage(scene) or []
    before = tree(scene.folder)
    outcome = scene.train(*more)
    assert outcome.code == case.code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert all(text in outcome.stderr for text in case.says), outcome.stderr
    assert outcome.stdout == ""
    assert tree(scene.folder) == before
    assert [path.name for path in scene.folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "case", [case for case in refused.cases if case.code == 4][:12], ids=lambda case: case.damage.__name__
)
def test_plan_refuses_the_same(scene: Scene, case: Case[Scene]) -> None:
    """What can be known without weights is known before they are loaded."""
    more = case.damage(scene) or []
    outcome = scene.train(*more, "--dry-run", "--json")
    assert outcome.code == case.code, outcome.stderr
    assert outcome.json["error"]["exit_code"] == case.code


def test_good_scene_trains(scene: Scene) -> None:
    """Every refusal above would be worth nothing if the scene were refused as it is."""
    outcome = scene.train()
    assert outcome.code == 0, outcome.stderr


# Numbers that run away


def spoil(scene: Scene, monkeypatch: pytest.MonkeyPatch, *, at: int, gradient: bool) -> None:
    """From a step on, the loss or its gradient is not a number."""
    from hra_export.training import trainer as module

    real = module.hra_trainer

    def spoiled(kind: Any, settings: Any) -> Any:
        class Spoiled(real(kind, settings)):  # type: ignore[misc]
            def compute_loss(self, *arguments: Any, **options: Any) -> Any:
                loss = super().compute_loss(*arguments, **options)
                if self.state.global_step + 1 < at:
                    return loss
                bad = torch.sqrt(loss - loss.detach())  # zero, with an infinite slope
                return loss + bad if gradient else loss * float("nan")

        return Spoiled

    monkeypatch.setattr("hra_export.training.causal.hra_trainer", spoiled)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, gradient: bool
) -> None:
    spoil(scene, monkeypatch, at=4, gradient=gradient)
    outcome = scene.train("--max-steps", "8", "--save-every", "2", "--batch-size", "4")
    assert outcome.code == 5, outcome.stderr
    assert "--learning-rate" in outcome.stderr
    assert not scene.output.exists()
    kept = RunDirectory.of(scene.output).checkpoints()
    assert [checkpoint.step for checkpoint in kept] == [2]
    assert "checkpoint-2` is whole, and an adapter as it is" in outcome.stderr
    assert read_adapter(kept[0].path).chains


def test_loss_that_is_no_number_at_once_leaves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(scene.folder)
    spoil(scene, monkeypatch, at=1, gradient=False)
    assert scene.train().code == 5
    assert tree(scene.folder) == before
