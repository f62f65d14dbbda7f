"""What `--to hra` writes loads in stock PEFT, and does what PEFT's own stack of adapters does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hra_export import parity
from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.attachment import attach
from hra_export.registry import load_converter
from hra_export.strength import take_strength
from tests.graph_scene import random_adapter
from tests.tiny_models import MODELS, build, scores

# Float32 on both sides; PEFT multiplies dense matrices where we rotate activations.
EFFECT_FP32 = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

to_hra = load_converter("to_hra")


def outputs(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return scores(model(**MODELS[name].inputs()))


def effect_error(name: str, candidate: nn.Module, reference: Tensor) -> float:
    base = outputs(name, build(name))
    got = outputs(name, candidate)
    found = parity.compare(name, reference.numpy(), got.numpy(), base.numpy(), logits=False)
    assert found.effect_size > 1e-3
    return found.effect_error


def saved(folder: Path, *adapters: HraAdapter) -> list[HraAdapter]:
    for i, adapter in enumerate(adapters):
        write_adapter(adapter, folder / str(i))
    return [read_adapter(folder / str(i)) for i in range(len(adapters))]


def test_two_adapters_as_one_are_what_peft_makes_of_both(tmp_path: Path) -> None:
    """Of different ranks and targets, one of them trained by PEFT with Gram–Schmidt."""
    torch.manual_seed(1)
    stack: Any = get_peft_model(build("llama"), HRAConfig(r=4, target_modules=["q_proj"], init_weights=False))
    second = HRAConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False, apply_GS=True)
    stack.add_adapter("second", second)
    stack.save_pretrained(tmp_path / "stack")
    stack.base_model.set_adapter(["default", "second"])
    to_hra.convert([read_adapter(tmp_path / "stack"), read_adapter(tmp_path / "stack" / "second")], tmp_path / "out")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out").eval()
    assert effect_error("llama", loaded, outputs("llama", stack.eval())) < EFFECT_FP32


@pytest.mark.parametrize("name", ["llama", "bert", "unet"])
def test_peft_loads_a_strength_of_two_adapters(name: str, tmp_path: Path) -> None:
    """Linear layers, embeddings left out because PEFT's HRA has none, and convolutions."""
    model = build(name)
    whole = {
        path: vectors
        for path, vectors in random_adapter(model).chains.items()
        if not isinstance(model.get_submodule(path), nn.Embedding)
    }
    second = {path: torch.flip(vectors, [0])[:, :2] for path, vectors in list(whole.items())[::2]}
    adapters = saved(tmp_path, HraAdapter(whole, 4), HraAdapter(second, 2))
    to_hra.convert(adapters, tmp_path / "out", strength=0.5)
    live = build(name)
    attach(live, *take_strength(adapters, 0.5, "geodesic").adapters)
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "out").eval()
    assert effect_error(name, loaded, outputs(name, live)) < EFFECT_FP32


def test_twice_a_half_is_the_adapter_in_peft(tmp_path: Path) -> None:
    (adapter,) = saved(tmp_path, HraAdapter(_attention(random_adapter(build("llama"))), 4))
    to_hra.convert([adapter], tmp_path / "half", strength=0.5)
    to_hra.convert([read_adapter(tmp_path / "half")] * 2, tmp_path / "whole")
    whole = PeftModel.from_pretrained(build("llama"), tmp_path / "0").eval()
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "whole").eval()
    half = PeftModel.from_pretrained(build("llama"), tmp_path / "half").eval()
    assert effect_error("llama", again, outputs("llama", whole)) < EFFECT_FP32
    assert effect_error("llama", half, outputs("llama", whole)) > 0.1


def _attention(adapter: HraAdapter) -> dict[str, Tensor]:
    return {path: vectors for path, vectors in adapter.chains.items() if "self_attn" in path}
