"""Layout against transformers itself: tiny models that it saves and loads, every parameter put together again."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import conversion_mapping, core_model_loading

from hra_export.architecture import SCALED_HEAD_MODEL_TYPES, input_axis
from hra_export.conversions import assemble, convert, read_names
from hra_export.errors import CheckpointError, UnsupportedModelError
from hra_export.layout import (
    CONV1D_MODEL_TYPES,
    Layout,
    Region,
    load_class,
    may_have_conv1d,
    read_layout,
    runtime_location,
    runtime_locations,
)
from hra_export.pieces import concatenate, deinterleave, regions_of, take, whole

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
}
LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
GPT_OSS = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
LLAMA4 = {**LLAMA, "num_local_experts": 3, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1}
EXPERTS = {**LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTRAL = {**LLAMA, "num_local_experts": 3}
QWEN_VL_MOE = {
    "text_config": {**EXPERTS, "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default"}},
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    },
}
ERNIE_VL = {
    "text_config": {
        **LLAMA,
        "moe_num_experts": 2,
        "moe_k": 1,
        "moe_intermediate_size": [24, 16],
        "mlp_layer_types": ["sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 4},
}
LLAVA = {
    "text_config": {**LLAMA, "model_type": "llama"},
    "vision_config": {**VISION, "model_type": "clip_vision_model"},
}

# (class, config arguments): what each shows stands beside it
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),  # no difference at all
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),  # Conv1D, tied
    "vit": ("ViTForImageClassification", VISION),  # renamed
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),  # renamed head
    "bert": ("BertForMaskedLM", TEXT),  # tied weight and bias
    "llava": ("LlavaForConditionalGeneration", LLAVA),  # prefixes
    "mixtral": ("MixtralForCausalLM", MIXTRAL),  # experts stacked, renamed
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),  # experts stacked
    "dinov2": ("Dinov2Model", {**VISION, "use_swiglu_ffn": True}),  # gate and up split
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", QWEN_VL_MOE),  # transposed when the shape says so
    "ernie_vl": ("Ernie4_5_VLMoeForConditionalGeneration", ERNIE_VL),  # text and vision experts in one list
    "gpt_oss": ("GptOssForCausalLM", GPT_OSS),  # experts (E, in, out), flagged
    "llama4": ("Llama4ForCausalLM", LLAMA4),  # experts (E, in, out), not flagged
    "t5": ("T5ForConditionalGeneration", T5),  # three ties
}


def build(name: str, cls: str | None = None, **overrides: Any) -> Any:
    """A random model, the same each time."""
    kind, arguments = MODELS[name]
    model_class = getattr(transformers, cls or kind)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**{**arguments, **overrides})).eval()


def save(model: Any, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors as transformers writes them."""
    model.save_pretrained(folder, **options)
    return json.loads((folder / "config.json").read_text()), safetensors.torch.load_file(folder / "model.safetensors")


def open_layout(config: dict[str, Any], disk: dict[str, Tensor], **options: Any) -> Layout:
    """The layout of tensors in memory."""
    return read_layout(config, {name: tuple(value.shape) for name, value in disk.items()}, **options)


def held(region: Region, disk: dict[str, Tensor]) -> Tensor:
    """What a region holds."""
    return disk[region.tensor][tuple(slice(*span) for span in region.index)]


def check_parameters(model: Any, layout: Layout, disk: dict[str, Tensor]) -> int:
    """Every parameter's regions hold exactly its values; the number of parameters that are on disk."""
    found = 0
    for name, value in model.state_dict().items():
        regions = layout.regions(name)
        found += bool(regions)
        for region in regions:
            assert torch.equal(region.part(value), held(region, disk)), (name, region)
        if regions:
            assert sum(held(region, disk).numel() for region in regions) == value.numel(), name
        else:
            source = layout.tied_source(name)
            assert source is not None, name
            assert torch.equal(disk[source], value), name
    return found


@pytest.mark.parametrize("name", MODELS)
def test_regions_hold_every_parameter(name: str, tmp_path: Path) -> None:
    config, disk = save(build(name), tmp_path)
    model = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path)
    assert check_parameters(model, open_layout(config, disk), disk) > 0


