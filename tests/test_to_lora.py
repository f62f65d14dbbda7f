"""LoRA files as they lie on the disk: ΔW against the explicit chain in float64, readers' rules, refusals."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hra_export import householder, publish
from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.checkpoint import MANIFEST_NAME, open_checkpoint
from hra_export.converted import ConvertReport
from hra_export.errors import (
    AdapterError,
    ConversionError,
    HraExportError,
    MismatchError,
    NumericalError,
    OutputError,
    UnsupportedModelError,
)
from hra_export.lora import layout as lora_layout
from hra_export.low_rank import HraSource
from hra_export.registry import load_converter
from tests import synthetic

RANK = 4
LAYERS = 2
# Relative error of ΔW: balanced factors are rounded once, by half a unit in the last place of each element at most.
DELTA = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 5e-3}
# The fields of PEFT 0.12's LoraConfig, which refuses any other.
PEFT_FIELDS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}
UNET = {"_class_name": "UNet2DConditionModel"}


def pairs(d: int, rank: int = RANK, *, angle: float = 0.05, seed: int = 0) -> Tensor:
    """Vectors in pairs that enclose about `angle`."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.nn.functional.normalize(torch.randn(d, rank // 2, generator=generator), dim=0)
    turn = angle * torch.nn.functional.normalize(torch.randn(d, rank // 2, generator=generator), dim=0)
    return torch.stack([first, first + turn], dim=2).reshape(d, rank)


def llama(folder: Path, *, dtype: str = "F32", **config: object) -> Path:
    return synthetic.write_base(
        folder / "base", synthetic.toy_tensors(dtype=dtype), config={**synthetic.llama_config(), **config}
    )


def llama_adapter(*ends: str, rank: int = RANK, **fields: Any) -> HraAdapter:
    chains = {
        m: pairs(d, rank, seed=i) for i, (m, d) in enumerate(synthetic.linear_modules().items()) if m.endswith(ends)
    }
    return HraAdapter(chains, rank=rank, **fields)


def plain_base(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, object] | None = None) -> Path:
    """A base without a model class: modules are what its names say."""
    (folder / "base").mkdir()
    save_file(tensors, folder / "base" / "model.safetensors")
    if config is not None:
        synthetic.write_json(folder / "base" / "config.json", config)
    return folder / "base"


def convert(folder: Path, *adapters: HraAdapter, strength: float = 1.0, **options: Any) -> ConvertReport:
    report: ConvertReport = load_converter("to_lora").convert(
        HraSource(adapters, strength=strength), folder / "lora", base=open_checkpoint(folder / "base"), **options
    )
    return report


def config_of(folder: Path) -> Any:
    return json.loads((folder / "lora" / "adapter_config.json").read_text())


def factors(folder: Path, module: str) -> tuple[Tensor, Tensor]:
    """B and A of a target, float64."""
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    stem = f"base_model.model.{module}"
    return tensors[f"{stem}.lora_B.weight"].double(), tensors[f"{stem}.lora_A.weight"].double()


def explicit_delta(weight: Tensor, adapter: HraAdapter, module: str) -> Tensor:
    """W (H_1 H_2 … − I), one dense reflection after the other."""
    chain = synthetic.dense_chain(adapter.chains[module].double().numpy())
    return weight.double() @ torch.from_numpy(chain - np.eye(len(chain)))


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("dtype", DELTA)
def test_factors_are_the_explicit_chain_at_every_angle(dtype: str, angle: float, tmp_path: Path) -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    plain_base(tmp_path, {"block.proj.weight": weight})
    adapter = HraAdapter({"block.proj": pairs(32, angle=angle)}, rank=RANK)
    report = convert(tmp_path, adapter, dtype=dtype)
    b, a = factors(tmp_path, "block.proj")
    exact = explicit_delta(weight, adapter, "block.proj")
    error = float((b @ a - exact).norm() / exact.norm())
    assert error < DELTA[dtype]
    assert report.error == pytest.approx(error, rel=0.01)
    assert report.delta_norm == pytest.approx(float(exact.norm()), rel=1e-9)


def test_naive_factors_in_bfloat16_are_what_balancing_avoids(tmp_path: Path) -> None:
    """Without this difference the test above would prove nothing about half factors."""
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    adapter = HraAdapter({"proj": pairs(32, angle=0.005)}, rank=RANK)
    b, a = householder.low_rank_factors(weight.double(), adapter.reflector("proj"))
    exact = explicit_delta(weight, adapter, "proj")
    naive = b.bfloat16().double() @ a.bfloat16().double()
    assert float((naive - exact).norm() / exact.norm()) > 10 * DELTA["bfloat16"]


def test_a_convolution_has_its_kernel_in_a_and_a_point_in_b(tmp_path: Path) -> None:
    weight = torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    plain_base(tmp_path, {"block.conv.weight": weight})
    adapter = HraAdapter({"block.conv": pairs(24)}, rank=RANK)
    convert(tmp_path, adapter)
    b, a = factors(tmp_path, "block.conv")
    assert (a.shape, b.shape) == ((RANK, 4, 3, 2), (6, RANK, 1, 1))
    exact = explicit_delta(weight.reshape(6, 24), adapter, "block.conv")
    torch.testing.assert_close(b.reshape(6, RANK) @ a.reshape(RANK, 24), exact, rtol=0, atol=1e-6)


def test_files_keys_and_dtypes_are_exactly_these(tmp_path: Path) -> None:
    llama(tmp_path, dtype="BF16")
    adapter = llama_adapter("q_proj", "down_proj", task="CAUSAL_LM", base="org/base")
    report = convert(tmp_path, adapter, dtype="bfloat16")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", MANIFEST_NAME}
    assert {path.name for path in (tmp_path / "lora").iterdir()} == names
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{module}.lora_{letter}.weight": (RANK, d) if letter == "A" else (32, RANK)
        for module, d in {m: len(u) for m, u in adapter.chains.items()}.items()
        for letter in "AB"
    }
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert report.format == "LoRA of PEFT"
    card = (tmp_path / "lora" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "base_model: org/base\nbase_model_relation: adapter\n" in card


def test_the_configuration_has_no_field_that_peft_0_12_does_not_know(tmp_path: Path) -> None:
    llama(tmp_path)
    convert(tmp_path, llama_adapter("q_proj", task="CAUSAL_LM", base="org/base"))
    config = config_of(tmp_path)
    assert config.keys() <= PEFT_FIELDS
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, RANK)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["fan_in_fan_out"] is False
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/base")


