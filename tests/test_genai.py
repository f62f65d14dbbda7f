"""Directories for ONNX Runtime GenAI: built, loaded by it, and compared with PyTorch and live chains."""

import dataclasses
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai
import pytest
import torch
import transformers
from torch import Tensor, nn

from hra_export.adapter import HraAdapter
from hra_export.attachment import attach
from hra_export.checkpoint import open_checkpoint
from hra_export.errors import CheckpointError, DeviceError, GraphError, MismatchError, UnsupportedModelError
from hra_export.graph import genai_builder
from hra_export.graph.adapter_file import write_adapter_file
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.genai import GenaiModel, Generation, build_genai, traced_genai
from hra_export.graph.genai_config import check_config, for_provider
from hra_export.graph.genai_corrections import correct_
from hra_export.graph.genai_names import builder_names
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.making import MadeGraphs
from hra_export.graph.operator import declare_, is_reflection
from hra_export.graph.options import GraphOptions
from hra_export.graph.quantize import quantize_
from hra_export.graph.swapping import make_swappable_
from hra_export.graph.traced import TracedSource
from hra_export.merge import merge_checkpoint
from hra_export.planning import plan_merge
from hra_export.registry import load_converter
from tests.real_models import smollm2_gguf
from tests.tiny_tokenizer import write_tokenizer

VOCABULARY = 300  # the bytes and three more, so that no other size is the vocabulary's
PROMPT = [35, 117, 203, 60, 8]
NEW_TOKENS = 12
RANK = 4
# ‖candidate − reference‖ / ‖reference − base‖ over the logits of a prompt. A dropped adapter makes it 1.
FP32_EFFECT = 1e-4  # the project's bar; attention and norms sum in another order
FP16_EFFECT = 1e-2  # 2⁻¹¹ in each of some twenty products in a row
INT4_EFFECT = 1e-3  # weights are the same numbers on both sides; scales and products in float32

ALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
ALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
ALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
ALL |= {"initializer_range": 0.2}  # wide enough for logits that lie apart
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
FUSED = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {}, [*ATTENTION, *MLP]),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, [*ATTENTION, *MLP]),
    "llama-biases": ("Llama", {"attention_bias": True}, [*ATTENTION, *MLP]),
    "qwen3": ("Qwen3", {"head_dim": 16}, [*ATTENTION, *MLP]),
    "phi": ("Phi", {"partial_rotary_factor": 1.0}, [*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    "mistral": ("Mistral", {"sliding_window": 3}, [*ATTENTION, *MLP]),
    "phi3": ("Phi3", {"original_max_position_embeddings": 128}, FUSED),
    "gpt-neox": ("GPTNeoX", {}, ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"]),
}

Directory = Callable[[str], Path]


def build_model(kind: str) -> nn.Module:
    """A tiny random decoder."""
    name, options, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**ALL, **options})
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def random_adapter(kind: str, *, seed: int = 1, rank: int = RANK, more: Sequence[str] = ()) -> HraAdapter:
    """Chains before every linear layer, and before further modules."""
    model, generator = build_model(kind), torch.Generator().manual_seed(seed)
    stem = "gpt_neox" if kind == "gpt-neox" else "model"
    paths = [f"{stem}.layers.{layer}.{name}" for layer in range(2) for name in KINDS[kind][2]]
    chains = {}
    for path in [*paths, *more]:
        module: Any = model.get_submodule(path)
        width = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
        chains[path] = torch.randn(width, rank, generator=generator)
    return HraAdapter(chains, rank)