@pytest.mark.parametrize("name", ["vit", "mixtral", "qwen3_moe", "dinov2"])
def test_regions_hold_every_parameter_when_runtime_names_were_saved(name: str, tmp_path: Path) -> None:
    model = build(name)
    config, disk = save(model, tmp_path, save_original_format=False)
    assert set(disk) == set(model.state_dict())
    assert check_parameters(model, open_layout(config, disk), disk) == len(disk)


@pytest.mark.parametrize("name", ["vit", "gpt_neox", "llava", "mixtral", "qwen3_moe", "dinov2", "ernie_vl"])
def test_regions_and_locations_find_every_legacy_name(name: str, tmp_path: Path) -> None:
    """An adapter trained with transformers 4 over a checkpoint saved with `save_original_format=False`, or live."""
    model = build(name)
    _, original = save(model, tmp_path / "original")
    config, disk = save(model, tmp_path / "new", save_original_format=False)
    layout = open_layout(config, disk)
    live = model.state_dict()
    assert not set(original) <= set(disk)
    for legacy, value in original.items():
        regions, locations = layout.regions(legacy), runtime_locations(model, legacy)
        assert sum(held(region, disk).numel() for region in regions) == value.numel(), legacy
        assert all(torch.equal(region.part(value), held(region, disk)) for region in regions), legacy
        values = torch.cat([live[location.parameter][location.index].flatten() for location in locations])
        assert torch.equal(values.sort().values, value.flatten().sort().values), legacy  # some lie transposed


@pytest.mark.parametrize(
    ("name", "legacy", "tensor"),
    [
        (
            "llava",
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        ("vit", "encoder.layer.0.intermediate.dense.weight", "vit.layers.0.mlp.fc1.weight"),
        ("mixtral", "layers.0.block_sparse_moe.experts.2.w1.weight", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_regions_find_names_with_another_prefix(name: str, legacy: str, tensor: str, tmp_path: Path) -> None:
    config, disk = save(build(name), tmp_path, save_original_format=False)
    (region,) = open_layout(config, disk).regions(legacy)
    assert region.tensor == tensor


def test_regions_of_a_legacy_expert_are_rows_of_the_stack(tmp_path: Path) -> None:
    config, disk = save(build("qwen3_moe"), tmp_path, save_original_format=False)
    (region,) = open_layout(config, disk).regions("model.layers.0.mlp.experts.1.up_proj.weight")
    assert (region.tensor, region.input_axis) == ("model.layers.0.mlp.experts.gate_up_proj", 2)
    assert region.index == ((1, 2), (24, 48), (0, 32))


def test_regions_of_stacked_experts_are_all_experts_on_disk(tmp_path: Path) -> None:
    config, disk = save(build("mixtral"), tmp_path)
    regions = open_layout(config, disk).regions("model.layers.0.mlp.experts.gate_up_proj")
    assert [region.tensor.split("experts.")[1] for region in regions] == [
        *(f"{expert}.w1.weight" for expert in range(3)),
        *(f"{expert}.w3.weight" for expert in range(3)),
    ]
    assert {region.input_axis for region in regions} == {1}


def test_regions_accept_a_stack_named_as_a_module(tmp_path: Path) -> None:
    config, disk = save(build("gpt_oss"), tmp_path)
    (region,) = open_layout(config, disk).regions("model.layers.0.mlp.experts.down_proj.weight")
    assert region.tensor == "model.layers.0.mlp.experts.down_proj"


def test_regions_split_a_fused_tensor_by_rows(tmp_path: Path) -> None:
    config, disk = save(build("dinov2"), tmp_path)
    layout = open_layout(config, disk)
    gate, up = (layout.regions(f"encoder.layer.0.mlp.{part}_proj.weight")[0] for part in ("gate", "up"))
    assert gate.tensor == up.tensor == "encoder.layer.0.mlp.weights_in.weight"
    assert gate.index[0][1] == up.index[0][0]


def test_regions_keep_separate_tensors_of_a_fused_name(tmp_path: Path) -> None:
    """An adapter on the fused projection, over a checkpoint that has its parts."""
    config, disk = save(build("dinov2"), tmp_path, save_original_format=False)
    regions = open_layout(config, disk).regions("encoder.layer.0.mlp.weights_in.weight")
    assert [region.tensor.rpartition("mlp.")[2] for region in regions] == ["gate_proj.weight", "up_proj.weight"]
    assert regions[1].rows is not None
    assert regions[0].rows == (0, regions[1].rows[0])


@pytest.mark.parametrize(
    ("name", "parameter", "axis"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", 1),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", 0),
        ("gpt2", "transformer.wte.weight", 1),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight", 1),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", 1),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", 1),
        ("llama4", "model.layers.0.feed_forward.experts.gate_up_proj", 1),
        ("llama4", "model.layers.0.feed_forward.experts.down_proj", 1),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", 1),
    ],
)
def test_regions_know_the_input_axis(name: str, parameter: str, axis: int, tmp_path: Path) -> None:
    config, disk = save(build(name), tmp_path)
    assert {region.input_axis for region in open_layout(config, disk).regions(parameter)} == {axis}


@pytest.mark.parametrize(
    ("shapes", "attributes", "axis"),
    [
        ({"gate_up_proj": (3, 48, 32), "down_proj": (3, 32, 24)}, {}, 2),
        ({"gate_up_proj": (3, 32, 48), "down_proj": (3, 24, 32)}, {}, 1),
        ({"gate_up_proj": (3, 32, 32), "down_proj": (3, 32, 16)}, {}, 2),
        ({"gate_up_proj": (3, 32, 32), "down_proj": (3, 16, 32)}, {}, 1),
        ({"up_proj": (3, 32, 32), "down_proj": (3, 32, 32)}, {}, None),
        ({"up_proj": (3, 32, 32)}, {"is_transposed": True}, 1),
        ({"up_proj": (3, 32, 32)}, {"is_transposed": False}, 2),
        ({"weight": (3, 32, 32)}, {"input_size": 32, "output_size": 32}, 2),
        ({"w2": (96, 32)}, {}, None),
    ],
)
def test_input_axis_of_stacked_experts(
    shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any], axis: int | None
) -> None:
    """From a flag or from the sizes; None rather than a guess."""
    experts = torch.nn.Module()
    for name, shape in shapes.items():
        experts.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))
    for name, value in attributes.items():
        setattr(experts, name, value)
    model = torch.nn.ModuleDict({"experts": experts})
    assert {input_axis(model, f"experts.{name}", shape) for name, shape in shapes.items()} == {axis}