def test_the_manifest_says_for_which_base_it_holds_and_what_rounding_cost(tmp_path: Path) -> None:
    base = open_checkpoint(llama(tmp_path))
    adapter = llama_adapter("q_proj")
    report = convert(tmp_path, adapter, dtype="float16")
    manifest = json.loads((tmp_path / "lora" / MANIFEST_NAME).read_text())
    assert manifest["base"]["fingerprint"] == base.fingerprint()
    assert manifest["source"] == HraSource([adapter]).digest
    assert {name: entry["error"] for name, entry in manifest["targets"].items()} == {
        target.module: target.error for target in report.targets
    }
    assert all(0 < entry["error"] < DELTA["float16"] for entry in manifest["targets"].values())


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    llama(tmp_path)
    convert(tmp_path, llama_adapter("q_proj", "up_proj"))
    first = synthetic.read_tree(tmp_path / "lora")
    convert(tmp_path, llama_adapter("q_proj", "up_proj"), overwrite=True)
    assert synthetic.read_tree(tmp_path / "lora") == first


def test_only_the_targets_weights_are_read(tmp_path: Path) -> None:
    """Everything else is a hole in the file, or NaN; progress counts what is read."""
    tensors = synthetic.toy_tensors(dtype="F32")
    for name, value in tensors.items():
        if "q_proj" not in name:
            tensors[name] = synthetic.stored(np.full(value.shape, np.nan))
    synthetic.write_base(tmp_path / "base", tensors)
    read: list[int] = []
    convert(tmp_path, llama_adapter("q_proj"), progress=read.append)
    assert read == [32 * 32 * 4] * LAYERS


def test_no_weight_is_read_for_a_target_that_changes_nothing(tmp_path: Path) -> None:
    weights = {"a.proj.weight": torch.randn(8, 8), "b.proj.weight": torch.full((8, 8), float("nan"))}
    plain_base(tmp_path, weights)
    adapter = HraAdapter({"a.proj": pairs(8), "b.proj": torch.ones(8, RANK)}, rank=RANK)
    report = convert(tmp_path, adapter)
    assert [target.rank for target in report.targets] == [RANK, RANK]
    assert not any(factor.any() for factor in factors(tmp_path, "b.proj"))
    assert report.targets[1].delta_norm == 0