@torch.no_grad()
def torch_generation(
    model: nn.Module, adapters: Sequence[HraAdapter] = (), *, prompt: Sequence[int] = PROMPT
) -> Generation:
    """What PyTorch makes of a prompt, with live chains."""
    attachment = attach(model, *adapters)
    row = torch.tensor([prompt])
    tokens = model.generate(row, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    logits = model(row).logits[0]
    attachment.detach()
    text = [token for token in tokens[0, len(prompt) :].tolist() if token != model.config.eos_token_id]
    return Generation(tuple(text), logits.numpy())


def effect_error(candidate: Generation, reference: Generation, base: Generation) -> float:
    """The error of the adapter's effect: 1 when it is not there."""
    effect = np.linalg.norm(reference.logits - base.logits)
    return float(np.linalg.norm(candidate.logits - reference.logits) / effect)


def save(made: MadeGraphs, base: Path, directory: Path) -> Path:
    """The directory as an export writes it: graph, configuration, and the base's tokenizer."""
    directory.mkdir()
    (model,) = made.graphs.values()
    if any(is_reflection(node) for node in model.graph):
        declare_(model)
    save_graph(model, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    for name, data in made.files.items():
        (directory / name).write_bytes(data)
    return directory


def run(directory: Path) -> Generation:
    return GenaiModel.open(directory).generate(PROMPT, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """A model directory of a kind, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def directory(kind: str) -> Path:
        if not (folder / kind).exists():
            build_model(kind).save_pretrained(folder / kind)
            write_tokenizer(folder / kind)
        return folder / kind

    return directory


@pytest.fixture(scope="module")
def plain_graph(base_of: Directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the plain llama, q, k and v apart: where the builder puts things."""
    scratch = tmp_path_factory.mktemp("plain")
    made = build_genai(base_of("llama"), [random_adapter("llama")], scratch, GraphOptions(mode="reflect"))
    assert made.graphs["model"].graph.initializers["model.layers.0.self_attn.q_proj.hra_U"].shape == ir.Shape([64, 4])
    return scratch / "built" / "model.onnx"


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi", "phi3"])
def test_build_genai_reflects_as_pytorch_does(kind: str, base_of: Directory, tmp_path: Path) -> None:
    """Every linear layer, the head and the embedding; fused layers of the base too. Two adapters, one on the other."""
    more = [] if kind == "phi3" else ["lm_head", "model.embed_tokens"]
    adapters = [random_adapter(kind, more=more), random_adapter(kind, seed=2, rank=3)]
    made = build_genai(base_of(kind), adapters, tmp_path, GraphOptions(mode="reflect"))
    candidate = run(save(made, base_of(kind), tmp_path / "out"))
    model = build_model(kind)
    reference, base = torch_generation(model, adapters), torch_generation(model)
    assert reference.tokens != base.tokens  # a dropped adapter would show
    assert candidate.tokens == reference.tokens
    assert effect_error(candidate, reference, base) < FP32_EFFECT


NORMS = """
<ir_version: 10, opset_import: ["" : 22, "com.microsoft" : 1]>
norms (float[1, 2, 4] x, float[4] s) => (float[1, 2, 4] z) {
    y = LayerNormalization <epsilon = 1e-6> (x, s)
    z = com.microsoft.SkipLayerNormalization <epsilon = 1e-6> (y, x, s)
}
"""
EPSILONS: Mapping[str, tuple[dict[str, Any], float]] = {
    "layer_norm_eps": ({"layer_norm_eps": 3e-5}, 3e-5),
    "torch's": ({}, 1e-5),
    "rms": ({"rms_norm_eps": 1}, 1e-6),
}


@pytest.mark.parametrize("case", EPSILONS)
def test_correct_takes_epsilon_from_the_configuration(case: str) -> None:
    """The builder knows `rms_norm_eps` only, and 1e-6 where there is none."""
    config, epsilon = EPSILONS[case]
    model = ir.from_onnx_text(NORMS)
    notes = correct_(model, config)
    assert [node.attributes["epsilon"].as_float() for node in model.graph] == pytest.approx([epsilon, epsilon])
    assert bool(notes) == (epsilon != 1e-6)


WINDOWS: Mapping[str, tuple[dict[str, Any], list[int]]] = {
    "every layer": ({"sliding_window": 8}, [8, 8]),
    "one layer": ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, [-1, 8]),
    "switched off": ({"sliding_window": 8, "use_sliding_window": False}, [-1, -1]),
    "none": ({"sliding_window": None}, [-1, -1]),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_correct_gives_attention_its_window(case: str, plain_graph: Path) -> None:
    config, windows = WINDOWS[case]
    model = open_graph(plain_graph)
    correct_(model, {"rms_norm_eps": 1e-6, **config})
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes["local_window_size"].as_int() for node in attentions] == windows


def test_build_genai_runs_merged_weights(base_of: Directory, tmp_path: Path) -> None:
    """A tied model with q, k and v in one product."""
    adapter = random_adapter("llama-tied")
    merge_checkpoint(plan_merge(open_checkpoint(base_of("llama-tied")), [adapter]), tmp_path / "merged")
    made = build_genai(tmp_path / "merged", [], tmp_path, GraphOptions(mode="merged"))
    names = {node.name for node in made.graphs["model"].graph}
    assert "/model/layers.0/attn/qkv_proj/MatMul" in names
    candidate = run(save(made, base_of("llama-tied"), tmp_path / "out"))
    model = build_model("llama-tied")
    reference, base = torch_generation(model, [adapter]), torch_generation(model)
    assert reference.tokens != base.tokens
    assert candidate.tokens == reference.tokens
    assert effect_error(candidate, reference, base) < FP32_EFFECT


def test_build_genai_half_precision_decodes_on_the_cpu(base_of: Directory, tmp_path: Path) -> None:
    """Qwen3: its norms of queries and keys must not be part of an attention that only CUDA has."""
    adapter = random_adapter("qwen3")
    made = build_genai(base_of("qwen3"), [adapter], tmp_path, GraphOptions(mode="reflect", precision="fp16"))
    assert made.graphs["model"].graph.initializers["model.layers.1.mlp.down_proj.hra_V"].dtype == ir.DataType.FLOAT16
    candidate = run(save(made, base_of("qwen3"), tmp_path / "out"))
    model = build_model("qwen3")
    reference, base = torch_generation(model, [adapter]), torch_generation(model)
    assert len(candidate.tokens) == NEW_TOKENS
    assert effect_error(candidate, reference, base) < FP16_EFFECT


def test_build_genai_takes_biases_from_the_base(base_of: Directory, tmp_path: Path) -> None:
    """A merge without chains brings the adapter's biases into the base; the chains stay operators."""
    adapter, model = random_adapter("llama-biases"), build_model("llama-biases")
    biases = {name: value + 0.5 for name, value in model.named_parameters() if name.endswith("q_proj.bias")}
    adapter = dataclasses.replace(adapter, parameters={name: value.detach() for name, value in biases.items()})
    without_chains = dataclasses.replace(adapter, chains={})
    merge_checkpoint(plan_merge(open_checkpoint(base_of("llama-biases")), [without_chains]), tmp_path / "base")
    made = build_genai(tmp_path / "base", [adapter], tmp_path, GraphOptions(mode="reflect"))
    candidate = run(save(made, base_of("llama-biases"), tmp_path / "out"))
    reference = torch_generation(model, [adapter])
    without_biases = torch_generation(model, [dataclasses.replace(adapter, parameters={})])
    assert effect_error(candidate, reference, without_biases) < FP32_EFFECT
    assert candidate.tokens == reference.tokens


def test_int4_graph_reflects_outside_its_weights(base_of: Directory, plain_graph: Path, tmp_path: Path) -> None:
    """Against PyTorch with the very weights that the codes stand for."""
    adapter, model = random_adapter("llama"), open_graph(plain_graph)
    insert_reflections_(model, [adapter])
    quantize_(model, "int4", family="decoder", head_bits=4, accuracy_level=0)
    weights = {str(node.name): dequantized(node) for node in model.graph if node.op_type == "MatMulNBits"}
    assert len(weights) == 2 * 7 + 1
    files = {"genai_config.json": (plain_graph.parent / "genai_config.json").read_bytes()}
    made = MadeGraphs({"model": model}, "decoder", files=files)
    candidate = run(save(made, base_of("llama"), tmp_path / "out"))
    twin = build_model("llama")
    for name, values in weights.items():
        twin.get_submodule(module_of(name)).weight.data.copy_(values)
    reference, base = torch_generation(twin, [adapter]), torch_generation(twin)
    assert reference.tokens != base.tokens
    assert candidate.tokens == reference.tokens
    assert effect_error(candidate, reference, base) < INT4_EFFECT


def dequantized(node: ir.Node) -> Tensor:
    """(o, d): scale · (code − zero), block by block, two codes in a byte with the low one first."""
    packed, scales, zeros = (np.asarray(value.const_value.numpy()) for value in node.inputs[1:4])
    rows, blocks = scales.shape
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, blocks, -1).astype(np.float32)
    points = np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)[:, :blocks].astype(np.float32)
    values = (codes - points[..., None]) * scales[..., None]
    return torch.from_numpy(values.reshape(rows, -1)[:, : node.attributes["K"].as_int()].copy())