def test_regions_follow_a_transposed_stack(tmp_path: Path) -> None:
    """Qwen3-VL-MoE is published with experts (E, in, out), which transformers transposes on load."""
    config, disk = save(build("qwen3_vl_moe"), tmp_path)
    names = [name for name in disk if re.search(r"experts\.(gate_up|down)_proj$", name)]
    flipped = {name: value.transpose(1, 2).contiguous() if name in names else value for name, value in disk.items()}
    safetensors.torch.save_file(flipped, tmp_path / "model.safetensors", {"format": "pt"})
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
    layout = open_layout(config, flipped)
    check_parameters(model, layout, flipped)
    assert names
    assert {layout.regions(name)[0].input_axis for name in names} == {1}


def test_regions_of_a_vector_have_no_input_axis(tmp_path: Path) -> None:
    config, disk = save(build("bert"), tmp_path)
    (region,) = open_layout(config, disk).regions("bert.encoder.layer.0.output.dense.bias")
    with pytest.raises(UnsupportedModelError, match="cannot be told"):
        _ = region.input_axis


@pytest.mark.parametrize(
    ("saved", "options", "parameter", "tensor"),
    [
        (
            "BertModel",
            {"task": "SEQ_CLS"},
            "bert.encoder.layer.0.output.dense.weight",
            "encoder.layer.0.output.dense.weight",
        ),
        (
            "BertModel",
            {"model_class": "BertForTokenClassification"},
            "bert.encoder.layer.1.attention.self.query.bias",
            "encoder.layer.1.attention.self.query.bias",
        ),
        (
            "BertForMaskedLM",
            {"task": "FEATURE_EXTRACTION"},
            "encoder.layer.0.output.dense.weight",
            "bert.encoder.layer.0.output.dense.weight",
        ),
        ("BertForMaskedLM", {}, "encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"),
        ("BertModel", {}, "bert.pooler.dense.weight", "pooler.dense.weight"),
    ],
)
def test_regions_add_and_drop_the_base_prefix(
    saved: str, options: dict[str, str], parameter: str, tensor: str, tmp_path: Path
) -> None:
    config, disk = save(build("bert", saved), tmp_path)
    assert parameter not in disk
    (region,) = open_layout(config, disk, **options).regions(parameter)
    assert (region.tensor, region.input_axis if disk[tensor].ndim > 1 else 1) == (tensor, 1)


