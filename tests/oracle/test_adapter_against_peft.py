"""Adapters that stock PEFT writes are read here, and adapters written here load in stock PEFT with the same outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, HRAConfig, PeftModel, get_peft_model
from peft.tuners.hra.layer import HRALayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.attachment import attach
from hra_export.peft_directory import CONFIG_NAME, WEIGHTS_NAME
from tests.tiny_models import MODELS, build, scores

# Float32 on both sides; PEFT multiplies dense matrices where we rotate activations. Outputs are around 1, errors 1e-6.
ATOL = 1e-5
# PEFT warns when odd ranks start from random vectors and when a tied head is a target, and both are on purpose here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(symmetric initialization|tie_word_embeddings|save_embedding_layers).*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

# name → model, options of HRAConfig
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "odd-rank": ("llama", {"target_modules": ["q_proj"], "r": 3}),
    "rank-one": ("llama", {"target_modules": ["v_proj"], "r": 1}),
    "gram-schmidt": ("llama", {"target_modules": ["q_proj"], "apply_GS": True, "init_weights": False}),
    "pattern": ("llama", {"target_modules": r".*\.1\..*(q|k)_proj"}),
    "one-layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "bias-of-targets": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "hra_only"}),
    "bias-of-all": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "saved-head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "saved-norms-and-biases": ("bert", {"target_modules": ["query"], "modules_to_save": ["LayerNorm"], "bias": "all"}),
    "convolutions": ("unet", {"target_modules": ["conv1", "conv_shortcut", "to_q"]}),
    "saved-convolution": ("unet", {"target_modules": ["to_q"], "modules_to_save": ["conv_out"]}),
}


def peft_model(name: str, *, adapter: str = "default", **options: Any) -> Any:
    """A PEFT model whose every trained value is away from its start."""
    torch.manual_seed(1)
    model = get_peft_model(build(name), HRAConfig(**{"r": 4, **options}), adapter_name=adapter)
    move(model)
    return model.eval()


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * value.std(correction=0).clamp(min=0.2) * torch.randn_like(value))


@torch.no_grad()
def outputs(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    return scores(model(**MODELS[name].inputs()))


def reflections(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Module path in the base model → the vectors PEFT holds."""
    return {
        path.removeprefix("base_model.model."): module.hra_u[adapter].detach()
        for path, module in model.named_modules()
        if isinstance(module, HRALayer) and adapter in module.hra_u
    }


def trained(model: nn.Module) -> set[str]:
    """The parameters that were trained beside the chains, by their names in the base model."""
    names = {name.removeprefix("base_model.model.") for name, value in model.named_parameters() if value.requires_grad}
    names = {name for name in names if ".hra_u." not in name and ".original_module." not in name}
    return {name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".") for name in names}


