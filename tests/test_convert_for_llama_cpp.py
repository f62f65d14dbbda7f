"""`hra-export convert --to gguf` on the command line, beside the `.gguf` file that is served: llama.cpp judges.

The base is in 8 bits, so the chains turn what llama.cpp dequantizes; PyTorch has the same values.
"""

from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoModelForCausalLM

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.attachment import attach
from hra_export.registry import load_converter
from tests.command_line import Outcome, run
from tests.official_layouts import LlamaLinear
from tests.synthetic import read_tree, stored, write_adapter_files

pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")

from tests import llama_cpp_judge as judge

PROMPTS = [[5, 17, 40, 8, 91], [3], [60, 61, 62, 5, 5, 9, 33, 2, 11]]
# Products with Q8_0 round activations to 8 bits for each 32 values: ten times less than an adapter that is missing.
EFFECT_Q8 = 0.1
# float32 on both sides, sums in another order.
EFFECT_FP32 = 2e-5
EPSILON = 1e-4


class Scene:
    """A file of llama.cpp, what it holds as a model of PyTorch, and two adapters on disk."""

    def __init__(self, folder: Path, kind: Type) -> None:
        self.folder, self.file = folder, folder / "model.gguf"
        made = judge.build("llama")
        judge.write_model(made, "llama", self.file, kind)
        load_converter("from_gguf").convert(self.file, folder / "values")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder / "values").eval()
        self.targets = judge.targets(self.model, head=True)
        for seed, name in enumerate(("first", "second"), start=1):
            write_adapter(judge.random_adapter(made, self.targets, seed=seed), folder / name)

    def adapters(self, *names: str) -> list[HraAdapter]:
        return [read_adapter(self.folder / name) for name in names]

    def convert(self, *arguments: str | Path, base: Path | None = None) -> Outcome:
        output = self.folder / "adapter.gguf"
        return run("convert", *arguments, "--base", base or self.file, "--to", "gguf", "--output", output)

    def said(self, *, adapter: bool = False) -> Tensor:
        path = self.folder / "adapter.gguf" if adapter else None
        return judge.log_probabilities(self.file, PROMPTS, judge.VOCABULARY, adapter=path)

    def effect_error(self, reference: Tensor) -> float:
        """Of the file that was converted, beside what PyTorch says with the change; the base is told apart."""
        base = judge.pytorch_log_probabilities(self.model, PROMPTS)
        return judge.effect_error((base, self.said()), (reference, self.said(adapter=True)))

    def live(self, *names: str, **options: Any) -> Tensor:
        attachment = attach(self.model, *self.adapters(*names), **options)
        found = judge.pytorch_log_probabilities(self.model, PROMPTS)
        attachment.detach()
        return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    return tmp_path / "cache"


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, Type.Q8_0)


@pytest.mark.parametrize(
    ("strength", "interpolation"), [("1", "geodesic"), ("0.5", "geodesic"), ("-1", "geodesic"), ("0.5", "linear")]
)
def test_a_quantized_file_is_served_with_adapters_at_any_strength(
    scene: Scene, strength: str, interpolation: str
) -> None:
    names, folders = ("first", "second"), [scene.folder / "first", scene.folder / "second"]
    outcome = scene.convert(*folders, "--strength", strength, "--interpolation", interpolation)
    assert outcome.code == 0, outcome.stderr
    reference = scene.live(*names, strength=float(strength), interpolation=interpolation)
    assert scene.effect_error(reference) < EFFECT_Q8
    others = [("0.5", "geodesic"), ("-1", "geodesic"), ("1", "geodesic"), ("0.5", "linear")]
    for t, how in others:  # the judge tells each of them from the others
        if (t, how) != (strength, interpolation):
            assert scene.effect_error(scene.live(*names, strength=float(t), interpolation=how)) > 2 * EFFECT_Q8


def test_the_served_file_is_dequantized_into_the_cache_and_named_as_the_base(scene: Scene, cache: Path) -> None:
    before = read_tree(scene.folder)
    assert scene.convert(scene.folder / "first").code == 0
    kept = {name: data for name, data in read_tree(scene.folder).items() if not name.startswith("cache")}
    assert kept.keys() - before.keys() == {"adapter.gguf"}
    assert all(kept[name] == data for name, data in before.items())
    assert len(list((cache / "hra-export" / "gguf").iterdir())) == 1
    data = (scene.folder / "adapter.gguf").read_bytes()
    assert b"model.gguf" in data[:4096]
    assert str(scene.folder).encode() not in data


def test_an_adapter_at_strength_0_is_refused_as_no_change(scene: Scene) -> None:
    outcome = scene.convert(scene.folder / "first", "--strength", "0")
    assert (outcome.code, "changes nothing" in outcome.stderr) == (4, True)
    assert not (scene.folder / "adapter.gguf").exists()


@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_softened_reflections_after_the_layers_are_served_too(tmp_path: Path, strength: str) -> None:
    """The authors' LLaMA code turns outputs: rows of q and k, which llama.cpp has in another order."""
    scene = Scene(tmp_path, Type.F32)
    torch.manual_seed(4)
    written = {}
    for module in scene.targets:
        written[module] = 0.02 * torch.randn(scene.model.get_submodule(module).out_features, 4)
    write_adapter_files(
        scene.folder / "official",
        {f"base_model.model.{module}.oft_r": stored(u.numpy()) for module, u in written.items()},
        peft_type="OFT",
        eps=EPSILON,
    )
    linear = ("--interpolation", "linear", "--strength", strength)
    outcome = scene.convert(scene.folder / "official", "--from", "official", *linear)
    assert outcome.code == 0, outcome.stderr
    reference = official_log_probabilities(scene, written, float(strength))
    assert scene.effect_error(reference) < EFFECT_FP32
    assert scene.effect_error(scene.live("first")) > 0.5


def official_log_probabilities(scene: Scene, vectors: dict[str, Tensor], strength: float) -> Tensor:
    """With the weights of the authors' layers; W + s (W' − W)."""
    model: Any = AutoModelForCausalLM.from_pretrained(scene.folder / "values").double().eval()
    with torch.no_grad():
        for module, u in vectors.items():
            layer = LlamaLinear(model.get_submodule(module), 4, epsilon=EPSILON)
            layer.oft_r.copy_(u)
            layer.base_layer.weight.lerp_(layer.folded(), strength)
    return judge.pytorch_log_probabilities(model, PROMPTS)
