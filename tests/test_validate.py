"""Validation passes right merges and fails wrong ones, by the adapter's effect."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.checkpoint import MANIFEST_NAME, open_checkpoint
from hra_export.cli import cli
from hra_export.merge import merge_checkpoint
from hra_export.parity import ParityReport
from hra_export.planning import plan_merge
from hra_export.validation.merged import validate_merged
from tests.tiny_models import build

RANK = 4


def make_adapter(name: str, base: Path, *, seed: int = 5) -> HraAdapter:
    """A chain of moderately turned pairs on every second matrix of the base, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    chains = {}
    for key, info in open_checkpoint(base).tensors.items():
        chosen = key.endswith(".weight") and any(part in key for part in TARGETS[name])
        if chosen and len(info.shape) in (2, 4):
            features = int(torch.tensor(info.shape[1:]).prod())
            half = torch.randn(features, RANK // 2, generator=generator).repeat_interleave(2, dim=1)
            chains[key.removesuffix(".weight")] = half + 0.1 * torch.randn(features, RANK, generator=generator)
    assert chains
    return HraAdapter(chains, rank=RANK)


TARGETS = {
    "llama": ("q_proj", "down_proj"),
    "bert": ("query", "intermediate"),
    "t5": ("SelfAttention.q", "wo"),
    "vit": ("query", "intermediate"),
    "unet": ("to_q", "conv1"),
    "qwen3-moe": ("q_proj", "o_proj"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `adapter`, and the right `merged`."""
    folder = tmp_path_factory.mktemp("llama")
    return prepare("llama", folder)


def prepare(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    build(name).to(dtype).save_pretrained(folder / "base")
    write_adapter(make_adapter(name, folder / "base"), folder / "adapter")
    merge(folder, read_adapter(folder / "adapter"), folder / "merged")
    return folder


def merge(folder: Path, adapter: HraAdapter, output: Path, **options: str) -> None:
    plan = plan_merge(open_checkpoint(folder / "base"), [adapter], **options)  # type: ignore[arg-type]
    merge_checkpoint(plan, output)


def judge(folder: Path, candidate: Path, dtype: str | None = None) -> ParityReport:
    return validate_merged([read_adapter(folder / "adapter")], folder / "base", candidate, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TARGETS)
def test_right_merge_passes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    report = judge(prepare(name, tmp_path, dtype=dtype), tmp_path / "merged")
    assert report.ok, report.findings
    assert max(output.effect_size for output in report.outputs) > 1e-3


def test_half_strength_is_judged_against_half_strength(tmp_path: Path) -> None:
    folder = prepare("llama", tmp_path)
    adapter = read_adapter(folder / "adapter")
    plan = plan_merge(open_checkpoint(folder / "base"), [adapter], strength=0.5)
    merge_checkpoint(plan, tmp_path / "half")
    assert judge(folder, tmp_path / "half").ok
    whole = validate_merged([adapter], folder / "base", tmp_path / "half", strength=1.0)
    assert whole.effect_error == pytest.approx(0.5, abs=0.1)


def test_head_that_the_base_lacks_is_judged_by_the_chains_effect(tmp_path: Path) -> None:
    """A headless BertModel becomes a classifier of five labels; the base's own head would be random."""
    model = build("bert")
    model.bert.save_pretrained(tmp_path / "base")
    chains = make_adapter("bert", tmp_path / "base").chains
    head = {"classifier.weight": torch.randn(5, 32), "classifier.bias": torch.randn(5)}
    adapter = HraAdapter(
        {f"bert.{module}": u for module, u in chains.items()},
        rank=RANK,
        parameters=head,
        modules_to_save=("classifier",),
        task="SEQ_CLS",
    )
    write_adapter(adapter, tmp_path / "adapter")
    merge(tmp_path, read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    report = judge(tmp_path, tmp_path / "merged")
    assert report.ok, report.findings
    wrong = replace(adapter, chains={module: u.flip(1) for module, u in adapter.chains.items()})
    merge(tmp_path, wrong, tmp_path / "wrong")
    assert not judge(tmp_path, tmp_path / "wrong").ok


def reversed_chain(folder: Path, output: Path) -> None:
    adapter = read_adapter(folder / "adapter")
    merge(folder, replace(adapter, chains={key: u.flip(1) for key, u in adapter.chains.items()}), output)


def one_target_skipped(folder: Path, output: Path) -> None:
    adapter = read_adapter(folder / "adapter")
    merge(folder, replace(adapter, chains=dict(list(adapter.chains.items())[1:])), output)


def rounded_to_bfloat16(folder: Path, output: Path) -> None:
    """The file says float32, its values hold bfloat16."""
    edit(folder, output, lambda tensor: tensor.bfloat16().float())


def stored_as_bfloat16(folder: Path, output: Path) -> None:
    edit(folder, output, lambda tensor: tensor.bfloat16())


def with_a_nan(folder: Path, output: Path) -> None:
    edit(
        folder,
        output,
        lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("nan")) if tensor.ndim > 1 else tensor,
    )


def edit(folder: Path, output: Path, change: Callable[[Tensor], Tensor]) -> None:
    merge(folder, read_adapter(folder / "adapter"), output)
    path = output / "model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def base_as_it_is(folder: Path, output: Path) -> None:
    (folder / "base").rename(output)
    build("llama").save_pretrained(folder / "base")


WRONG = [reversed_chain, one_target_skipped, rounded_to_bfloat16, stored_as_bfloat16, with_a_nan, base_as_it_is]


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_merge_fails(fault: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder = prepare("llama", tmp_path)
    fault(folder, tmp_path / "wrong")
    report = judge(folder, tmp_path / "wrong")
    assert not report.ok
    assert report.findings


@pytest.mark.parametrize("fault", [reversed_chain, one_target_skipped, base_as_it_is])
def test_wrong_merge_fails_in_bfloat16_too(fault: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """Rounding excuses as much as it cost, and no more."""
    folder = prepare("llama", tmp_path, dtype=torch.bfloat16)
    if fault is base_as_it_is:
        assert not judge(folder, folder / "base").ok
        return
    fault(folder, tmp_path / "wrong")
    assert not judge(folder, tmp_path / "wrong").ok


def run(llama: Path, candidate: str, *more: str) -> Result:
    adapter, base = str(llama / "adapter"), str(llama / "base")
    arguments = ["validate", adapter, "--base", base, "--candidate", str(llama / candidate), *more]
    return CliRunner().invoke(cli, arguments, standalone_mode=False)


def test_command_ends_with_0_and_prints_the_effect_first(llama: Path) -> None:
    result = run(llama, "merged")
    assert result.return_value == 0
    assert "effect off by" in result.stdout.splitlines()[0]
    assert "parity holds" in result.stdout


def test_command_writes_a_page_for_weights_too(llama: Path, tmp_path: Path) -> None:
    assert run(llama, "merged", "--html", str(tmp_path / "page.html")).return_value == 0
    assert "parity holds (float32)" in (tmp_path / "page.html").read_text()


def test_command_refuses_what_only_graphs_have(llama: Path) -> None:
    result = run(llama, "merged", "--per-layer", "--provider", "cuda")
    assert isinstance(result.exception, click.UsageError)
    assert "--per-layer, --provider" in str(result.exception)


def test_command_ends_with_3_when_the_base_is_the_candidate(llama: Path) -> None:
    result = run(llama, "base", "--json")
    assert result.return_value == 3
    data = json.loads(result.stdout)
    assert data["schema_version"] == 1
    assert not data["ok"]
    assert data["effect_error"] == pytest.approx(1, abs=1e-4)


def test_untrained_adapter_has_no_effect_to_judge(tmp_path: Path) -> None:
    folder = prepare("llama", tmp_path)
    adapter = read_adapter(folder / "adapter")
    identity = replace(adapter, chains={key: u[:, :2].repeat_interleave(2, dim=1) for key, u in adapter.chains.items()})
    write_adapter(identity, folder / "adapter")
    report = judge(folder, folder / "base")
    assert not report.ok
    assert "no effect to judge" in report.findings[0]


def test_manifest_of_the_candidate_says_what_was_promised(llama: Path) -> None:
    manifest = json.loads((llama / "merged" / MANIFEST_NAME).read_text())
    assert manifest["dtype"] == "keep"
    assert judge(llama, llama / "merged").dtype == "float32"
    assert not judge(llama, llama / "base", dtype="bfloat16").ok