def check_chains(adapter: HraAdapter, expected: dict[str, Tensor]) -> None:
    assert adapter.chains.keys() == expected.keys()
    for path, value in expected.items():
        assert torch.equal(adapter.chains[path], value)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_read_and_acts_alike(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    start = outputs(name, build(name))
    reference = peft_model(name, **options)
    reference.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    check_chains(adapter, reflections(reference))
    assert adapter.rank == options.get("r", 4)
    assert adapter.orthogonalize == options.get("apply_GS", False)
    assert adapter.bias == options.get("bias", "none")
    assert list(adapter.modules_to_save) == options.get("modules_to_save", [])
    assert adapter.model_class == type(build(name)).__name__
    # PEFT carries the weight of a head that is a target, trained or not.
    assert adapter.parameters.keys() - {"lm_head.weight"} == trained(reference)
    expected = outputs(name, reference)
    assert float((expected - start).abs().max()) > 30 * ATOL
    model = build(name)
    attach(model, adapter)
    torch.testing.assert_close(outputs(name, model), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_here_loads_in_peft_and_acts_alike(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    reference = peft_model(name, **options)
    reference.save_pretrained(tmp_path / "peft")
    write_adapter(read_adapter(tmp_path / "peft"), tmp_path / "ours")
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    found, expected = reflections(loaded), reflections(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    assert torch.equal(outputs(name, loaded), outputs(name, reference))


@pytest.mark.parametrize("case", CASES)
def test_weights_and_config_survive_peft(case: str, tmp_path: Path) -> None:
    """PEFT → ours → PEFT → ours: the same tensors, the same fields, and our own bytes are stable."""
    name, options = CASES[case]
    peft_model(name, **options).save_pretrained(tmp_path / "a")
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "b")
    PeftModel.from_pretrained(build(name), tmp_path / "b").save_pretrained(tmp_path / "c")
    first, third = load_file(tmp_path / "a" / WEIGHTS_NAME), load_file(tmp_path / "c" / WEIGHTS_NAME)
    assert first.keys() == third.keys()
    assert all(torch.equal(first[key], third[key]) for key in first)
    write_adapter(read_adapter(tmp_path / "c"), tmp_path / "d")
    assert (tmp_path / "b" / WEIGHTS_NAME).read_bytes() == (tmp_path / "d" / WEIGHTS_NAME).read_bytes()
    one, other = (json.loads((tmp_path / folder / CONFIG_NAME).read_bytes()) for folder in ("a", "b"))
    free = {"target_modules", "layers_to_transform", "init_weights", "peft_version"}  # paths listed, start irrelevant
    assert {k: v for k, v in one.items() if k not in free} == {k: v for k, v in other.items() if k not in free}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_as_they_are_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = peft_model("llama", target_modules=["q_proj"])
    reference.save_pretrained(tmp_path)
    stored = {key: value.to(dtype) for key, value in load_file(tmp_path / WEIGHTS_NAME).items()}
    save_file(stored, tmp_path / WEIGHTS_NAME, {"format": "pt"})
    adapter = read_adapter(tmp_path)
    check_chains(adapter, {path: value.to(dtype) for path, value in reflections(reference).items()})
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    model = build("llama")
    attach(model, adapter)
    torch.testing.assert_close(outputs("llama", model), outputs("llama", loaded), rtol=0, atol=ATOL)


def test_each_of_several_adapters_is_read_from_its_folder_and_they_compose_as_in_peft(tmp_path: Path) -> None:
    model = peft_model("llama", target_modules=["q_proj", "down_proj"])
    model.add_adapter("second", HRAConfig(r=2, target_modules=["q_proj", "o_proj"], init_weights=False))
    model.save_pretrained(tmp_path)
    first, second = read_adapter(tmp_path), read_adapter(tmp_path / "second")
    check_chains(first, reflections(model))
    check_chains(second, reflections(model, "second"))
    assert (first.rank, second.rank) == (4, 2)
    model.base_model.set_adapter(["default", "second"])
    both = outputs("llama", model)
    ours = build("llama")
    attached = attach(ours, first, second)
    torch.testing.assert_close(outputs("llama", ours), both, rtol=0, atol=ATOL)
    attached.detach()
    attach(ours, second, first)
    assert float((outputs("llama", ours) - both).abs().max()) > 10 * ATOL


def test_an_adapter_in_a_sub_folder_says_where_to_look(tmp_path: Path) -> None:
    """PEFT keeps `default` at the root and every other name in a folder of its own."""
    peft_model("llama", target_modules=["q_proj"], adapter="mine").save_pretrained(tmp_path)
    assert len(read_adapter(tmp_path / "mine").chains) == 2


def test_saved_modules_may_hold_running_statistics(tmp_path: Path) -> None:
    """PEFT saves a BatchNorm's buffers, an integer counter among them."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.conv(x))
            return y

    torch.manual_seed(0)
    base, x = Vision(), torch.randn(5, 3, 4, 4)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    reference: Any = get_peft_model(base, HRAConfig(r=2, target_modules=["conv"], modules_to_save=["head"]))
    move(reference)
    reference.train()(x)  # moves the statistics
    reference.eval()
    reference.save_pretrained(tmp_path / "a")
    expected = reference(x).detach()
    adapter = read_adapter(tmp_path / "a")
    assert int(adapter.parameters["head.0.num_batches_tracked"]) == 1
    model = Vision().eval()
    model.load_state_dict(start)
    before = model(x).detach()
    attachment = attach(model, adapter)
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=ATOL)
    with attachment.disabled():
        assert torch.equal(model(x), before)
    write_adapter(adapter, tmp_path / "b")
    again = Vision().eval()
    again.load_state_dict(start)
    assert torch.equal(PeftModel.from_pretrained(again, tmp_path / "b").eval()(x), expected)


def test_peft_finds_the_class_of_a_model_without_a_task(tmp_path: Path) -> None:
    """`auto_mapping` must come back whole: PEFT reads both of its fields."""
    base: Any = build("bert")
    base.save_pretrained(tmp_path / "base")
    reference = peft_model("bert", target_modules=["query"])
    reference.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    reference.save_pretrained(tmp_path / "a")
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "b")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(outputs("bert", loaded), outputs("bert", reference))


def test_a_target_at_the_root_is_not_taken_for_a_suffix(tmp_path: Path) -> None:
    """PEFT's list entry `proj` would also adapt `block.proj`, with r = 1 to something far from the identity."""
    model = nn.ModuleDict({"proj": nn.Linear(6, 6), "block": nn.ModuleDict({"proj": nn.Linear(6, 6)})})
    write_adapter(HraAdapter({"proj": torch.randn(6, 1)}, rank=1), tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path)
    assert [path for path, module in loaded.named_modules() if isinstance(module, HRALayer)] == [
        "base_model.model.proj"
    ]