def test_rank_is_what_the_rotation_needs(tmp_path: Path) -> None:
    """One of two pairs never left its start, so half the rank is enough; the odd chain keeps its mirror."""
    plain_base(tmp_path, {"a.proj.weight": torch.randn(8, 8), "b.proj.weight": torch.randn(8, 8)})
    moved, still = pairs(8, 2, seed=1), torch.randn(8, 1).expand(8, 2)
    adapter = HraAdapter({"a.proj": torch.cat([still, moved], dim=1)}, rank=RANK)
    mirror = HraAdapter({"b.proj": torch.randn(8, 1)}, rank=1)
    report = convert(tmp_path, adapter, mirror, mixed_ranks=True)
    assert [target.rank for target in report.targets] == [2, 1]
    assert config_of(tmp_path)["rank_pattern"] == {"a.proj": 2, "b.proj": 1}
    assert config_of(tmp_path)["alpha_pattern"] == {"a.proj": 2, "b.proj": 1}
    exact = explicit_delta(load_file(tmp_path / "base" / "model.safetensors")["a.proj.weight"], adapter, "a.proj")
    b, a = factors(tmp_path, "a.proj")
    torch.testing.assert_close(b @ a, exact, rtol=0, atol=1e-6)


# What servers make of the files, restated from their sources. All of them divide alpha by the one r of the
# configuration, and read no pattern of ranks.


def vllm_modules(config: dict[str, Any], keys: list[str]) -> dict[str, set[str]]:
    """vLLM `lora/peft_helper.py`, `lora/utils.py`: features it refuses, and the module and factor of each key."""
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config.get("modules_to_save")
    assert config["bias"] == "none"
    assert not config.get("use_dora")
    found: dict[str, set[str]] = {}
    for key in keys:
        match = re.fullmatch(r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", key)
        assert match is not None, f"{key} is unsupported LoRA weight"
        found.setdefault(match[1], set()).add(match[2] or match[3])
    return found


def test_vllm_reads_every_factor_with_scale_one(tmp_path: Path) -> None:
    llama(tmp_path)
    adapter = llama_adapter("_proj")
    convert(tmp_path, adapter, dtype="bfloat16")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = config_of(tmp_path)
    assert vllm_modules(config, list(tensors)) == {module: {"A", "B"} for module in adapter.chains}
    assert config["lora_alpha"] / config["r"] == 1
    assert all(value.shape[0 if "lora_A" in key else 1] == config["r"] for key, value in tensors.items())


def test_sglang_reads_targets_from_a_list_of_names(tmp_path: Path) -> None:
    """`srt/lora/utils.py`: a string would have to be `all-linear`; of a name it takes the last part."""
    llama(tmp_path)
    adapter = llama_adapter("q_proj", "v_proj")
    adapter = HraAdapter({**adapter.chains, "lm_head": pairs(32)}, rank=RANK)
    convert(tmp_path, adapter)
    targets = config_of(tmp_path)["target_modules"]
    assert isinstance(targets, list)
    assert {name.split(".")[-1] for name in targets} == {"q_proj", "v_proj", "lm_head"}


def test_tgi_finds_every_kind_of_target_in_every_layer(tmp_path: Path) -> None:
    """`adapters/lora.py`: one layer without factors, and the kind is dropped in all; idle targets must be there."""
    llama(tmp_path)
    adapter = llama_adapter("q_proj", "v_proj")
    idle = "model.layers.1.self_attn.v_proj"
    adapter = HraAdapter({**adapter.chains, idle: torch.ones(32, RANK)}, rank=RANK)
    report = convert(tmp_path, adapter)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for kind in ("q_proj", "v_proj"):
        stems = [f"base_model.model.model.layers.{layer}.self_attn.{kind}" for layer in range(LAYERS)]
        assert len({tensors[f"{stem}.lora_A.weight"].shape for stem in stems}) == 1  # TGI stacks them
        assert len({tensors[f"{stem}.lora_B.weight"].shape for stem in stems}) == 1
    assert report.notes == ("1 of 4 targets change nothing: their factors are zeros",)


def test_notes_say_what_servers_would_not_say(tmp_path: Path) -> None:
    llama(tmp_path)
    first = llama_adapter("layers.1.self_attn.q_proj", rank=24)
    second = llama_adapter("up_proj", parameters={"model.norm.weight": torch.ones(32)}, modules_to_save=("norm",))
    notes = convert(tmp_path, first, second, mixed_ranks=True).notes
    assert notes == (
        "targets differ in rank: vLLM, SGLang and TGI take one rank for all",
        "rank 24: vLLM needs `--max-lora-rank 32`; it makes room for 16",
        (
            "1 trained biases and saved tensors are carried for PEFT: vLLM refuses such adapters, SGLang and TGI serve "
            "the factors alone; `hra-export merge` keeps everything"
        ),
        "`self_attn.q_proj`: not a target in every layer, and TGI then drops it in all of them",
    )


def test_a_denoiser_of_diffusers_gets_its_own_layout(tmp_path: Path) -> None:
    plain_base(tmp_path, {"mid.proj.weight": torch.randn(8, 8), "mid.conv.weight": torch.randn(4, 2, 3, 3)}, UNET)
    adapter = HraAdapter({"mid.proj": pairs(8), "mid.conv": pairs(18)}, rank=RANK)
    assert convert(tmp_path, adapter).format == "LoRA of diffusers"
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        *("README.md", "pytorch_lora_weights.safetensors", MANIFEST_NAME)
    }
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert set(tensors) == {f"unet.mid.{name}.lora_{letter}.weight" for name in ("proj", "conv") for letter in "AB"}


