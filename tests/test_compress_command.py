"""`hra-export compress` as a user runs it: what it says, what it writes, what it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.publish import MANIFEST_NAME
from hra_export.rotation import shortest_chain
from tests.command_line import Outcome, run
from tests.refusals import Case, Refusals
from tests.synthetic import Sizes, read_tree, toy_tensors, write_base, write_json
from tests.test_compress import turning
from tests.train_scene import save_base, sums, write_jsonl

MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
WIDTH = 32


@dataclass(frozen=True)
class Scene:
    """A folder with an adapter of rank 6, its base, a text, and the output still to be made."""

    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "small"

    def run(self, *options: str | Path) -> Outcome:
        return run("compress", self.adapter, "--output", self.output, *options)

    def give(self, angles: list[float]) -> None:
        """Another adapter."""
        chains = {name: shortest_chain(turning(angles, seed=i, width=WIDTH)) for i, name in enumerate(MODULES)}
        write_adapter(HraAdapter(chains, rank=2 * len(angles), base=str(self.base)), self.adapter)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    made = Scene(tmp_path)
    save_base(made.base)
    write_jsonl(made.rows, sums(6))
    made.give([0.9, 0.5, 0.1])
    return made


def test_compress_writes_an_adapter_and_tells_the_error_before_and_after(scene: Scene) -> None:
    outcome = scene.run("--rank", "4")
    assert outcome.code == 0, outcome.stderr
    assert "predicted error: 9." in outcome.stderr
    assert "achieved error: 9." in outcome.stdout
    written = read_adapter(scene.output)
    assert written.rank == 4
    assert list(written.chains) == MODULES
    assert (scene.output / MANIFEST_NAME).is_file()


@pytest.mark.parametrize("by", ["rotation", "weights", "outputs"])
def test_compress_in_json_tells_which_error_decided(by: str, scene: Scene) -> None:
    given: dict[str, list[str | Path]] = {"weights": ["--base", scene.base], "outputs": ["--calibration", scene.rows]}
    outcome = scene.run("--tolerance", "0.3", "--json", *given.get(by, []))
    assert outcome.code == 0, outcome.stderr
    answer = outcome.json
    assert answer["by"] == by
    assert answer["predicted"][by] <= 0.3
    assert answer["achieved"][by] == pytest.approx(answer["predicted"][by], abs=1e-5)
    assert [target["shortest"] for target in answer["targets"]] == [6, 6]
    assert answer["rank_after"] == max(target["kept"] for target in answer["targets"]) < answer["rank_before"]


def test_dry_run_writes_nothing(scene: Scene) -> None:
    before = read_tree(scene.folder)
    outcome = scene.run("--rank", "2", "--dry-run", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["predicted"]["rotation"] > 0.3
    assert read_tree(scene.folder) == before


def test_a_rank_that_drops_nothing_is_said_and_writes_the_shortest_chains(scene: Scene) -> None:
    outcome = scene.run("--rank", "9")
    assert outcome.code == 0
    assert "nothing is dropped" in outcome.stderr
    assert read_adapter(scene.output).rank == 6


def test_overwrite_replaces_what_was_written(scene: Scene) -> None:
    assert scene.run("--rank", "4").code == 0
    assert scene.run("--rank", "2", "--overwrite").code == 0
    assert read_adapter(scene.output).rank == 2


refused: Refusals[Scene] = Refusals()


@refused(2, "either --rank or --tolerance")
def neither(scene: Scene) -> Sequence[str]:
    return []


@refused(2, "either --rank or --tolerance")
def both(scene: Scene) -> Sequence[str]:
    return ["--rank", "2", "--tolerance", "0.1"]


@refused(2, "--rank")
def rank_of_zero(scene: Scene) -> Sequence[str]:
    return ["--rank", "0"]


@refused(2, "--tolerance")
def tolerance_of_zero(scene: Scene) -> Sequence[str]:
    return ["--tolerance", "0"]


@refused(2, "--tolerance")
def tolerance_of_one(scene: Scene) -> Sequence[str]:
    return ["--tolerance", "1"]


@refused(2, "--tolerance")
def tolerance_that_is_no_number(scene: Scene) -> Sequence[str]:
    return ["--tolerance", "nan"]


@refused(4, "nothing would be left", "--rank 2")
def less_than_a_plane(scene: Scene) -> Sequence[str]:
    return ["--rank", "1"]


@refused(4, "every chain is the identity")
def adapter_that_does_nothing(scene: Scene) -> Sequence[str]:
    scene.give([0.0])
    return ["--rank", "2"]


@refused(4, *MODULES, "(16, r)")
def base_of_another_width(scene: Scene) -> Sequence[str | Path]:
    write_base(scene.folder / "narrow", toy_tensors(Sizes(width=16)))
    return ["--rank", "2", "--base", scene.folder / "narrow"]


@refused(4, "peft_type", "LORA")
def adapter_of_another_method(scene: Scene) -> Sequence[str]:
    write_json(scene.adapter / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    return ["--rank", "2"]


@refused(4, "row 2")
def text_with_a_bad_row(scene: Scene) -> Sequence[str | Path]:
    write_jsonl(scene.rows, [*sums(1), {"prompt": "one"}])
    return ["--rank", "2", "--calibration", scene.rows]


@refused(2, "nowhere.txt")
def text_that_is_not_there(scene: Scene) -> Sequence[str | Path]:
    return ["--rank", "2", "--calibration", scene.folder / "nowhere.txt"]


@refused(8, "no tokenizer")
def base_without_a_tokenizer(scene: Scene) -> Sequence[str | Path]:
    for path in scene.base.glob("token*"):
        path.unlink()
    (scene.base / "chat_template.jinja").unlink(missing_ok=True)
    return ["--rank", "2", "--calibration", scene.rows]


@refused(6, "exists")
def output_that_exists(scene: Scene) -> Sequence[str]:
    scene.output.mkdir()
    (scene.output / "mine.txt").write_text("kept")
    return ["--rank", "2"]


@refused(6, "input")
def output_inside_of_the_adapter(scene: Scene) -> Sequence[str | Path]:
    return ["--rank", "2", "--output", scene.adapter / "small"]


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_refused(case: Case[Scene], scene: Scene) -> None:
    options = case.damage(scene) or []
    before = read_tree(scene.folder)
    outcome = scene.run(*options)
    assert outcome.code == case.code, outcome.stderr
    assert all(word in outcome.stderr for word in case.says), outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert read_tree(scene.folder) == before