def module_of(name: str) -> str:
    """`/model/layers.0/attn/q_proj/MatMul_Q4` as transformers calls it."""
    path = name.removeprefix("/").rpartition("/")[0].replace("/", ".")
    return path.replace(".attn.", ".self_attn.")


def test_swappable_directory_gives_each_adapter_its_tokens(
    base_of: Directory, plain_graph: Path, tmp_path: Path
) -> None:
    """One model, two adapters of two ranks, and the base while none is active."""
    adapters = {"first": random_adapter("llama"), "second": random_adapter("llama", seed=2, rank=6)}
    model = open_graph(plain_graph)
    insert_reflections_(model, [adapters["first"]])
    contract = make_swappable_(model)
    files = {"genai_config.json": (plain_graph.parent / "genai_config.json").read_bytes()}
    directory = save(MadeGraphs({"model": model}, "decoder", files=files), base_of("llama"), tmp_path / "out")
    session, twin = GenaiModel.open(directory), build_model("llama")
    for name, adapter in adapters.items():
        write_adapter_file(tmp_path / f"{name}.onnx_adapter", [adapter], contract)
        session.load_adapter(name, tmp_path / f"{name}.onnx_adapter")
    base = torch_generation(twin)
    found = {name: session.generate(PROMPT, max_new_tokens=NEW_TOKENS, adapter=name) for name in adapters}
    for name, adapter in adapters.items():
        reference = torch_generation(twin, [adapter])
        assert found[name].tokens == reference.tokens
        assert effect_error(found[name], reference, base) < FP32_EFFECT
    assert session.generate(PROMPT, max_new_tokens=NEW_TOKENS).tokens == base.tokens
    assert len({base.tokens, *(generation.tokens for generation in found.values())}) == 3
    with pytest.raises(ValueError, match="third"):
        session.generate(PROMPT, max_new_tokens=1, adapter="third")
    foreign = dataclasses.replace(contract, fingerprint="0" * 64)
    write_adapter_file(tmp_path / "foreign.onnx_adapter", [adapters["first"]], foreign)
    with pytest.raises(MismatchError, match="another graph"):
        session.load_adapter("foreign", tmp_path / "foreign.onnx_adapter")