@pytest.mark.parametrize(
    ("component", "class_name", "expected"),
    [
        ("unet", "UNet2DConditionModel", "unet"),
        ("", "UNet2DConditionModel", "unet"),
        ("", "FluxTransformer2DModel", "transformer"),
        ("", "AutoencoderKL", None),
        ("", None, None),
    ],
)
def test_diffusers_keeps_denoisers_under_two_names(component: str, class_name: str, expected: str | None) -> None:
    assert lora_layout.diffusers_component(component, class_name) == expected


def test_patterns_of_ranks_put_the_longer_path_first(tmp_path: Path) -> None:
    """PEFT takes the first pattern that matches the end of a path."""
    pattern = lora_layout.rank_pattern({"proj": 2, "block.proj": 4, "block.other.proj": 6})
    assert list(pattern) == ["block.other.proj", "block.proj", "proj"]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["lm_head", "model.layers.0.q_proj"], ["lm_head"]),
        (["lm_head", "draft.lm_head"], "lm_head"),
        (["lm_head", "lm_head.draft"], ["lm_head"]),
    ],
)
def test_a_pattern_names_targets_only_where_a_list_would_mean_more(known: list[str], expected: list[str] | str) -> None:
    assert lora_layout.target_modules(["lm_head"], known) == expected


