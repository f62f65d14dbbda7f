"""`hra-export convert --to ort-adapter` on the command line: quantized graphs, encoder-decoders, the authors' layouts.

Graphs are run by ONNX Runtime and compared with live layers in PyTorch, by the adapter's effect.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import platformdirs
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.attachment import attach
from hra_export.graph.document import open_graph, save_graph
from tests import tiny_models
from tests.command_line import run
from tests.official_layouts import LlamaLinear
from tests.synthetic import stored, write_adapter_files
from tests.test_from_gguf import write_gguf
from tests.test_to_ort_adapter import llama, logits_of, lora_graph, run_stock, widths

# ‖candidate − reference‖ / ‖reference − base‖: two float32 runs of two layers, in another order of sums.
EFFECT_FP32 = 1e-4
RANK = 4
EPSILON = 1e-4
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))


def made(*arguments: str | Path) -> Any:
    outcome = run(*arguments, "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    return outcome.json


def put_adapter(model: nn.Module, folder: Path, name: str, *, seed: int) -> Path:
    """Chains on every linear layer but the head."""
    generator = torch.Generator().manual_seed(seed)
    chains = {
        path: torch.randn(module.in_features, RANK, generator=generator)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in path
    }
    write_adapter(HraAdapter(chains, RANK), folder / name)
    return folder / name


def lost(found: Tensor, reference: Tensor, start: Tensor) -> float:
    effect = (reference - start).norm()
    assert effect > 0.05 * start.norm()
    return float((found - reference).norm() / effect)


def quiet() -> onnxruntime.SessionOptions:
    """It would warn of each default that may be overridden."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    return settings


# ------------------------------------------------------------------------------------------- a graph in 8 bits


IDS = torch.randint(0, 8, (2, 7), generator=torch.Generator().manual_seed(3))


def graph_logits(directory: Path, adapter: Path | None = None) -> Tensor:
    """Stock ONNX Runtime, with one of its own adapters active."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", quiet(), providers=["CPUExecutionProvider"])
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    given["position_ids"] = np.arange(IDS.shape[1])[None].repeat(len(IDS), 0)
    feeds = {value.name: given[value.name] for value in session.get_inputs() if value.name in given}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(IDS), value.shape[1], 0, value.shape[3]), np.float32)
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return torch.from_numpy(session.run(["logits"], feeds, options)[0])


class Quantized:
    """A `.gguf` file, its values in PyTorch, and two adapters."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, write_gguf(folder / "tiny.gguf", Type.Q8_0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=self.file.name, dtype=torch.float32)
        self.model = model.eval()
        self.adapter, self.other = (put_adapter(model, folder, name, seed=i) for i, name in enumerate(("a", "b")))

    @torch.no_grad()
    def logits(self, *adapters: Path, **options: Any) -> Tensor:
        attachment = attach(self.model, *map(read_adapter, adapters), **options)
        found: Tensor = self.model(IDS).logits
        attachment.detach()
        return found


@pytest.fixture
def quantized(tmp_path: Path) -> Quantized:
    return Quantized(tmp_path)


HALVES = [("0.5", "geodesic"), ("0.5", "linear")]
INVERSES = [("-1", "geodesic"), ("-1", "linear")]


@pytest.mark.parametrize(
    ("strength", "interpolation"), [*HALVES, *(pytest.param(*each, marks=pytest.mark.slow) for each in INVERSES)]
)
def test_a_graph_that_keeps_its_bits_takes_adapters_at_a_strength(
    quantized: Quantized, strength: str, interpolation: str
) -> None:
    out, given = quantized.folder / "out", ("--strength", strength, "--interpolation", interpolation)
    adapters = quantized.adapter, quantized.other
    made("onnx", *adapters, "--base", quantized.file, "-o", out, "--no-validate", *given)
    assert "MatMulNBits" in {node.op_type for node in open_graph(out / "model.onnx").graph}
    reference = quantized.logits(*adapters, strength=float(strength), interpolation=interpolation)
    assert lost(graph_logits(out), reference, quantized.logits()) < EFFECT_FP32
    assert lost(quantized.logits(*adapters), reference, quantized.logits()) > 0.1


def test_a_swappable_graph_that_keeps_its_bits_takes_files_at_strengths(quantized: Quantized) -> None:
    """The file at strength 0 leaves the base to the bit."""
    out = quantized.folder / "out"
    made("onnx", quantized.other, "--base", quantized.file, "-o", out, "--swappable", "--no-validate")
    start = quantized.logits()
    for number, (strength, interpolation) in enumerate([("1", "geodesic"), *HALVES, *INVERSES]):
        file = quantized.folder / f"{number}.onnx_adapter"
        given = ("--strength", strength, "--interpolation", interpolation)
        made("convert", quantized.adapter, "--to", "ort-adapter", "--graph", out, "-o", file, *given)
        reference = quantized.logits(quantized.adapter, strength=float(strength), interpolation=interpolation)
        assert lost(graph_logits(out, file), reference, start) < EFFECT_FP32
    nothing = quantized.folder / "nothing.onnx_adapter"
    made("convert", quantized.adapter, "--to", "ort-adapter", "--graph", out, "-o", nothing, "--strength", "0")
    assert torch.equal(graph_logits(out, nothing), graph_logits(out))
    assert lost(graph_logits(out), start, quantized.logits(quantized.adapter)) < EFFECT_FP32