def test_regions_are_empty_for_unknown_and_absent_parameters(tmp_path: Path) -> None:
    config, disk = save(build("bert", "BertModel"), tmp_path)
    layout = open_layout(config, disk, task="SEQ_CLS")
    assert layout.regions("bert.encoder.layer.7.output.dense.weight") == ()
    assert layout.regions("classifier.weight") == ()


def test_regions_of_a_resized_vocabulary_have_the_disk_shape(tmp_path: Path) -> None:
    config, disk = save(build("gpt_neox"), tmp_path)
    disk["embed_out.weight"] = torch.zeros(70, 32)
    (region,) = open_layout(config, disk).regions("lm_head.weight")
    assert region.index == ((0, 70), (0, 32))


def test_regions_refuse_an_incomplete_stack(tmp_path: Path) -> None:
    config, disk = save(build("qwen3_moe"), tmp_path)
    del disk["model.layers.0.mlp.experts.2.up_proj.weight"]
    layout = open_layout(config, disk)
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj"):
        layout.regions("model.layers.0.mlp.experts.gate_up_proj")


def test_regions_are_empty_without_a_model_type() -> None:
    assert read_layout({"_class_name": "UNet2DConditionModel"}, {"w": (2, 2)}).regions("layer.weight") == ()


def test_regions_refuse_an_unknown_model_type() -> None:
    layout = read_layout({"model_type": "no-such-model", "auto_map": {"AutoModel": "evil.Model"}}, {"w": (2, 2)})
    with pytest.raises(UnsupportedModelError, match="no-such-model") as caught:
        layout.regions("layer.weight")
    assert caught.value.hint is not None


def test_layout_never_takes_other_attributes_of_transformers_for_classes(tmp_path: Path) -> None:
    config, disk = save(build("llama"), tmp_path)
    layout = open_layout(config, disk, model_class="pipeline")
    assert layout.regions("model.layers.0.mlp.up_proj.weight")


