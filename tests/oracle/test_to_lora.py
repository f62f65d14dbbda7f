"""Stock PEFT and diffusers with the LoRA that was converted = the live HRA layers, by the adapter's effect."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.attachment import attach
from hra_export.checkpoint import open_checkpoint
from hra_export.converted import ConvertReport
from hra_export.low_rank import HraSource
from hra_export.registry import load_converter
from tests.real_models import smollm2_gguf
from tests.tiny_models import MODELS, VOCABULARY, scores, token_inputs

# Models run in float64, so what is left is the rounding of float32 factors, 6e-8 of each ΔW, and of the norms and
# softmaxes that transformers computes in float32: 6e-8 of outputs of which the effect is some hundredths.
EFFECT_FP32 = 1e-5
# Half factors move the outputs about as much, relative to the effect, as ΔW; layers weigh their targets unevenly.
EFFECT_PER_ROUNDING = 3.0
RANK = 4
# PEFT warns of each kind it meets, when Conv1D and Linear are both targets and its one flag fits either; of tied heads,
# because merging would untie them; and that old configurations may be of another version.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`.*:UserWarning"),
]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def any_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = (gpt2() if name == "gpt2" else MODELS[name].build()).eval()
    if name in ("mixtral", "qwen3-moe"):  # grouped products have no float64
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def outputs(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    inputs = token_inputs() if name == "gpt2" else MODELS[name].inputs()
    return scores(
        model(**{key: value.double() if value.is_floating_point() else value for key, value in inputs.items()})
    )


def features(module: nn.Module) -> int | None:
    """d of a layer that a chain may act on."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = getattr(module, "weight", None)
    return weight.shape[0] if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) else None