# ------------------------------------------------------------------------------------------- an encoder-decoder


@pytest.mark.slow  # four graphs are traced
@pytest.mark.timeout(600)
def test_a_t5_takes_a_file_for_each_of_its_graphs(tmp_path: Path) -> None:
    model: Any = tiny_models.build("t5").eval()
    model.save_pretrained(tmp_path / "base")
    first, second = (put_adapter(model, tmp_path, name, seed=i) for i, name in enumerate(("first", "second")))
    out = tmp_path / "out"
    made("onnx", first, "--base", tmp_path / "base", "-o", out, "--swappable", "--no-validate")
    report = made("convert", second, "--to", "ort-adapter", "--graph", out, "-o", tmp_path / "a.onnx_adapter")
    files = {side: tmp_path / f"a.{side}_model.onnx_adapter" for side in ("encoder", "decoder")}
    assert {target["module"] for target in report["targets"]} == set(read_adapter(second).chains)
    assert sorted(tmp_path.glob("a.*")) == sorted(
        path for each in files.values() for path in (each, each.with_name(f"{each.name}.json"))
    )
    start = t5_logits(model)
    attachment = attach(model, read_adapter(second))
    reference = t5_logits(model)
    attachment.detach()
    assert lost(t5_graph_logits(out, files), reference, start) < EFFECT_FP32
    assert lost(t5_graph_logits(out, {}), reference, start) > 0.1
    alone = {"encoder": files["encoder"]}
    assert lost(t5_graph_logits(out, alone), reference, start) > 0.01  # each file does its part


TARGET_IDS = torch.randint(4, 64, (2, 5), generator=torch.Generator().manual_seed(4))
SOURCE_IDS = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def t5_logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=SOURCE_IDS, decoder_input_ids=TARGET_IDS).logits
    return found


def t5_graph_logits(directory: Path, files: dict[str, Path]) -> Tensor:
    """Both graphs of ONNX Runtime, each with its own adapter file; the encoder's makes the keys that are crossed."""
    mask = np.ones_like(SOURCE_IDS.numpy())
    known: dict[str, Array] = {"input_ids": SOURCE_IDS.numpy(), "attention_mask": mask, "encoder_attention_mask": mask}
    for side in ("encoder", "decoder"):
        session = onnxruntime.InferenceSession(
            directory / f"{side}_model.onnx", quiet(), providers=["CPUExecutionProvider"]
        )
        options = onnxruntime.RunOptions()
        if side in files:
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(files[side]))
            options.add_active_adapter(loaded)
        for value in session.get_inputs():
            if value.name.endswith((".decoder.key", ".decoder.value")):
                known[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        feeds = {value.name: known[value.name] for value in session.get_inputs() if value.name in known}
        names = [value.name for value in session.get_outputs()]
        answers = dict(zip(names, session.run(names, feeds, options), strict=True))
        known |= {name.replace("present", "past_key_values"): array for name, array in answers.items()}
        known["decoder_input_ids"] = TARGET_IDS.numpy()
    return torch.from_numpy(known["logits"])


# ------------------------------------------------------------------------------------------- the authors' layouts


@pytest.mark.parametrize("strength", ["1", pytest.param("0.5", marks=pytest.mark.slow)])
def test_softened_reflections_after_the_layers_fill_lora_inputs(strength: str, tmp_path: Path) -> None:
    """What no swappable graph holds: ΔW = B A does not ask which side a chain is on."""
    model: Any = llama()
    model.save_pretrained(tmp_path / "base")
    save_graph(lora_graph(llama()), tmp_path, "lora")  # which puts its own layers into a model
    generator = torch.Generator().manual_seed(4)
    vectors = {
        path: 0.02 * torch.randn(model.get_submodule(path).out_features, RANK, generator=generator)
        for path in widths(model)
    }
    tensors = {f"base_model.model.{path}.oft_r": stored(u.numpy()) for path, u in vectors.items()}
    official = write_adapter_files(tmp_path / "official", tensors, peft_type="OFT", eps=EPSILON)
    graph, file = tmp_path / "lora.onnx", tmp_path / "a.onnx_adapter"
    linear = ("--interpolation", "linear", "--strength", strength)
    target = ("--to", "ort-adapter", "--graph", graph, "--base", tmp_path / "base", "-o", file)
    made("convert", official, "--from", "official", *target, *linear)
    start = torch.from_numpy(logits_of(model))
    with torch.no_grad():
        for path, u in vectors.items():
            layer = LlamaLinear(model.get_submodule(path), RANK, epsilon=EPSILON)
            layer.oft_r.copy_(u)
            layer.base_layer.weight.lerp_(layer.folded(), float(strength))
    reference = torch.from_numpy(logits_of(model))
    assert lost(torch.from_numpy(run_stock(graph, file)), reference, start) < EFFECT_FP32
