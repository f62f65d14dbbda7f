"""Bases in 4 bits of bitsandbytes: dequantized as bitsandbytes does, and graphs that keep their bits.

Rows have whole blocks of 64 but in one test: where they have not, bitsandbytes' own kernel for CPUs takes the largest
values of other blocks (0.50.2; 37 % off where its rounding is 9 %).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import onnxruntime
import platformdirs
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hra_export import attach, read_adapter
from hra_export.adapter import HraAdapter, write_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.cli.validate import PARITY_FAILED
from hra_export.errors import CheckpointError, FormatError, OutputError, UnsupportedModelError
from hra_export.graph.document import open_graph
from hra_export.registry import load_converter
from tests.command_line import Outcome, run
from tests.tiny_tokenizer import write_tokenizer

VOCABULARY = 96

from_bitsandbytes = load_converter("from_bitsandbytes")

WEIGHT = "model.layers.0.mlp.up_proj.weight"
RANK = 4
# Two float32 runs of one model, as in tests/test_onnx_command.py.
EFFECT_ATOL = 1e-4
Tensors = dict[str, Tensor]


def tiny(kind: str, width: int, vocabulary: int) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=1, n_head=4, n_positions=64))
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    )


def quantize(
    folder: Path,
    kind: str = "nf4",
    *,
    nested: bool = False,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    architecture: str = "llama",
    width: int = 64,
    vocabulary: int = VOCABULARY,
    shard_size: str = "50GB",
) -> Path:
    """A tiny checkpoint that transformers quantized and saved."""
    tiny(architecture, width, vocabulary).save_pretrained(folder / "float")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=settings, dtype=dtype, device_map="cpu"
    )
    loaded.save_pretrained(folder / "base", max_shard_size=shard_size)
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    return folder / "base"


def own_values(base: Path) -> Tensors:
    """Every parameter as bitsandbytes has it, float32, in the orientation of its layers."""
    model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
    found = {name: tensor.float() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "quant_state"):
            value = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            found[f"{path}.weight"] = value.float().reshape(module.out_features, module.in_features)
    return {name: value for name, value in found.items() if ".weight." not in name}


def loaded(directory: Path) -> nn.Module:
    """A plain model; nothing missing, nothing unused."""
    result: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = result
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    plain: nn.Module = model.eval()
    return plain


def check_same(directory: Path, expected: Tensors) -> None:
    got = loaded(directory).state_dict()
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NF4 with float32 values, read by many tests and changed by none."""
    return quantize(tmp_path_factory.mktemp("nf4"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {}),
        ("fp4", {"nested": True}),
        ("nf4", {"nested": True, "dtype": torch.bfloat16}),
        ("fp4", {"dtype": torch.float16}),
        ("nf4", {"dtype": torch.bfloat16, "storage": torch.bfloat16}),
    ],
)
def test_convert_gives_what_bitsandbytes_computes_with(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    source = quantize(tmp_path, kind, **options)
    report = from_bitsandbytes.convert(source, tmp_path / "out")
    assert (report.tensors, report.dequantized) == (21, 14)
    check_same(tmp_path / "out", own_values(source))


def test_blocks_run_on_over_the_ends_of_rows(tmp_path: Path, cache: Path) -> None:
    """Rows of 32 in blocks of 64, against bitsandbytes' general kernel, in the directory and in the graph."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    source = quantize(tmp_path, width=32)
    from_bitsandbytes.convert(source, tmp_path / "plain")
    got = loaded(tmp_path / "plain").state_dict()
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    for name, absmax in [(key.removesuffix(".absmax"), value) for key, value in tensors.items() if "absmax" in key]:
        codes, code = tensors[name].reshape(-1), tensors[f"{name}.quant_map"]
        expected = _dequantize_4bit_compute(codes, absmax, code, 64, got[name].shape, torch.float32)
        assert torch.equal(got[name], expected), name
    outcome = export(put_adapter(source, tmp_path / "adapter"), source, tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert outcome.json["validation"]["ok"] is True


def test_convert_writes_a_plain_directory(base: Path, tmp_path: Path) -> None:
    from_bitsandbytes.convert(base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"),
        "hra_export_manifest.json",
    }
    assert {info.dtype for info in open_checkpoint(tmp_path / "out").tensors.values()} == {"F32"}
    manifest = json.loads((tmp_path / "out" / "hra_export_manifest.json").read_bytes())
    assert manifest["tensors"][WEIGHT] == {"dtype": "F32", "source": "4 bits"}


def test_convert_reads_and_writes_shards(tmp_path: Path) -> None:
    """transformers may put a matrix and its absmax into different files."""
    source = quantize(tmp_path, nested=True, shard_size="30KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    pieces: list[int] = []
    from_bitsandbytes.convert(source, tmp_path / "out", max_shard_bytes=80_000, progress=pieces.append)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    check_same(tmp_path / "out", own_values(source))
    assert sum(pieces) == open_checkpoint(tmp_path / "out").size_bytes


def test_convert_reads_parts_of_one_matrix_from_several_files(base: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    source = copied(base, tmp_path)
    (source / "model.safetensors").unlink()
    names = {"a.safetensors": [name for name in tensors if name.endswith(".absmax")]}
    names["b.safetensors"] = [name for name in tensors if name not in names["a.safetensors"]]
    for file, own in names.items():
        safetensors.torch.save_file({name: tensors[name] for name in own}, source / file, {"format": "pt"})
    weight_map = {name: file for file, own in names.items() for name in own}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    from_bitsandbytes.convert(source, tmp_path / "out")
    check_same(tmp_path / "out", own_values(base))


def test_convert_cuts_large_tensors_into_pieces(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_bitsandbytes, "PIECE", 100)
    from_bitsandbytes.convert(base, tmp_path / "out")
    check_same(tmp_path / "out", own_values(base))


def test_convert_turns_the_matrices_of_a_conv1d(tmp_path: Path) -> None:
    """GPT-2's float layers have (in, out), bitsandbytes' (out, in): square ones would load either way."""
    source = quantize(tmp_path, architecture="gpt2")
    from_bitsandbytes.convert(source, tmp_path / "out")
    own, got = own_values(source), loaded(tmp_path / "out").state_dict()
    name = "transformer.h.0.attn.c_proj.weight"
    assert own[name].shape == got[name].shape
    assert torch.equal(got[name], own[name].T)
    assert not torch.equal(got[name], own[name])
    matrices = dict(from_bitsandbytes.quantized_matrices(source))
    assert np.array_equal(matrices[name].values(), own[name].numpy())


def test_convert_writes_the_same_bytes_twice(base: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        from_bitsandbytes.convert(base, tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_convert_keeps_an_output_that_exists(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError):
        from_bitsandbytes.convert(base, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_cache_name_changes_with_any_file(base: Path, tmp_path: Path) -> None:
    source = copied(base, tmp_path)
    (tmp_path / "link").symlink_to(source)
    names = [from_bitsandbytes.cache_name(source)]
    assert from_bitsandbytes.cache_name(tmp_path / "link") == names[0]
    for name in ("model.safetensors", "tokenizer_config.json"):
        os.utime(source / name, ns=(0, len(names)))
        names.append(from_bitsandbytes.cache_name(source))
    assert len(set(names)) == 3


def copied(base: Path, folder: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
    """The base with other tensors."""
    copy = folder / "copy"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def with_state(**changes: object) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{WEIGHT}{part}"] = make(tensors[f"{WEIGHT}{part}"])

    return change


def nan_first(tensor: Tensor) -> Tensor:
    return torch.cat([torch.tensor([torch.nan]), tensor[1:]])


DAMAGES: dict[str, Callable[[Tensors], object]] = {
    "no bytes": lambda tensors: tensors.pop(WEIGHT),
    "no absmax": lambda tensors: tensors.pop(f"{WEIGHT}.absmax"),
    "no codebook": lambda tensors: tensors.pop(f"{WEIGHT}.quant_map"),
    "no state": lambda tensors: tensors.pop(f"{WEIGHT}.quant_state.bitsandbytes__nf4"),
    "bytes cut": put("", lambda tensor: tensor[:-8].clone()),
    "absmax cut": put(".absmax", lambda tensor: tensor[:-1].clone()),
    "absmax NaN": put(".absmax", nan_first),
    "codebook cut": put(".quant_map", lambda tensor: tensor[:15].clone()),
    "state is no JSON": put(".quant_state.bitsandbytes__nf4", lambda tensor: tensor[:20].clone()),
    "state is no text": put(".quant_state.bitsandbytes__nf4", torch.bitwise_not),
    "another shape": with_state(shape=[128, 128]),
    "three axes": with_state(shape=[2, 64, 64]),
    "negative shape": with_state(shape=[-128, -64]),
    "fractional shape": with_state(shape=[128.0, 64.0]),
    "block size 0": with_state(blocksize=0),
    "block size -64": with_state(blocksize=-64),
    "no such dtype": with_state(dtype="load"),
    "an integer dtype": with_state(dtype="int8"),
    "nested without parts": with_state(nested_offset=0.5, nested_blocksize=256),
    "nested in blocks of -1": with_state(nested_offset=0.5, nested_blocksize=-1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_convert_names_a_damaged_matrix_and_writes_nothing(
    base: Path, tmp_path: Path, damage: Callable[[Tensors], object]
) -> None:
    source = copied(base, tmp_path, damage)
    with pytest.raises(FormatError) as caught:
        from_bitsandbytes.convert(source, tmp_path / "out")
    assert WEIGHT in "\n".join(caught.value.findings)
    with pytest.raises(FormatError):
        list(from_bitsandbytes.quantized_matrices(source))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_convert_names_every_damaged_matrix(base: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        for layer in (0, 1):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight.absmax"]

    with pytest.raises(FormatError, match="2 tensors are damaged") as caught:
        from_bitsandbytes.convert(copied(base, tmp_path, damage), tmp_path / "out")
    assert len(caught.value.findings) == 2


def test_convert_refuses_a_codebook_of_its_own(base: Path, tmp_path: Path) -> None:
    """ONNX Runtime has the two of bitsandbytes and no others."""
    source = copied(base, tmp_path, put(".quant_map", lambda tensor: tensor * 1.01))
    with pytest.raises(UnsupportedModelError, match="codebooks of its own"):
        from_bitsandbytes.convert(source, tmp_path / "out")


def test_convert_refuses_truncated_files(base: Path, tmp_path: Path) -> None:
    source = copied(base, tmp_path)
    whole = (source / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (source / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            from_bitsandbytes.convert(source, tmp_path / "out")
        assert not from_bitsandbytes.recognizes(source)
    assert not (tmp_path / "out").exists()


def test_convert_refuses_what_bitsandbytes_did_not_quantize(base: Path, tmp_path: Path) -> None:
    plain = base.parent / "float"
    assert not from_bitsandbytes.recognizes(plain)
    assert from_bitsandbytes.recognizes(base)
    with pytest.raises(CheckpointError, match="was not quantized by bitsandbytes"):
        from_bitsandbytes.convert(plain, tmp_path / "out")


def put_adapter(base: Path, folder: Path) -> Path:
    random = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base.parent / "float")
    linears = {path: module.in_features for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    chains = {path: torch.randn(d, RANK, generator=random) for path, d in linears.items() if "layers" in path}
    write_adapter(HraAdapter(chains, RANK), folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    return tmp_path / "cache"


def export(adapter: Path, base: Path, out: Path, *options: str) -> Outcome:
    return run("onnx", adapter, "--base", base, "-o", out, *options)


def logits_of(model: nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        result: np.ndarray[Any, Any] = model(input_ids=torch.from_numpy(tokens())).logits.float().numpy()
    return result


def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(4, VOCABULARY, (3, 9))


def run_graph(path: Path) -> np.ndarray[Any, Any]:
    """Stock ONNX Runtime, with an empty cache."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = tokens()
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            sizes = [len(ids), value.shape[1], 0, value.shape[3]]
            feeds[value.name] = np.zeros(sizes, np.float32)
    known = {value.name for value in session.get_inputs()}
    given = {name: array for name, array in feeds.items() if name in known}
    result: np.ndarray[Any, Any] = session.run(["logits"], given)[0]
    return result


def effect_error(candidate: np.ndarray[Any, Any], base: Path, adapter: Path) -> float:
    """Against live HRA layers before the weights that bitsandbytes gives; its own product is not one of float32."""
    model = loaded(base.parent / "float")
    model.load_state_dict(own_values(base))
    start = logits_of(model)
    attach(model, read_adapter(adapter))
    reference = logits_of(model)
    return float(np.linalg.norm(candidate - reference) / np.linalg.norm(reference - start))


def test_a_graph_keeps_the_base_s_bits(base: Path, tmp_path: Path, cache: Path) -> None:
    adapter, out = put_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    outcome = export(adapter, base, out, "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert "`base` is quantized: its bits are kept" in outcome.stderr
    assert outcome.json["validation"]["ok"] is True
    assert outcome.json["options"]["precision"] == "keep"
    assert outcome.json["options"]["mode"] == "reflect"
    assert effect_error(run_graph(out / "model.onnx"), base, adapter) < EFFECT_ATOL
    products = [node for node in open_graph(out / "model.onnx").graph if node.op_type == "MatMulBnb4"]
    held: Any = [node.inputs[1] for node in products]
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    stored = [tensor.numpy().tobytes() for name, tensor in tensors.items() if tensor.dtype == torch.uint8]
    packed = [data for data in stored if not data.startswith(b"{")]
    assert len(packed) == 14
    assert sorted(value.const_value.numpy().tobytes() for value in held) == sorted(packed)
    assert json.loads((out / "hra_export_manifest.json").read_bytes())["rounding"] == "fp32"
    assert "quantization_config" not in json.loads((out / "config.json").read_bytes())
    judged = run("validate", adapter, "--base", base, "--candidate", out)
    assert judged.code == 0, judged.stdout + judged.stderr
    assert len(list((cache / "hra-export" / "bitsandbytes").iterdir())) == 1


def test_a_base_that_rounds_as_it_computes_is_judged_by_that(tmp_path: Path, cache: Path) -> None:
    """bitsandbytes has each weight of a bfloat16 model in bfloat16, a graph the product itself."""
    base = quantize(tmp_path, nested=True, dtype=torch.bfloat16)
    adapter, out = put_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    outcome = export(adapter, base, out, "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert outcome.json["validation"]["dtype"] == "bf16"
    assert any("rounds its weights to bfloat16" in note for note in outcome.json["notes"])
    assert json.loads((out / "hra_export_manifest.json").read_bytes())["rounding"] == "bf16"


def test_a_merged_graph_holds_the_dequantized_weights(base: Path, tmp_path: Path, cache: Path) -> None:
    adapter, out = put_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    outcome = export(adapter, base, out, "--precision", "fp32", "--mode", "merged", "--no-validate")
    assert outcome.code == 0, outcome.stderr
    assert not {node.op_type for node in open_graph(out / "model.onnx").graph} & {"MatMulBnb4", "MatMulNBits"}
    assert effect_error(run_graph(out / "model.onnx"), base, adapter) < EFFECT_ATOL


def test_half_precision_says_so_of_its_cache(base: Path, tmp_path: Path, cache: Path) -> None:
    adapter, out = put_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    outcome = export(adapter, base, out, "--provider", "cuda", "--no-validate")
    assert outcome.code == 0, outcome.stderr
    manifest = json.loads((out / "hra_export_manifest.json").read_bytes())
    ports = {port["name"]: port["dtype"] for port in manifest["graphs"][0]["inputs"]}
    assert ports["past_key_values.0.key"] == "float16"
    assert manifest["rounding"] == "fp16"


def test_a_generator_s_graph_keeps_the_bits_too(tmp_path: Path, cache: Path) -> None:
    """Built, not traced; run by ONNX Runtime and by its generator."""
    pytest.importorskip("onnxruntime_genai")
    base = quantize(tmp_path, vocabulary=259)
    write_tokenizer(base)
    adapter, out = put_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    outcome = export(adapter, base, out, "--runtime", "genai", "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert {each["runtime"] for each in outcome.json["validation"]["decodings"]} == {
        *("ONNX Runtime", "ONNX Runtime GenAI")
    }
    kinds = [node.op_type for node in open_graph(out / "model.onnx").graph]
    assert kinds.count("MatMulBnb4") == 14


def test_keeping_bits_and_folding_exclude_each_other(base: Path, tmp_path: Path, cache: Path) -> None:
    adapter, out = put_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    outcome = export(adapter, base, out, "--precision", "keep", "--mode", "merged")
    assert outcome.code == 2
    assert not out.exists()
    assert not cache.exists()


def test_a_damaged_base_ends_with_4_and_leaves_nothing(base: Path, tmp_path: Path, cache: Path) -> None:
    source = copied(base, tmp_path, DAMAGES["no absmax"])
    outcome = export(put_adapter(base, tmp_path / "adapter"), source, tmp_path / "out")
    assert outcome.code == 4, outcome.stderr
    assert f"{WEIGHT}.absmax" in outcome.stderr
    assert not (tmp_path / "out").exists()
    assert not cache.exists()


def test_llm_int8_is_refused_by_name(base: Path, tmp_path: Path, cache: Path) -> None:
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        base.parent / "float", quantization_config=settings, device_map="cpu", dtype=torch.float16
    )
    model.save_pretrained(tmp_path / "int8")
    outcome = export(put_adapter(base, tmp_path / "adapter"), tmp_path / "int8", tmp_path / "out")
    assert outcome.code == UnsupportedModelError.exit_code
    assert "LLM.int8" in outcome.stderr
    assert not (tmp_path / "out").exists()
    assert not cache.exists()


def test_merging_still_refuses_the_base(base: Path, tmp_path: Path, cache: Path) -> None:
    adapter = put_adapter(base, tmp_path / "adapter")
    outcome = run("merge", adapter, "--base", base, "-o", tmp_path / "merged")
    assert outcome.code == UnsupportedModelError.exit_code
    assert "is quantized (bitsandbytes)" in outcome.stderr
    judged = run("validate", adapter, "--base", base, "--candidate", base.parent / "float")
    assert judged.code == PARITY_FAILED
    assert "dequantiz" not in judged.stderr
    assert not (tmp_path / "merged").exists()
    assert not cache.exists()