def near_pairs(d: int, rank: int, angle: float = 0.3) -> Tensor:
    """Vectors in pairs a few degrees apart, as training leaves them."""
    first = torch.randn(d, rank // 2)
    turned = first + angle * first.norm(dim=0) * torch.nn.functional.normalize(torch.randn(d, rank // 2), dim=0)
    return torch.stack([first, turned], dim=2).reshape(d, rank)


def make_adapter(model: nn.Module, *words: str, rank: int = RANK, seed: int = 1, **fields: Any) -> HraAdapter:
    """Chains for every layer with one of the words in its path."""
    torch.manual_seed(seed)
    chains = {
        path: near_pairs(d, rank)
        for path, module in model.named_modules()
        if any(word in path for word in words) and (d := features(module)) is not None
    }
    return HraAdapter(chains, rank=rank, **fields)


def convert(
    folder: Path, model: nn.Module, *adapters: HraAdapter, strength: float = 1.0, **options: Any
) -> ConvertReport:
    """Through files: the base, every adapter, the LoRA in `folder/lora`."""
    model.save_pretrained(folder / "base")
    for i, adapter in enumerate(adapters):
        write_adapter(adapter, folder / f"hra{i}")
    read = [read_adapter(folder / f"hra{i}") for i in range(len(adapters))]
    source = HraSource(read, strength=strength)
    report: ConvertReport = load_converter("to_lora").convert(
        source, folder / "lora", base=open_checkpoint(folder / "base"), **options
    )
    return report


def live(name: str, *adapters: HraAdapter, **options: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the base, and with live HRA layers, in float64."""
    model = any_model(name).double()
    start = outputs(name, model)
    attach(model, *adapters, **options)
    return start, outputs(name, model)


def by_peft(name: str, folder: Path) -> tuple[Any, Tensor]:
    """Stock PEFT's model with the LoRA, and its outputs, in float64."""
    loaded = PeftModel.from_pretrained(any_model(name), folder / "lora").double().eval()
    return loaded, outputs(name, loaded)


def effect_error(candidate: Tensor, reference: Tensor, start: Tensor) -> float:
    """‖(candidate − start) − (reference − start)‖ / ‖reference − start‖; an adapter that is not there has 1."""
    effect = (reference - start).norm()
    assert effect > 1e-4 * start.norm()
    return float((candidate - reference).norm() / effect)


# name of the case → model, words that its targets have in their paths
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", ("_proj",)),
    "llama-one-layer": ("llama", ("layers.1.self_attn.q_proj",)),
    "llama-head": ("llama", ("q_proj", "lm_head")),
    "llama-tied-head": ("llama-tied", ("q_proj", "lm_head")),
    "llama-embedding": ("llama", ("embed_tokens", "v_proj")),
    "qwen3-moe": ("qwen3-moe", ("_proj", "gate")),
    "phi3": ("phi3", ("qkv_proj", "gate_up_proj", "down_proj")),
    "gpt-neox": ("gpt-neox", ("query_key_value", "dense", "embed_out", "lm_head")),
    "gpt2": ("gpt2", ("c_attn", "c_proj", "c_fc")),
    "gpt2-head": ("gpt2", ("c_attn", "lm_head", "wte")),
    "t5": ("t5", (".q", ".v", "wi_0", "wo")),
    "bert": ("bert", ("query", "dense", "word_embeddings")),
    "vit": ("vit", ("projection", "query", "dense", "fc1")),
    "unet": ("unet", ("to_", "conv1", "conv_shortcut", "proj_in", "ff.net")),
}


def moved_parameters(model: nn.Module, *ends: str) -> dict[str, Tensor]:
    """Trained values for the parameters whose names end so."""
    torch.manual_seed(3)
    return {
        name: value.detach() + 0.1 * torch.randn_like(value)
        for name, value in model.named_parameters()
        if name.endswith(ends)
    }


@pytest.mark.parametrize("case", TARGETS)
def test_peft_with_the_lora_computes_what_live_layers_compute(case: str, tmp_path: Path) -> None:
    name, words = TARGETS[case]
    adapter = make_adapter(any_model(name), *words)
    report = convert(tmp_path, any_model(name), adapter, layout="peft")
    start, reference = live(name, adapter)
    loaded, found = by_peft(name, tmp_path)
    assert effect_error(found, reference, start) < EFFECT_FP32
    adapted = {path for path, module in loaded.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(adapter.chains)  # nothing else, and nothing left out
    assert report.error < EFFECT_FP32
    assert report.ranks == (RANK, RANK)


# PEFT writes a pattern for the stacked parameter by itself, and does not find it among the modules.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "path", "sizes"),
    [
        ("mixtral", "block_sparse_moe", {"w1": 32, "w2": 48, "w3": 32}),
        ("qwen3-moe", "mlp", {"gate_proj": 32, "up_proj": 32, "down_proj": 24}),
    ],
)
def test_experts_keep_the_names_that_peft_stacks_and_servers_read(
    name: str, path: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    experts = [f"model.layers.{layer}.{path}.experts.{i}" for layer in range(2) for i in range(4)]
    chains = {f"{expert}.{leaf}": near_pairs(d, RANK) for expert in experts for leaf, d in sizes.items()}
    adapter = HraAdapter(chains, rank=RANK)
    convert(tmp_path, any_model(name), adapter)
    start, reference = live(name, adapter)
    assert effect_error(by_peft(name, tmp_path)[1], reference, start) < EFFECT_FP32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_half_factors_cost_what_the_report_says(name: str, dtype: str, tmp_path: Path) -> None:
    adapter = make_adapter(any_model(name), "_proj", "c_attn", "query", "projection")
    report = convert(tmp_path, any_model(name), adapter, dtype=dtype)
    assert 1e-5 < report.error < {"bfloat16": 5e-3, "float16": 6e-4}[dtype]
    start, reference = live(name, adapter)
    assert effect_error(by_peft(name, tmp_path)[1], reference, start) < EFFECT_PER_ROUNDING * report.error


@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["uniform", "mixed"])
def test_adapters_compose_in_order_and_keep_their_ranks(mixed_ranks: bool, tmp_path: Path) -> None:
    """Ranks 2, 4 and 6 in one model; `down_proj` is a target of both adapters."""
    model = any_model("llama")
    first = make_adapter(model, "down_proj", "q_proj")
    second = make_adapter(model, "down_proj", "lm_head", rank=2, seed=5)
    report = convert(tmp_path, model, first, second, mixed_ranks=mixed_ranks)
    start, reference = live("llama", first, second)
    loaded, found = by_peft("llama", tmp_path)
    assert effect_error(found, reference, start) < EFFECT_FP32
    assert effect_error(live("llama", second, first)[1], reference, start) > 100 * EFFECT_FP32
    ranks = {
        path: module.r["default"] for path, module in loaded.base_model.model.named_modules() if hasattr(module, "r")
    }
    ends = {"down_proj": 6, "q_proj": 4, "lm_head": 2}
    assert ranks == {path: ends[path.rpartition(".")[2]] if mixed_ranks else 6 for path in ranks}
    assert report.ranks == ((2, 6) if mixed_ranks else (6, 6))


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_strength_is_the_linear_factor_of_the_effect(strength: float, tmp_path: Path) -> None:
    adapter = make_adapter(any_model("llama"), "q_proj", "down_proj")
    convert(tmp_path, any_model("llama"), adapter, strength=strength)
    start, reference = live("llama", adapter, strength=strength, interpolation="linear")
    assert effect_error(by_peft("llama", tmp_path)[1], reference, start) < EFFECT_FP32


@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["zeros", "left-out"])
def test_idle_targets_do_nothing_and_are_told(mixed_ranks: bool, tmp_path: Path) -> None:
    model = any_model("llama")
    adapter = make_adapter(model, "q_proj", "down_proj")
    idle = "model.layers.0.mlp.down_proj"
    adapter = replace(adapter, chains={**adapter.chains, idle: torch.ones(48, RANK)})
    report = convert(tmp_path, model, adapter, mixed_ranks=mixed_ranks)
    start, reference = live("llama", adapter)
    loaded, found = by_peft("llama", tmp_path)
    assert effect_error(found, reference, start) < EFFECT_FP32
    assert isinstance(loaded.base_model.model.get_submodule(idle), LoraLayer) is not mixed_ranks
    assert (
        report.notes[0] == f"1 of 4 targets change nothing: their factors are {'left out' if mixed_ranks else 'zeros'}"
    )


def test_an_adapter_that_does_nothing_is_a_lora_that_does_nothing(tmp_path: Path) -> None:
    model = any_model("llama")
    adapter = make_adapter(model, "q_proj")
    adapter = HraAdapter({path: torch.ones_like(u) for path, u in adapter.chains.items()}, rank=RANK)
    report = convert(tmp_path, model, adapter, mixed_ranks=True)
    assert (report.delta_norm, report.error, report.ranks) == (0, 0, (1, 1))
    _, found = by_peft("llama", tmp_path)
    assert torch.equal(found, live("llama")[0])


@pytest.mark.parametrize(
    ("name", "words", "fields", "ends"),
    [
        ("opt", ("q_proj", "fc1"), {"bias": "hra_only"}, ("q_proj.bias", "fc1.bias")),
        ("opt", ("q_proj", "fc1"), {"bias": "all"}, (".bias",)),
        ("bert", ("query",), {"modules_to_save": ("classifier",)}, ("classifier.weight", "classifier.bias")),
        ("bert", ("query",), {"modules_to_save": ("LayerNorm",), "bias": "all"}, (".bias", "LayerNorm.weight")),
        ("unet", ("to_q",), {"modules_to_save": ("conv_out",)}, ("conv_out.weight", "conv_out.bias")),
    ],
    ids=["biases-of-targets", "all-biases", "saved-head", "saved-norms-and-biases", "saved-convolution"],
)
def test_what_was_trained_beside_the_chains_comes_along(
    name: str, words: tuple[str, ...], fields: dict[str, Any], ends: tuple[str, ...], tmp_path: Path
) -> None:
    model = any_model(name)
    parameters = moved_parameters(model, *ends)
    adapter = make_adapter(model, *words, parameters=parameters, **fields)
    report = convert(tmp_path, model, adapter, layout="peft")
    start, reference = live(name, adapter)
    chains = live(name, HraAdapter(adapter.chains, rank=RANK))[1]
    assert effect_error(chains, reference, start) > 0.01  # they matter
    loaded, found = by_peft(name, tmp_path)
    assert effect_error(found, reference, start) < EFFECT_FP32
    config = loaded.peft_config["default"]
    assert config.bias == {"hra_only": "lora_only"}.get(adapter.bias, adapter.bias)
    assert tuple(config.modules_to_save or ()) == adapter.modules_to_save
    assert any(
        f"{len(parameters)} trained biases and saved tensors are carried for PEFT" in note for note in report.notes
    )


def test_the_bias_of_a_target_that_is_left_out_lies_where_peft_looks_for_it(tmp_path: Path) -> None:
    """PEFT keeps the bias of a target under its `base_layer`, and this one is no target any more."""
    model = any_model("opt")
    adapter = make_adapter(model, "q_proj", parameters=moved_parameters(model, "q_proj.bias"), bias="hra_only")
    idle = "model.decoder.layers.0.self_attn.q_proj"
    adapter = replace(adapter, chains={**adapter.chains, idle: torch.ones(32, RANK)})
    convert(tmp_path, model, adapter, mixed_ranks=True)
    start, reference = live("opt", adapter)
    assert effect_error(by_peft("opt", tmp_path)[1], reference, start) < EFFECT_FP32


def test_a_name_at_the_root_is_not_taken_for_the_end_of_another(tmp_path: Path) -> None:
    """PEFT's list entry `proj` would adapt `block.proj` too; so would a pattern of ranks."""
    model = nn.ModuleDict({"proj": nn.Linear(6, 6), "block": nn.ModuleDict({"proj": nn.Linear(6, 6)})})
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    source = HraSource([HraAdapter({"proj": near_pairs(6, 2)}, rank=2)])
    load_converter("to_lora").convert(source, tmp_path / "lora", base=open_checkpoint(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(model, tmp_path / "lora")
    assert [path for path, module in loaded.named_modules() if isinstance(module, LoraLayer)] == [
        "base_model.model.proj"
    ]


def test_ranks_of_a_name_and_of_one_that_ends_like_it_are_kept_apart(tmp_path: Path) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(6, 6), "block": nn.ModuleDict({"proj": nn.Linear(6, 6)})})
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapters = [HraAdapter({"proj": near_pairs(6, 2)}, rank=2), HraAdapter({"block.proj": near_pairs(6, 4)}, rank=4)]
    base = open_checkpoint(tmp_path / "base")
    load_converter("to_lora").convert(HraSource(adapters), tmp_path / "lora", base=base, mixed_ranks=True)
    loaded = PeftModel.from_pretrained(model, tmp_path / "lora").base_model.model
    assert (loaded.proj.r["default"], loaded.block.proj.r["default"]) == (2, 4)
    assert (loaded.proj.scaling["default"], loaded.block.proj.scaling["default"]) == (1, 1)


def test_peft_finds_the_class_of_a_model_without_a_task(tmp_path: Path) -> None:
    model = any_model("bert")
    kind = type(model)
    adapter = make_adapter(model, "query", "dense", base=str(tmp_path / "base"))
    adapter = replace(adapter, model_class=kind.__name__, model_library=kind.__module__)
    convert(tmp_path, model, adapter)
    start, reference = live("bert", adapter)
    loaded = AutoPeftModel.from_pretrained(tmp_path / "lora").double().eval()
    assert effect_error(outputs("bert", loaded), reference, start) < EFFECT_FP32


@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["uniform", "mixed"])
@pytest.mark.parametrize("door", ["component", "pipeline"])
def test_diffusers_with_the_lora_computes_what_live_layers_compute(
    door: str, mixed_ranks: bool, tmp_path: Path
) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    words = TARGETS["unet"][1]
    first = make_adapter(any_model("unet"), *words)
    second = make_adapter(any_model("unet"), "to_q", rank=2, seed=5)
    report = convert(tmp_path, any_model("unet"), first, second, mixed_ranks=mixed_ranks)
    assert report.format == "LoRA of diffusers"
    start, reference = live("unet", first, second)
    model: Any = any_model("unet")
    if door == "component":
        model.load_lora_adapter(tmp_path / "lora", prefix="unet", use_safetensors=True)
    else:
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            tmp_path / "lora", return_lora_metadata=True
        )
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, model, metadata=metadata)
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(first.chains)
    assert effect_error(outputs("unet", model.double()), reference, start) < EFFECT_FP32


@pytest.mark.real
@pytest.mark.timeout(600)
@torch.no_grad()
def test_smollm2_with_the_lora_has_the_logits_of_live_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    load_converter("from_gguf").convert(smollm2_gguf(), base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = AutoTokenizer.from_pretrained(base)("The three largest cities of France are", return_tensors="pt")
    adapter = make_adapter(model, "_proj", rank=8)
    start = model(**tokens).logits
    attachment = attach(model, adapter)
    reference = model(**tokens).logits
    attachment.detach()
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        report = load_converter("to_lora").convert(
            HraSource([adapter]), output, base=open_checkpoint(base), dtype=dtype
        )
        loaded: Any = PeftModel.from_pretrained(model, output).eval()
        found = loaded(**tokens).logits
        loaded.unload()
        assert len(report.targets) == 210
        # float32 sums over thirty layers, in another order.
        assert effect_error(found, reference, start) < max(1e-3, EFFECT_PER_ROUNDING * report.error)
