"""Options of a training run: one table for the command line, the TOML file and what is written back."""

import math
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import click
import pytest

from hra_export.cli.train import command
from hra_export.training.settings import OPTIONS, Settings, default_learning_rate
from tests.command_line import run

NEEDED: dict[str, object] = {"base": "b", "data": "d.jsonl", "output": "o"}


def made(**options: object) -> Settings:
    return Settings.from_mapping({**NEEDED, **{name.replace("_", "-"): value for name, value in options.items()}})


def test_every_field_is_an_option_of_the_command_line_and_of_the_file() -> None:
    names = {field.name.replace("_", "-") for field in fields(Settings)}
    assert set(OPTIONS) == names
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {f"--{name}" for name in names} <= flags


def test_flags_can_be_switched_off_on_the_command_line() -> None:
    """Otherwise a `true` in the file could not be overruled."""
    off = {flag for parameter in command.params for flag in parameter.secondary_opts}
    properties = {name for name, option in OPTIONS.items() if option.kind is bool and not option.about.is_control}
    assert off == {f"--no-{name}" for name in properties}


def test_every_option_has_help_that_ends_as_a_sentence() -> None:
    for option in OPTIONS.values():
        assert option.about.help.endswith("."), option.name
    for parameter in command.params:
        assert isinstance(parameter, click.Option)
        assert parameter.help, parameter.name


def test_settings_come_back_from_what_is_written() -> None:
    from hra_export.training.publishing import settings_toml

    settings = made(
        regularization=math.inf, labels=["a", "b"], layers_to_transform=[0, 2], eval_split=0.1, task="causal-lm"
    ).resolved(task="causal-lm", labels=("a", "b"), total_steps=100)
    assert Settings.from_mapping(tomllib.loads(settings_toml(settings))) == settings


def test_what_steers_one_call_is_not_written_back() -> None:
    assert not {"resume", "overwrite"} & made(resume=True, overwrite=True).to_mapping().keys()


def test_mistakes_are_told_all_at_once() -> None:
    with pytest.raises(ValueError, match="rank") as caught:
        Settings.from_mapping({"data": "d", "output": "o", "ranke": 3, "rank": 0, "epochs": "two", "bias": "some"})
    lines = str(caught.value).splitlines()
    assert "ranke: no option of this name; did you mean `rank`?" in lines
    assert "base: missing" in lines
    assert "rank: expected at least 1, got 0" in lines
    assert "epochs: expected a number, got 'two'" in lines
    assert "bias: expected one of none, hra_only, all, got 'some'" in lines


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eval_data": "e.jsonl", "eval_split": 0.1}, "eval-split: not with eval-data"),
        ({"early_stopping": 2}, "early-stopping: needs held-out rows"),
        ({"metric": "f1"}, "metric: f1 needs held-out rows"),
        ({"metric": "f1", "eval_split": 0.1, "task": "causal-lm"}, "is for sequence-classification"),
        ({"packing": True, "task": "sequence-classification"}, "for causal-lm"),
        ({"regularization": math.inf, "init": "paired"}, "normalize the rounding noise"),
        ({"bf16": True, "dtype": "float16"}, "bf16: not with dtype float16"),
        ({"layers_to_transform": [0], "target_modules": [".*q_proj"]}, "not with a regular expression"),
        ({"target_modules": ["q_proj", "all-linear"]}, "expected names, one regular expression or all-linear"),
        ({"target_modules": ["q_proj", ".*k_proj"]}, "expected names, one regular expression or all-linear"),
        ({"labels": ["a", "a"]}, "two or more different names"),
        ({"device": "tpu"}, "device: expected auto, cpu, cuda or cuda:N"),
        ({"regularization": math.nan}, "expected a finite number"),
        ({"learning_rate": math.inf}, "expected a finite number"),
        ({"regularization": -1}, "expected at least 0"),
        ({"rank": True}, "expected a whole number"),
        ({"packing": 1}, "expected true or false"),
        ({"base": ""}, "expected a text, got an empty one"),
        ({"eval_split": 1}, "expected 0 to 0.9"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        made(**options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj,v_proj"], ("q_proj", "v_proj")),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ("to_out.0", ("to_out.0",)),
        ([r".*\.(q|v){1,2}_proj"], (r".*\.(q|v){1,2}_proj",)),
    ],
)
def test_target_modules_are_names_with_commas_or_one_pattern(given: object, expected: tuple[str, ...]) -> None:
    assert made(target_modules=given).target_modules == expected


@pytest.mark.parametrize("rank", [2, 8, 32])
@pytest.mark.parametrize("init", ["paired", "random"])
def test_default_learning_rate_turns_every_vector_by_a_degree(rank: int, init: str) -> None:
    """Against vectors drawn as PEFT draws them, and a step of Adam of full size in each coordinate."""
    import torch

    d = 4096
    columns = rank // 2 if init == "paired" else rank
    vectors = torch.nn.init.kaiming_uniform_(
        torch.empty(d, columns), a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    signs = torch.randn(d, columns, generator=torch.Generator().manual_seed(1)).sign()
    rate = default_learning_rate(rank, "paired" if init == "paired" else "random")
    before, after = (
        torch.nn.functional.normalize(vectors, dim=0),
        torch.nn.functional.normalize(vectors + rate * signs, dim=0),
    )
    degrees = torch.rad2deg(torch.acos((before * after).sum(dim=0).double())).mean().item()
    assert degrees == pytest.approx(1.0, abs=0.05)  # the mean over ≥ 4096 random coordinates is within a few percent


def test_help_names_every_option_in_its_group() -> None:
    outcome = run("train", "--help")
    assert outcome.code == 0
    assert all(f"--{name}" in outcome.stdout for name in OPTIONS)
    assert all(f"\n{group}:\n" in outcome.stdout for group in {option.about.group for option in OPTIONS.values()})


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    """Seen in the findings: only the value of the file is wrong."""
    (tmp_path / "run.toml").write_text('base = "none/such"\ndata = "d"\noutput = "o"\nrank = 0\npacking = true\n')
    assert run("train", "--config", tmp_path / "run.toml").code == 2
    outcome = run("train", "--config", tmp_path / "run.toml", "--rank", "4", "--device", "cpu")
    assert outcome.code == 6  # past the options: the base is looked for on the Hub, which is off in tests
    assert "none/such" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [("rank = ", "is not a TOML file"), ("ranks = 3", "ranks: no option of this name"), ("[rank]\na = 1", "rank:")],
)
def test_file_that_cannot_be_used_is_a_matter_of_usage(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    outcome = run("train", "--config", tmp_path / "run.toml", "--base", "b", "--data", "d", "--output", "o")
    assert outcome.code == 2
    assert says in outcome.stderr


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hra_export.cli import train

    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "trl" else object())
    outcome = run("train", "--base", "b", "--data", "d", "--output", "o")
    assert outcome.code == 7
    assert "training needs trl" in outcome.stderr
    assert "pip install 'hra-export[train]'" in outcome.stderr
