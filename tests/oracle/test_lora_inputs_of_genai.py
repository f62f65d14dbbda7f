"""A graph whose LoRA inputs are not ours: PEFT's adapter, the GenAI builder's graph, Olive's names for its inputs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hra_export import attach
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import open_checkpoint
from hra_export.registry import load_converter
from tests.tiny_tokenizer import write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide enough for logits that lie apart
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [35, 117, 203, 60, 8]
NEW_TOKENS = 12


def llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    return model


def build(folder: Path) -> Path:
    """The builder's directory for a model with a LoRA adapter of PEFT's, whose factors then become inputs."""
    llama().save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False)
    get_peft_model(llama(), config).save_pretrained(folder / "lora")
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", str(folder / "base")]
    command += ["-o", str(folder / "built"), "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
    command += ["--extra_options", f"adapter_path={folder / 'lora'}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    model = ir.load(folder / "built" / "model.onnx")
    ir.external_data.load_to_model(model)
    for node in list(model.graph):
        if node.op_type == "MatMul" and f"{node.name}".endswith(("/lora_A/MatMul", "/lora_B/MatMul")):
            make_input_(model, node)
    (folder / "built" / "model.onnx.data").unlink()
    ir.save(model, folder / "built" / "model.onnx")
    return folder / "built"


def make_input_(model: ir.Model, node: ir.Node) -> None:
    """As Olive's ExtractAdapters does it: names, one symbol for every rank, a default of rank 0, listed twice."""
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    assert node.name is not None
    name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
    axis = 1 if "lora_A" in name else 0
    sizes = [0 if i == axis else int(size) for i, size in enumerate(value.const_value.shape.numpy())]
    value.name = name
    value.const_value = ir.tensor(np.zeros(sizes, np.float32), name=name)
    value.shape = ir.Shape(["lora_r" if i == axis else size for i, size in enumerate(sizes)])
    model.graph.inputs.extend([value, value])


def random_adapter(*, seed: int, rank: int, names: list[str]) -> HraAdapter:
    generator = torch.Generator().manual_seed(seed)
    chains = {
        path: torch.randn(module.in_features, rank, generator=generator)
        for path, module in llama().named_modules()
        if isinstance(module, nn.Linear) and path.endswith(tuple(names))
    }
    return HraAdapter(chains, rank)


def generated(model: Any, adapters: Any, name: str) -> list[int]:
    """Greedy tokens of ONNX Runtime GenAI."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, batch_size=1, max_length=len(PROMPT) + NEW_TOKENS)
    generator = onnxruntime_genai.Generator(model, parameters)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(np.array([PROMPT], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@torch.no_grad()
def torch_generated(*adapters: HraAdapter) -> list[int]:
    """Greedy tokens of PyTorch with live chains."""
    model: Any = llama()
    attach(model, *adapters)
    tokens: list[int] = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return tokens


def test_genai_serves_hra_adapters_in_a_graph_for_lora(tmp_path: Path) -> None:
    """One model in memory, adapters of two ranks and other targets, and the base; no two texts are alike."""
    directory = build(tmp_path)
    adapters = {
        "first": random_adapter(seed=1, rank=4, names=LINEARS),
        "second": random_adapter(seed=2, rank=6, names=["q_proj", "down_proj"]),
    }
    model = onnxruntime_genai.Model(str(directory))
    loaded = onnxruntime_genai.Adapters(model)
    convert, base = load_converter("to_ort_adapter").convert, open_checkpoint(tmp_path / "base")
    for name, adapter in adapters.items():
        convert([adapter], tmp_path / f"{name}.onnx_adapter", graph=directory, base=base)
        loaded.load(str(tmp_path / f"{name}.onnx_adapter"), name)
    expected = {"": torch_generated(), **{name: torch_generated(adapter) for name, adapter in adapters.items()}}
    assert {name: generated(model, loaded, name) for name in expected} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