def radio_like(operations: list[Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A Llama whose attention is stored fused, through the given operations."""
    model = build("llama", num_key_value_heads=2)
    names = read_names(model)
    converter = core_model_loading.WeightConverter(
        "self_attn.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], operations
    )
    names.converters.append(converter)
    return names, {"model.layers.0.self_attn.qkv.weight": (96, 32)}


@pytest.mark.parametrize(
    "operations",
    [
        [core_model_loading.Chunk(dim=0)],
        [core_model_loading.Split(dim=0)],
        [core_model_loading.Chunk(dim=0), core_model_loading.PermuteForRope(permute_layer_names=["q_proj", "k_proj"])],
        [core_model_loading.Interleave(dim=0), core_model_loading.Chunk(dim=0)],
        [core_model_loading.Transpose(0, 1), core_model_loading.Chunk(dim=0)],
    ],
    ids=lambda operations: "-".join(type(operation).__name__ for operation in operations),
)
def test_convert_does_what_transformers_does(operations: list[Any]) -> None:
    names, stored = radio_like(operations)
    key = next(iter(stored))
    if isinstance(operations[0], core_model_loading.Transpose):
        stored = {key: (32, 96)}
    value = torch.arange(96 * 32).reshape(stored[key])
    blocks, errors = assemble(names, stored)
    converter = names.converters[-1]
    renamed, pattern = names.rename(key)
    converter.add_tensor(renamed, key, pattern, value)
    expected = converter.convert(renamed, model=names.model, config=names.model.config)
    assert not errors
    for name, made in expected.items():
        for piece in blocks[name].pieces:
            stored_part = value[tuple(slice(span.start, span.stop, span.step) for span in piece.index)]
            assert torch.equal(piece.select(made), stored_part)


@pytest.mark.parametrize("inverse", [False, True])
def test_convert_undoes_a_rope_permutation(inverse: bool) -> None:
    """A legacy fused name over a model that has split and permuted it."""
    permute = core_model_loading.PermuteForRope(permute_layer_names=["q_proj", "k_proj"], inverse=inverse)
    names, _ = radio_like([core_model_loading.Chunk(dim=0), permute])
    block = names.locate("model.layers.0.self_attn.qkv.weight")
    assert block is not None
    value = torch.arange(96 * 32).reshape(96, 32)
    converter = names.converters[-1]
    renamed, pattern = names.rename("model.layers.0.self_attn.qkv.weight")
    converter.add_tensor(renamed, "fused", pattern, value)
    made = converter.convert(renamed, model=names.model, config=names.model.config)
    for piece in block.pieces:
        part = made[piece.tensor][tuple(slice(span.start, span.stop, span.step) for span in piece.index)]
        assert torch.equal(piece.select(value), part)


class Scramble(core_model_loading.ConversionOps):  # type: ignore[misc]  # transformers is not followed
    """An operation of some later transformers."""

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Do nothing."""
        return input_dict


def test_regions_refuse_an_unknown_operation_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, disk = save(build("qwen3_moe"), tmp_path)
    original = conversion_mapping.get_model_conversion_mapping

    def scrambled(model: Any, **options: Any) -> list[Any]:
        rules = original(model, **options)
        for rule in rules:
            if isinstance(rule, core_model_loading.WeightConverter):
                rule.operations.append(Scramble())
        return rules

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", scrambled)
    layout = open_layout(config, disk)
    with pytest.raises(UnsupportedModelError, match=r"experts\.down_proj.*Scramble"):
        layout.regions("model.layers.0.mlp.experts.down_proj")
    assert layout.regions("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("operation", "reason"),
    [(core_model_loading.Interleave(dim=1), "rearranged"), (core_model_loading.Interleave(dim=0), None)],
)
def test_regions_refuse_rearranged_columns_not_rows(
    operation: Any, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, disk = save(build("llama"), tmp_path)
    converter = core_model_loading.WeightConverter("mlp.up_proj", "mlp.up_proj", [operation])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [converter])
    layout = open_layout(config, disk)
    name = "model.layers.0.mlp.up_proj.weight"
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            layout.regions(name)
        return
    (region,) = layout.regions(name)
    assert region.index == ((0, 48), (0, 32))
    value = disk[name]
    loaded = value.reshape(24, 2, 32).transpose(0, 1).reshape(48, 32)
    assert torch.equal(region.part(loaded), value)


def test_regions_refuse_rows_that_alternate_with_another_layer() -> None:
    names, stored = radio_like([core_model_loading.Interleave(dim=0), core_model_loading.Chunk(dim=0)])
    blocks, _ = assemble(names, stored)
    with pytest.raises(UnsupportedModelError, match="alternates"):
        regions_of("q_proj", blocks["model.layers.0.self_attn.q_proj.weight"], 1)


@pytest.mark.parametrize(
    ("name", "parameter", "source"),
    [
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("gpt2", "transformer.wte.weight", "transformer.wte.weight"),
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("t5", "decoder.embed_tokens.weight", "shared.weight"),
        ("llama", "lm_head.weight", None),
        ("bert", "bert.pooler.dense.weight", None),
    ],
)
def test_tied_source(name: str, parameter: str, source: str | None, tmp_path: Path) -> None:
    config, disk = save(build(name), tmp_path)
    assert open_layout(config, disk).tied_source(parameter) == source


def test_tied_source_is_the_tensor_that_exists(tmp_path: Path) -> None:
    """Some checkpoints hold the head and not the embedding it is tied to; transformers swaps them."""
    config, disk = save(build("gpt2"), tmp_path)
    disk["lm_head.weight"] = disk.pop("transformer.wte.weight")
    assert open_layout(config, disk).tied_source("transformer.wte.weight") == "lm_head.weight"


UNTIED: list[tuple[str, dict[str, Any], str]] = [
    ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, "lm_head.weight"),
    ("GPT2LMHeadModel", MODELS["gpt2"][1], "lm_head.weight"),
    ("BertForMaskedLM", TEXT, "cls.predictions.decoder.weight"),
    ("BartForConditionalGeneration", {"d_model": 32, "vocab_size": 64, "pad_token_id": 1}, "lm_head.weight"),
    ("T5ForConditionalGeneration", T5, "lm_head.weight"),
    ("LongT5ForConditionalGeneration", T5, "lm_head.weight"),
    ("MT5ForConditionalGeneration", T5, "lm_head.weight"),
    ("UMT5ForConditionalGeneration", T5, "lm_head.weight"),
    ("SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 2}, "lm_head.weight"),
]
BART = {
    f"{side}_{part}": n
    for side in ("encoder", "decoder")
    for part, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))
}