def refusal(folder: Path, *adapters: HraAdapter, kind: type[HraExportError], **options: Any) -> str:
    """The message of a conversion that must fail, with nothing left behind."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(kind) as caught:
        convert(folder, *adapters, **options)
    assert sorted(path.name for path in folder.iterdir()) == before
    return str(caught.value)


def test_the_wrong_base_is_refused_with_every_target(tmp_path: Path) -> None:
    llama(tmp_path)
    strangers = {"model.layers.7.self_attn.q_proj": pairs(32), "model.layers.8.self_attn.q_proj": pairs(32)}
    text = refusal(tmp_path, HraAdapter(strangers, rank=RANK), kind=MismatchError)
    assert all(module in text for module in strangers)
    misfits = {"model.layers.0.self_attn.q_proj": pairs(16), "model.layers.1.self_attn.q_proj": pairs(16)}
    text = refusal(tmp_path, HraAdapter(misfits, rank=RANK), kind=MismatchError)
    assert text.count("expected U of shape (32, r), got (16, 4)") == 2


def test_factors_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    plain_base(tmp_path, {"a.proj.weight": torch.full((8, 8), 1e20), "b.proj.weight": torch.randn(8, 8)})
    adapter = HraAdapter({"a.proj": pairs(8, angle=0.5), "b.proj": pairs(8)}, rank=RANK)
    text = refusal(tmp_path, adapter, kind=NumericalError, dtype="float16")
    assert "the factors of 1 targets are beyond float16" in text
    assert "a.proj: ‖ΔW‖ is " in text
    assert math.isfinite(convert(tmp_path, adapter).error)


def test_nan_in_a_target_is_refused(tmp_path: Path) -> None:
    plain_base(tmp_path, {"a.proj.weight": torch.full((8, 8), float("nan"))})
    assert "a.proj" in refusal(tmp_path, HraAdapter({"a.proj": pairs(8)}, rank=RANK), kind=NumericalError)


def test_chains_without_a_direction_are_all_named(tmp_path: Path) -> None:
    llama(tmp_path)
    adapter = llama_adapter("q_proj", orthogonalize=True)
    broken = HraAdapter({m: torch.ones(32, RANK) for m in adapter.chains}, rank=RANK, orthogonalize=True)
    text = refusal(tmp_path, broken, kind=NumericalError)
    assert all(module in text for module in adapter.chains)


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    llama(tmp_path, quantization_config={"quant_method": "gptq"})
    assert "quantized (gptq)" in refusal(tmp_path, llama_adapter("q_proj"), kind=UnsupportedModelError)


def test_diffusers_layout_is_refused_for_anything_but_a_denoiser(tmp_path: Path) -> None:
    llama(tmp_path)
    text = refusal(tmp_path, llama_adapter("q_proj"), kind=ConversionError, layout="diffusers")
    assert "no denoiser" in text


def test_diffusers_layout_has_no_place_for_biases(tmp_path: Path) -> None:
    plain_base(tmp_path, {"mid.proj.weight": torch.randn(8, 8), "mid.proj.bias": torch.randn(8)}, UNET)
    parameters = {"mid.proj.bias": torch.randn(8)}
    adapter = HraAdapter({"mid.proj": pairs(8)}, rank=RANK, parameters=parameters, bias="hra_only")
    text = refusal(tmp_path, adapter, kind=ConversionError)
    assert "mid.proj.bias: no place in diffusers' layout" in text
    assert convert(tmp_path, adapter, layout="peft").format == "LoRA of PEFT"


def test_a_targets_own_weight_is_dropped_when_untrained_and_refused_when_not(tmp_path: Path) -> None:
    """PEFT saves the weight of a head that is a target; ΔW of the base's weight says nothing of a resized one."""
    llama(tmp_path)
    weight = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    changed = HraAdapter({"lm_head": pairs(32)}, rank=RANK, parameters={"lm_head.weight": weight + 1})
    assert "lm_head.weight: differs from the base's" in refusal(tmp_path, changed, kind=ConversionError)
    same = HraAdapter({"lm_head": pairs(32)}, rank=RANK, parameters={"lm_head.weight": weight})
    assert convert(tmp_path, same).notes == ()
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == 2


def test_an_output_that_exists_or_is_an_input_is_refused(tmp_path: Path) -> None:
    llama(tmp_path)
    write_adapter(llama_adapter("q_proj"), tmp_path / "hra")
    adapter = read_adapter(tmp_path / "hra")
    convert(tmp_path, adapter)
    assert "exists" in refusal(tmp_path, adapter, kind=OutputError)
    base = open_checkpoint(tmp_path / "base")
    for inside in (tmp_path / "hra", tmp_path / "base" / "lora"):
        with pytest.raises(OutputError, match="input"):
            load_converter("to_lora").convert(HraSource([adapter]), inside, base=base, overwrite=True)


def test_a_lora_is_not_taken_for_hra(tmp_path: Path) -> None:
    llama(tmp_path)
    convert(tmp_path, llama_adapter("q_proj"))
    with pytest.raises(AdapterError, match="is not an HRA adapter: its peft_type is 'LORA'"):
        read_adapter(tmp_path / "lora")


def test_a_conversion_that_was_interrupted_keeps_its_weights_and_their_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path)
    adapter = llama_adapter("q_proj", "up_proj")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publish.Stage, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path, adapter)
    assert not (tmp_path / "lora").exists()
    read: list[int] = []
    with monkeypatch.context() as patched:  # nothing is computed again
        patched.setattr(HraSource, "factors", interrupt)
        resumed = convert(tmp_path, adapter, progress=read.append)
    assert (
        sum(read)
        == load_converter("to_lora").plan_lora(HraSource([adapter]), base=open_checkpoint(tmp_path / "base")).read_bytes
    )
    first = synthetic.read_tree(tmp_path / "lora")
    again = convert(tmp_path, adapter, overwrite=True)
    assert (resumed.targets, synthetic.read_tree(tmp_path / "lora")) == (again.targets, first)
