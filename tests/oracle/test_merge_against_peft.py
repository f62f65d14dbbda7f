"""Stock PEFT's unmerged outputs = our merged checkpoint's, for many architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn

from hra_export import parity
from hra_export.adapter import read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.merge import MergeReport, merge_checkpoint
from hra_export.planning import plan_merge
from tests.tiny_models import MODELS, build, scores

# float32 on both sides, a dozen layers of sums in another order: 1e-6 of outputs that the adapter moves by 1 % or more.
EFFECT_FP32 = 5e-4
# Rounding a folded weight to 16 bits moves outputs about as much, relative to the adapter's effect, as it changes ΔW;
# the factor allows for layers that weigh their targets unevenly.
EFFECT_PER_ROUNDING = 4.0
RANK = 4


def train_adapter(name: str, model: nn.Module, directory: Path, *, gram_schmidt: bool) -> tuple[Any, Tensor]:
    """A PEFT adapter with every tensor it saves moved away from its start; returns the PEFT model and its outputs."""
    tiny = MODELS[name]
    torch.manual_seed(1)
    options = {"r": RANK, "target_modules": tiny.targets, "apply_GS": gram_schmidt, "init_weights": not gram_schmidt}
    adapted = get_peft_model(model, HRAConfig(**{**options, **tiny.options}))
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if value.requires_grad:
                scale = value.std() if "hra_u" in key else 0.05
                value.add_(0.2 * scale * torch.randn_like(value))
    adapted.eval()
    adapted.save_pretrained(directory)
    torch.manual_seed(2)
    return adapted, scores(adapted(**tiny.inputs()))


def outputs_of(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return scores(model(**MODELS[name].inputs()))


def merge(base: Path, adapter: Path, output: Path, **options: Any) -> MergeReport:
    plan = plan_merge(open_checkpoint(base), [read_adapter(adapter)], **options)
    return merge_checkpoint(plan, output)


@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(MODELS))
def test_merged_outputs_are_those_of_peft(name: str, dtype: torch.dtype, gram_schmidt: bool, tmp_path: Path) -> None:
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path / "base")
    model_class: Any = type(model)
    model = model_class.from_pretrained(tmp_path / "base", torch_dtype=torch.float32).eval()
    start = outputs_of(name, model)
    _, reference = train_adapter(name, model, tmp_path / "adapter", gram_schmidt=gram_schmidt)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = model_class.from_pretrained(tmp_path / "merged", torch_dtype=torch.float32).eval()
    found = parity.compare(name, reference.numpy(), outputs_of(name, merged).numpy(), start.numpy(), logits=False)
    assert found.effect_size > 1e-3
    allowed = EFFECT_FP32 if dtype == torch.float32 else max(EFFECT_FP32, EFFECT_PER_ROUNDING * report.loss)
    assert found.effect_error < allowed
    assert allowed < 0.5  # dropping the adapter would give 1