@pytest.mark.parametrize(("cls", "arguments", "head"), UNTIED, ids=[case[0] for case in UNTIED])
def test_untying_changes_the_head_and_nothing_else(
    cls: str, arguments: dict[str, Any], head: str, tmp_path: Path
) -> None:
    """The head rotated alone: logits of a model whose input to the head was rotated the other way."""
    model_class = getattr(transformers, cls)
    extra = {**BART, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2} if "Bart" in cls else {}
    torch.manual_seed(0)
    config, disk = save(model_class(model_class.config_class(**arguments, **extra)).eval(), tmp_path)
    model = model_class.from_pretrained(tmp_path)
    layout = open_layout(config, disk)
    source = layout.tied_source(head)
    assert source is not None
    assert head not in disk
    new = {**disk, layout.new_name(head): disk[source] * 1.5}
    new |= {name: disk[copied].clone() for name, copied in layout.tied_partners(head).items()}
    safetensors.torch.save_file(new, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, **layout.untied_config_changes()}))
    untied, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    tokens = torch.arange(5)[None]
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}
    bias = model(**inputs).logits.new_zeros(()) if cls != "BertForMaskedLM" else model.cls.predictions.bias
    expected = (model(**inputs).logits - bias) * 1.5 + bias
    torch.testing.assert_close(untied(**inputs).logits, expected)


def test_tied_partners_are_only_what_untying_loses(tmp_path: Path) -> None:
    config, disk = save(build("bert"), tmp_path / "bert")
    layout = open_layout(config, disk)
    assert layout.tied_partners("cls.predictions.decoder.weight") == {
        "cls.predictions.decoder.bias": "cls.predictions.bias"
    }
    assert set(layout.tied_partners("bert.embeddings.word_embeddings.weight")) == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    config, disk = save(build("t5"), tmp_path / "t5")
    assert open_layout(config, disk).tied_partners("lm_head.weight") == {}


def test_untied_config_changes_reach_nested_configs() -> None:
    config = {"model_type": "llava", "text_config": {"vocab_size": 64, "tie_word_embeddings": True}}
    assert read_layout(config, {}).untied_config_changes() == {
        "tie_word_embeddings": False,
        "text_config": {"vocab_size": 64, "tie_word_embeddings": False},
    }


def test_scaled_head_model_types_are_all_that_transformers_has() -> None:
    """The table is compared with the forward passes of the installed transformers."""
    models = Path(transformers.__file__).parent / "models"
    scaled = r"if self\.config\.(scale_decoder_outputs|tie_word_embeddings):\n(\s+#.*\n)*\s+\w+ = \w+ \* \("
    found = {path.parent.name for path in models.glob("*/modeling_*.py") if re.search(scaled, path.read_text("utf-8"))}
    assert found == SCALED_HEAD_MODEL_TYPES


def test_conv1d_model_types_are_all_that_transformers_has() -> None:
    """The table is compared with the modeling files of the installed transformers."""
    models = Path(transformers.__file__).parent / "models"
    folders = {
        path.parent.name for path in models.glob("*/modeling_*.py") if re.search(r"\bConv1D\(", path.read_text("utf-8"))
    }
    found = set()
    for kind, config in transformers.CONFIG_MAPPING.items():
        if config.__module__.split(".")[2] in folders:
            found.add(kind)
    assert found - {"clvp_encoder"} == CONV1D_MODEL_TYPES


def test_may_have_conv1d_looks_into_nested_configs() -> None:
    assert may_have_conv1d({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}})
    assert not may_have_conv1d({"model_type": "llama", "rope_scaling": {"type": "linear"}})


def test_is_transposed_and_conv_groups(tmp_path: Path) -> None:
    config, disk = save(build("gpt2"), tmp_path / "gpt2")
    layout = open_layout(config, disk)
    assert layout.is_transposed("transformer.h.0.attn.c_attn")
    assert not layout.is_transposed("lm_head")
    assert layout.conv_groups("lm_head") == 1
    conv: dict[str, Any] = {"conv_dim": [32], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1}
    model = transformers.HubertModel(
        transformers.HubertConfig(**TEXT, **conv, num_conv_pos_embedding_groups=2, conv_pos_batch_norm=True)
    )
    config, disk = save(model, tmp_path / "hubert")
    assert open_layout(config, disk).conv_groups("encoder.pos_conv_embed.conv") == 2


