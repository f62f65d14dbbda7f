"""GGUF files against transformers' own loader, which dequantizes them in memory."""

import builtins
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hra_export.checkpoint import open_checkpoint
from hra_export.errors import CheckpointError, FormatError, HraExportError, OutputError, UnsupportedModelError
from hra_export.registry import load_converter
from hra_export.tensorfile import read_header
from tests.real_models import smollm2_gguf

from_gguf = load_converter("from_gguf")

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc"]
WIDTH, INNER, HEADS, KV_HEADS, EXPERTS = 64, 96, 4, 2, 3
EXPERT_INNER = 768  # transformers does not read it from the file, and takes Qwen3's own
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def layer_shapes(*, experts: bool) -> dict[str, tuple[int, ...]]:
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (KV_HEADS * head, WIDTH),
        "attn_v": (KV_HEADS * head, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
    }
    if not experts:
        return {**shapes, "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    up = (EXPERTS, EXPERT_INNER, WIDTH)
    stacked = {"ffn_gate_exps": up, "ffn_up_exps": up, "ffn_down_exps": (EXPERTS, WIDTH, EXPERT_INNER)}
    return {**shapes, "attn_q_norm": (head,), "attn_k_norm": (head,), "ffn_gate_inp": (EXPERTS, WIDTH), **stacked}


def add_metadata(writer: Any, *, experts: bool) -> None:
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    if experts:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_key_length(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_gguf(
    path: Path,
    matrices: Type = Type.Q8_0,
    *,
    types: Mapping[str, Type] | None = None,
    experts: bool = False,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    without: str = "",
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """A llama or qwen3moe model of one layer; vectors in F32, matrices in `matrices`, or as `types` says by name."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    add_metadata(writer, experts=experts)
    if prepare is not None:
        prepare(writer)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,), "output": (len(TOKENS), WIDTH)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer_shapes(experts=experts).items()}
    for name, shape in {**shapes, **(extra or {})}.items():
        if name != without:
            value = generator.standard_normal(shape, dtype=np.float32)
            kind = (types or {}).get(name, matrices if len(shape) > 1 else Type.F32)
            writer.add_tensor(f"{name}.weight", gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded_by_transformers(path: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return dict(model.state_dict())


def check_same(directory: Path, expected: Mapping[str, Tensor]) -> None:
    """Every tensor equal, none missing, none unused."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    got = model.state_dict()
    assert list(got) == list(expected)
    different = [name for name, value in expected.items() if not torch.equal(got[name], value)]
    assert different == []


def stored_dtypes(directory: Path) -> dict[str, str]:
    return {name: info.dtype for name, info in open_checkpoint(directory).tensors.items()}


@pytest.mark.parametrize("matrices", [Type.Q8_0, Type.Q4_1, Type.F16, Type.BF16, Type.F32])
def test_convert_keeps_every_value(tmp_path: Path, matrices: Type) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", matrices)
    report = from_gguf.convert(source, tmp_path / "out")
    check_same(tmp_path / "out", loaded_by_transformers(source))
    assert report.tensors == 12
    assert report.dequantized == (9 if matrices in (Type.Q8_0, Type.Q4_1) else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_convert_keeps_half_precision_and_widens_the_rest(tmp_path: Path) -> None:
    types = {"token_embd": Type.F16, "blk.0.attn_q": Type.BF16, "blk.0.attn_k": Type.Q8_0, "output_norm": Type.F16}
    source = write_gguf(tmp_path / "tiny.gguf", Type.F32, types=types)
    from_gguf.convert(source, tmp_path / "out")
    dtypes = stored_dtypes(tmp_path / "out")
    assert dtypes["model.embed_tokens.weight"] == "F16"
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == "BF16"
    assert dtypes["model.layers.0.self_attn.k_proj.weight"] == "F32"
    assert dtypes["model.norm.weight"] == "F32"
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == "float32"
    check_same(tmp_path / "out", loaded_by_transformers(source))


def test_convert_puts_stacked_experts_together(tmp_path: Path) -> None:
    """Gate and up are one parameter of the model and two tensors of the file."""
    source = write_gguf(tmp_path / "tiny.gguf", Type.Q8_0, experts=True)
    from_gguf.convert(source, tmp_path / "out")
    check_same(tmp_path / "out", loaded_by_transformers(source))


def test_convert_ties_a_head_that_the_file_lacks(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", without="output")
    from_gguf.convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored_dtypes(tmp_path / "out")
    check_same(tmp_path / "out", loaded_by_transformers(source))


def test_convert_writes_configuration_and_tokenizer(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    from_gguf.convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abcab").input_ids == expected("abcab").input_ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", TEMPLATE)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_bytes())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_convert_splits_into_shards(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    from_gguf.convert(source, tmp_path / "out", max_shard_bytes=50_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(info.size_bytes for info in read_header(shard).tensors.values()) <= 50_000 for shard in shards)
    check_same(tmp_path / "out", loaded_by_transformers(source))


def test_convert_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    for name in ("first", "second"):
        from_gguf.convert(source, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_convert_does_not_take_a_neighbours_tokenizer(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "wrong"}')
    (tmp_path / "config.json").write_text("{}")
    from_gguf.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_convert_reports_rope_frequencies_as_left_out(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", extra={"rope_freqs": (8,)})
    report = from_gguf.convert(source, tmp_path / "out")
    assert report.left_out == ("rope_freqs.weight",)
    assert "`rope_freqs.weight` is left out" in report.notes[1]


def test_convert_refuses_tensors_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", extra={"blk.0.attn_gate": (4, 64), "odd": (4,)})
    with pytest.raises(UnsupportedModelError) as caught:
        from_gguf.convert(source, tmp_path / "out")
    assert [finding.split(":")[0] for finding in caught.value.findings] == ["blk.0.attn_gate.weight", "odd.weight"]
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_file_without_all_parameters(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", without="blk.0.ffn_up")
    with pytest.raises(CheckpointError) as caught:
        from_gguf.convert(source, tmp_path / "out")
    assert caught.value.findings == ("model.layers.0.mlp.up_proj.weight: no tensor for it",)


def test_convert_refuses_shapes_that_the_metadata_do_not_have(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", extra={"blk.0.ffn_up": (INNER // 2, WIDTH)})
    with pytest.raises(CheckpointError) as caught:
        from_gguf.convert(source, tmp_path / "out")
    assert caught.value.findings == ("model.layers.0.mlp.up_proj.weight: expected shape (96, 64), got (48, 64)",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_convert_refuses_parts_of_a_split_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="one part of a split"):
        from_gguf.convert(write_gguf(tmp_path / "tiny-00001-of-00002.gguf"), tmp_path / "out")
    source = write_gguf(tmp_path / "tiny.gguf", prepare=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(UnsupportedModelError, match="one part of a split"):
        from_gguf.convert(source, tmp_path / "out")


def test_convert_refuses_an_architecture_that_transformers_does_not_map(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vision.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="holds a `clip` model"):
        from_gguf.convert(tmp_path / "vision.gguf", tmp_path / "out")


def test_convert_refuses_what_is_no_gguf_file(tmp_path: Path) -> None:
    for name, content in (("empty.gguf", b""), ("text.gguf", b"hello, this is no model")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match="is not a GGUF file"):
            from_gguf.convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(OutputError, match="cannot read"):
        from_gguf.convert(tmp_path / "absent.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a regular file"):
        from_gguf.convert(tmp_path, tmp_path / "out")


def test_convert_refuses_truncated_files_and_writes_nothing(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    source = tmp_path / "cut.gguf"
    for length in [8, 20, 30, *range(100, len(whole), len(whole) // 12), len(whole) - 64]:
        source.write_bytes(whole[:length])
        with pytest.raises((FormatError, CheckpointError)):
            from_gguf.convert(source, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "whole.gguf"]


def test_convert_ends_damaged_headers_with_an_error_of_ours(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "whole.gguf").read_bytes())
    generator = np.random.default_rng(1)
    source = tmp_path / "bent.gguf"
    for position in generator.integers(4, 1500, 25):
        bent = whole.copy()
        bent[position] ^= int(generator.integers(1, 256))
        source.write_bytes(bent)
        try:
            from_gguf.convert(source, tmp_path / "out", overwrite=True)
        except HraExportError:
            continue
        shutil.rmtree(tmp_path / "out")


def test_convert_says_how_to_install_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    real = builtins.__import__

    def without_gguf(name: str, *rest: Any, **named: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(UnsupportedModelError) as caught:
        from_gguf.convert(source, tmp_path / "out")
    assert caught.value.hint == "pip install 'hra-export[gguf]'"


def test_convert_keeps_an_output_that_exists(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError):
        from_gguf.convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_cache_name_changes_with_the_file(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF")
    (tmp_path / "link.gguf").symlink_to(source)
    first = from_gguf.cache_name(source)
    assert first.startswith("tiny-")
    assert from_gguf.cache_name(tmp_path / "link.gguf") == first
    os.utime(source, ns=(0, 1))
    assert from_gguf.cache_name(source) != first


@pytest.mark.real
@pytest.mark.slow
def test_convert_keeps_every_value_of_smollm2(tmp_path: Path) -> None:
    source = smollm2_gguf()
    report = from_gguf.convert(source, tmp_path / "out")
    assert (report.tensors, report.dequantized, report.left_out) == (272, 211, ())
    check_same(tmp_path / "out", loaded_by_transformers(source))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    conversation = [{"role": "user", "content": "What is a Householder reflection?"}]
    templated = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert templated == expected.apply_chat_template(conversation, tokenize=False)
    assert tokenizer(templated).input_ids == expected(templated).input_ids
