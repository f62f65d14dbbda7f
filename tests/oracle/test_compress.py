"""Stock PEFT loads what `compress` writes, and computes what the kept rotations compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, PeftModel, get_peft_model

from hra_export.adapter import read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.compression.outcome import compress_adapter
from hra_export.compression.plan import plan_compression
from tests.tiny_models import MODELS, build, scores

# Of the adapter's effect: float32 through two layers, chains of other vectors for the same R.
SAME_EFFECT = 5e-4
# A random model mixes its layers' errors as it likes; the effect is off by about what the weights are.
PER_WEIGHT_ERROR = 4.0
RANK = 6


def train_adapter(name: str, directory: Path, *, gram_schmidt: bool) -> Any:
    """A PEFT adapter that is saved away from its start; gives the model's outputs without and with it."""
    tiny, model = MODELS[name], build(name)
    model.save_pretrained(directory / "base")
    without = outputs_of(name, model)
    torch.manual_seed(1)
    options = {"r": RANK, "target_modules": tiny.targets, "apply_GS": gram_schmidt, "init_weights": not gram_schmidt}
    adapted: Any = get_peft_model(model, HRAConfig(**{**options, **tiny.options}))
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if value.requires_grad:
                scale = value.std() if "hra_u" in key else 0.05
                value.add_(0.2 * scale * torch.randn_like(value))
    adapted.eval().save_pretrained(directory / "adapter")
    return without, outputs_of(name, adapted)


def outputs_of(name: str, model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return scores(model(**MODELS[name].inputs()))


def loaded(name: str, adapter: Path) -> torch.Tensor:
    """Outputs of stock PEFT with an adapter from its files."""
    return outputs_of(name, PeftModel.from_pretrained(build(name), adapter).eval())


@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("name", ["llama-biases", "bert", "vit", "t5"])
def test_peft_computes_the_same_when_nothing_is_dropped(name: str, gram_schmidt: bool, tmp_path: Path) -> None:
    without, adapted = train_adapter(name, tmp_path, gram_schmidt=gram_schmidt)
    adapter = read_adapter(tmp_path / "adapter")
    compress_adapter(plan_compression(adapter, rank=RANK), tmp_path / "small")
    change = loaded(name, tmp_path / "small") - adapted
    assert float(change.norm() / (adapted - without).norm()) < SAME_EFFECT


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_peft_is_off_by_about_what_was_predicted(name: str, tmp_path: Path) -> None:
    """And by something: an adapter that is loaded and does nothing would be off by 1."""
    without, adapted = train_adapter(name, tmp_path, gram_schmidt=False)
    base = open_checkpoint(tmp_path / "base")
    plan = plan_compression(read_adapter(tmp_path / "adapter"), rank=4, base=base)
    report = compress_adapter(plan, tmp_path / "small")
    assert read_adapter(tmp_path / "small").rank == 4
    effect = float((loaded(name, tmp_path / "small") - adapted).norm() / (adapted - without).norm())
    predicted = report.achieved["weights"]
    assert predicted / PER_WEIGHT_ERROR < effect < min(1.0, predicted * PER_WEIGHT_ERROR)


def test_convolutions_are_measured_on_their_weights(tmp_path: Path) -> None:
    """A UNet's; what PEFT computes of it is about as near as predicted."""
    without, adapted = train_adapter("unet", tmp_path, gram_schmidt=False)
    base = open_checkpoint(tmp_path / "base")
    plan = plan_compression(read_adapter(tmp_path / "adapter"), rank=4, base=base)
    assert {target.weight.kind for target in plan.targets if target.weight} == {"linear", "conv2d"}
    report = compress_adapter(plan, tmp_path / "small")
    assert report.achieved["weights"] == pytest.approx(plan.predicted["weights"], abs=1e-5)
    small = PeftModel.from_pretrained(build("unet"), tmp_path / "small").eval()
    effect = float((outputs_of("unet", small) - adapted).norm() / (adapted - without).norm())
    assert effect < min(1.0, report.achieved["weights"] * PER_WEIGHT_ERROR)