def test_head_config_changes_name_class_and_labels(tmp_path: Path) -> None:
    config, disk = save(build("bert", "BertModel"), tmp_path)
    changes = open_layout(config, disk, task="SEQ_CLS").head_config_changes("classifier.weight", (3, 32))
    assert changes["architectures"] == ["BertForSequenceClassification"]
    assert changes["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    merged = {**disk, "classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    safetensors.torch.save_file(merged, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    cls: Any = transformers.BertForSequenceClassification
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.classifier.weight, torch.ones(3, 32))


def test_new_name_follows_the_style_of_the_disk(tmp_path: Path) -> None:
    for original in (True, False):
        config, disk = save(build("vit"), tmp_path / str(original), save_original_format=original)
        name = "vit.layers.1.attention.q_proj.weight"
        regions = open_layout(config, disk).regions(name)
        disk.pop(regions[0].tensor)
        assert open_layout(config, disk).new_name(name) == regions[0].tensor


@pytest.mark.parametrize(
    ("name", "legacy", "parameter", "index"),
    [
        (
            "vit",
            "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight",
            ((0, 32), (0, 32)),
        ),
        ("vit", "vit.layers.0.attention.q_proj.weight", "vit.layers.0.attention.q_proj.weight", ((0, 32), (0, 32))),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.2.w3.weight",
            "model.layers.1.mlp.experts.gate_up_proj",
            ((2, 3), (48, 96), (0, 32)),
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.0.down_proj.weight",
            "model.layers.0.mlp.experts.down_proj",
            ((0, 1), (0, 32), (0, 24)),
        ),
        ("bert", "encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight", ((0, 32), (0, 48))),
    ],
)
def test_runtime_location(name: str, legacy: str, parameter: str, index: tuple[tuple[int, int], ...]) -> None:
    model = build(name)
    location = runtime_location(model, legacy)
    assert location is not None
    assert location.parameter == parameter
    assert location.index == tuple(slice(*span) for span in index)
    assert location.input_axis == len(index) - 1
    assert location.is_whole == (not parameter.endswith("_proj"))


def test_runtime_location_of_unknown_and_spread_parameters() -> None:
    model = build("dinov2")
    assert runtime_location(model, "no.such.weight") is None
    with pytest.raises(UnsupportedModelError, match="spread over"):
        runtime_location(model, "encoder.layer.0.mlp.weights_in.weight")
    assert len(runtime_locations(model, "encoder.layer.0.mlp.weights_in.weight")) == 2


def test_runtime_location_in_a_plain_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(2, 4, 1))
    location = runtime_location(model, "1.weight")
    assert location is not None
    assert (location.parameter, location.input_axis, location.is_whole) == ("1.weight", 1, True)
    assert runtime_location(model, "2.weight") is None


def test_load_class() -> None:
    assert load_class({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}) is transformers.LlamaForCausalLM
    assert load_class({"model_type": "bert"}) is transformers.AutoModel
    for config in ({"model_type": "nope"}, {"model_type": "llama", "architectures": ["pipeline"]}):
        with pytest.raises(UnsupportedModelError):
            load_class(config)


def test_take_and_concatenate_agree_with_indexing() -> None:
    block = concatenate([whole("a", (5, 2)), whole("b", (4, 2))], 0)
    value = torch.arange(18).reshape(9, 2)
    stored = {"a": value[:5], "b": value[5:]}
    for wanted in (range(2, 8), range(1, 9, 3), range(8, 9), range(0, 9, 2)):
        taken = take(block, 0, wanted)
        expected = value[wanted.start : wanted.stop : wanted.step]
        assert taken.shape == tuple(expected.shape)
        for piece in taken.pieces:
            part = stored[piece.tensor][tuple(slice(span.start, span.stop, span.step) for span in piece.index)]
            assert torch.equal(piece.select(expected), part)
    twice = deinterleave(deinterleave(whole("a", (6,)), 0), 0, inverse=True)
    order = [0] * 6
    for piece in twice.pieces:
        for position, entry in zip(piece.place[0], piece.index[0], strict=True):
            order[position] = entry
    assert order == list(range(6))


def test_convert_reports_tensors_that_do_not_fit() -> None:
    converter = core_model_loading.WeightConverter(["a", "b"], "c", [core_model_loading.Concatenate(dim=0)])
    with pytest.raises(CheckpointError, match="cannot concatenate"):
        convert(converter, {"a": [whole("x", (2, 3))], "b": [whole("y", (2, 4))]}, "c", None)


def test_importing_layout_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, hra_export.layout; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