def test_directory_is_complete(base_of: Directory, plain_graph: Path) -> None:
    """The generator's own tokenizer reads it, and its configuration says what the model's says."""
    config = json.loads((plain_graph.parent / "genai_config.json").read_bytes())
    assert (config["model"]["context_length"], config["model"]["eos_token_id"]) == (128, 2)
    assert config["search"]["do_sample"] is False
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(plain_graph.parent)))
    theirs = transformers.AutoTokenizer.from_pretrained(base_of("llama"))
    text = "Reflections, twelve of them: ü"
    assert tokenizer.encode(text).tolist() == theirs(text)["input_ids"]


def test_builder_names_tells_what_is_not_guessed() -> None:
    targets = {
        "model.layers.3.self_attn.dense": "model.layers.3.attn.o_proj",
        "transformer.encoder.layers.0.self_attention.query_key_value": "model.layers.0.attn.qkv_proj",
        "model.layers.11.self_attn.q_proj": None,
        "lm_head": None,
    }
    assert builder_names(targets) == {target: name for target, name in targets.items() if name is not None}


def test_builder_names_refuses_experts() -> None:
    with pytest.raises(UnsupportedModelError, match="experts"):
        builder_names(["model.layers.0.mlp.experts.3.up_proj"])


def test_build_genai_names_a_target_without_a_place(plain_graph: Path) -> None:
    model, target = open_graph(plain_graph), "model.layers.7.mlp.up_proj"
    with pytest.raises(MismatchError, match=r"layers\.7\.mlp\.up_proj"):
        insert_reflections_(model, [HraAdapter({target: torch.ones(64, 1)}, 1)])


def test_traced_decoder_generates(base_of: Directory, tmp_path: Path) -> None:
    """GPT-NeoX, which the builder has not: our own graph, and a configuration written for it."""
    adapter, directory = random_adapter("gpt-neox"), base_of("gpt-neox")
    plan = plan_merge(open_checkpoint(directory), [adapter])
    made = TracedSource(plan).make(GraphOptions(mode="reflect", runtime="genai"), tmp_path, say=lambda text: None)
    candidate = run(save(traced_genai(made, directory, "cpu"), directory, tmp_path / "out"))
    model = build_model("gpt-neox")
    reference, base = torch_generation(model, [adapter]), torch_generation(model)
    assert reference.tokens != base.tokens
    assert candidate.tokens == reference.tokens
    assert effect_error(candidate, reference, base) < FP32_EFFECT


