"""Stock PEFT loads what was read from the authors' files, and computes what their models compute."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hra_export.official.settings import Settings
from hra_export.registry import load_converter
from tests import tiny_models
from tests.official_scenes import Scene, llama, nlu

from_official = load_converter("from_official")
to_lora = load_converter("to_lora")

# Vectors and factors in float32, through two layers; their effect is above 0.01.
ATOL = 1e-5
EFFECT = 1e-2


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(**inputs).logits
    return answer


def base_model(made: Scene, auto: Any, **options: Any) -> nn.Module:
    model: nn.Module = auto.from_pretrained(made.base.root, torch_dtype=torch.float64, **options)
    return model.eval()


def compare(made: Scene, base: nn.Module, adapter: Path) -> None:
    """The adapter in stock PEFT against the live model of the authors' code."""
    inputs = tiny_models.token_inputs()
    expected, before = logits(made.model, inputs), logits(base, inputs)
    assert (expected - before).abs().max() > EFFECT
    got = logits(peft.PeftModel.from_pretrained(base, adapter).eval(), inputs)
    assert torch.allclose(got, expected, rtol=0, atol=ATOL)


def test_peft_computes_what_the_deberta_code_computes(tmp_path: Path) -> None:
    made = nlu(tmp_path)
    settings = Settings(orthogonalize=False)
    from_official.convert(made.source, tmp_path / "adapter", base=made.base, allow_pickle=True, settings=settings)
    compare(made, base_model(made, AutoModelForSequenceClassification, num_labels=3), tmp_path / "adapter")


def test_peft_computes_what_the_llama_code_computes(tmp_path: Path) -> None:
    made = llama(tmp_path)
    to_lora.convert(made.read().adapter, tmp_path / "lora", base=made.base)
    compare(made, base_model(made, AutoModelForCausalLM), tmp_path / "lora")