def test_unknown_architecture_is_refused_with_what_is_known(base_of: Directory, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="GPTNeoXForCausalLM") as caught:
        build_genai(base_of("gpt-neox"), [], tmp_path, GraphOptions())
    assert "LlamaForCausalLM" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_says_how_to_install_it(
    base_of: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genai_builder, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'hra-export\[genai\]'"):
        build_genai(base_of("llama"), [], tmp_path, GraphOptions())


def test_builder_failure_is_a_graph_error_with_its_reason(base_of: Directory, tmp_path: Path) -> None:
    """Weights that are no safetensors file."""
    directory = tmp_path / "damaged"
    directory.mkdir()
    for path in base_of("llama").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(GraphError, match="cannot build") as caught:
        build_genai(directory, [], tmp_path, GraphOptions())
    assert "Safetensor" in str(caught.value) or "header" in str(caught.value)


ENDINGS: Mapping[str, tuple[int, str, type[Exception], str]] = {
    "killed": (-9, "", GraphError, "SIGKILL"),
    "architecture inside": (1, "NotImplementedError: The X model is not supported.", UnsupportedModelError, "The X"),
    "silent": (3, "", GraphError, "code 3"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_builder_ending_is_told_apart(
    ending: str, base_of: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said, error, text = ENDINGS[ending]
    done = subprocess.CompletedProcess([], code, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(error, match=text):
        build_genai(base_of("llama"), [], tmp_path, GraphOptions())


def test_bfloat16_on_the_cpu_is_refused(base_of: Directory, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="bfloat16"):
        build_genai(base_of("llama"), [], tmp_path, GraphOptions(precision="bf16"))


def test_directory_without_a_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="architectures"):
        build_genai(tmp_path, [], tmp_path, GraphOptions())


FAULTS: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unfed input": (lambda config: config["model"]["decoder"]["inputs"].pop("attention_mask"), "nothing would feed it"),
    "foreign name": (
        lambda config: config["model"]["decoder"]["outputs"].update(logits="scores"),
        "output `scores`: the graph has none",
    ),
    "a layer too many": (
        lambda config: config["model"]["decoder"].update(num_hidden_layers=3),
        "past_key_values.2.key",
    ),
    "no end": (lambda config: config["model"].update(eos_token_id=None), "eos_token_id"),
    "end outside": (lambda config: config["model"].update(eos_token_id=[2, VOCABULARY]), "eos_token_id"),
    "too long": (lambda config: config["search"].update(max_length=129), "max_length"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_config_finds(fault: str, plain_graph: Path) -> None:
    config, graph = json.loads((plain_graph.parent / "genai_config.json").read_bytes()), open_graph(plain_graph).graph
    check_config(config, graph)
    change, text = FAULTS[fault]
    change(config)
    with pytest.raises(GraphError, match=text):
        check_config(config, graph)


def test_check_config_refuses_heads_that_attention_cannot_rotate(plain_graph: Path) -> None:
    config = json.loads((plain_graph.parent / "genai_config.json").read_bytes())
    config["model"]["decoder"]["head_size"] = 8
    with pytest.raises(UnsupportedModelError, match="got 8 and 8"):
        check_config(config, open_graph(plain_graph).graph)


def test_for_provider_names_the_provider_and_changes_nothing_else(plain_graph: Path) -> None:
    config = json.loads((plain_graph.parent / "genai_config.json").read_bytes())
    options = for_provider(config, "cuda")["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"cuda": {}}]
    assert for_provider(for_provider(config, "cuda"), "cpu") == config


def test_open_says_what_is_wrong(base_of: Directory) -> None:
    with pytest.raises(GraphError, match="cannot read"):
        GenaiModel.open(base_of("llama"))


QUESTIONS = ("What is the capital of France?", "Name three colours.", "Why is the sky blue? Answer in one sentence.")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_answers_as_pytorch_does(tmp_path: Path) -> None:
    """A real llama of thirty layers under its chat template, chains before every linear layer."""
    base = tmp_path / "base"
    load_converter("from_gguf").convert(smollm2_gguf(), base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    generator = torch.Generator().manual_seed(0)
    linear = {path: module for path, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    chains = {f"model.{path}": pair_of_vectors(module.in_features, generator) for path, module in linear.items()}
    made = build_genai(base, [HraAdapter(chains, 2)], tmp_path, GraphOptions(mode="reflect"))
    session = GenaiModel.open(save(made, base, tmp_path / "out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    changed = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text)["input_ids"]
        plain = torch_generation(model, prompt=prompt)
        reference = torch_generation(model, [HraAdapter(chains, 2)], prompt=prompt)
        candidate = session.generate(prompt, max_new_tokens=NEW_TOKENS)
        changed.append(reference.tokens != plain.tokens)
        assert effect_error(candidate, reference, plain) < FP32_EFFECT
        assert candidate.tokens == reference.tokens
    assert any(changed)


def pair_of_vectors(width: int, generator: torch.Generator) -> Tensor:
    """Two vectors some 27 degrees apart: one plane turns by twice that, and the model still speaks."""
    first = torch.randn(width, 1, generator=generator)
    return torch.cat([first, first + 0.5 * torch.randn(width, 1, generator=generator)], 1)
