"""Training with our layers against stock PEFT: forward, gradients, trajectories, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hra_export.training.tuner import accelerate_peft, get_hra_model, load_hra_model
from tests.tiny_models import MODELS, build, scores

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers).*")

RANK = 4
STEPS = 20
# Float32 on both sides. PEFT multiplies r dense (d, d) matrices and one of the weight's size, we three thin ones: about
# a hundred roundings of 2^-24 each on either side, which add like a random walk or a little worse: 1e-6 to 5e-6.
RTOL = 1e-5
# Adam divides by the root of the second moment, so an entry of a gradient near zero may turn its sign: single entries
# of the vectors then part by up to two steps of lr. Most do not, and the norm over a tensor says so. Measured: 8e-5.
TRAJECTORY_RTOL = 1e-3

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "bert": ("bert", {}),
    "vit": ("vit", {}),
    "unet": ("unet", {}),
    "random-start": ("llama", {"init_weights": False}),
    "gram-schmidt": ("llama", {"init_weights": False, "apply_GS": True}),
    "biases": ("opt", {"bias": "hra_only"}),
    "saved-head": ("bert", {"modules_to_save": ["classifier"]}),
}


def config(name: str, **options: Any) -> HRAConfig:
    return HRAConfig(**{"r": RANK, "target_modules": MODELS[name].targets, **options})


def without_dropout(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def build_with(way: str, name: str, **options: Any) -> Any:
    """The same model three ways, the same start for each."""
    base = build(name)
    torch.manual_seed(1)
    if way == "ours":
        return without_dropout(get_hra_model(base, config(name, **options)))
    stock = get_peft_model(base, config(name, **options))
    return without_dropout(stock if way == "stock" else accelerate_peft(stock))


def loss_of(name: str, model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    result = model(**MODELS[name].inputs())
    output: Tensor = result.sample if hasattr(result, "sample") else result.logits
    return output.square().mean() + output.mean()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in trained(model).items()}
    return {name: value for name, value in found.items() if value is not None}


def move(model: nn.Module, *, seed: int = 2) -> None:
    """Away from the start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in trained(model).values():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(0.3 * value.std(correction=0).clamp(min=0.2) * noise)


def off_by(got: Tensor, expected: Tensor, *, floor: float = 1e-6) -> float:
    """Relative, but for what is smaller than the floor: the gradient of a key's bias is zero but for rounding."""
    return float((got - expected).detach().norm() / expected.detach().norm().clamp(min=floor))


@pytest.mark.parametrize("way", ["ours", "accelerated"])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_stock_peft(case: str, way: str) -> None:
    """The same start, forward passes, gradients and twenty steps of AdamW."""
    name, options = CASES[case]
    stock, fast = build_with("stock", name, **options), build_with(way, name, **options)
    for key, value in stock.state_dict().items():
        assert torch.equal(value, fast.state_dict()[key]), key
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0) for model in (stock, fast)]
    for step in range(STEPS):
        losses = [loss_of(name, model, seed=step) for model in (stock, fast)]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            expected = gradients(stock)
            assert max(off_by(value, expected[key]) for key, value in gradients(fast).items()) < RTOL
        torch.testing.assert_close(losses[1].detach(), losses[0].detach(), rtol=TRAJECTORY_RTOL, atol=TRAJECTORY_RTOL)
        for optimizer in optimizers:
            optimizer.step()
    start = trained(build_with("ours", name, **options))
    assert max(off_by(trained(fast)[key], value, floor=0.1) for key, value in start.items()) > 10 * TRAJECTORY_RTOL
    assert max(off_by(trained(fast)[key], value, floor=0.1) for key, value in trained(stock).items()) < TRAJECTORY_RTOL


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "unet", "t5", "mixtral", "gpt-neox"])
def test_forward_is_that_of_stock_peft_away_from_the_start(name: str) -> None:
    stock, fast = build_with("stock", name), build_with("ours", name)
    for model in (stock, fast):
        move(model)
    with torch.no_grad():
        got, expected, base = (loss_outputs(name, model) for model in (fast, stock, build(name)))
    assert off_by(expected, base) > 100 * RTOL
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=RTOL)


def loss_outputs(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    return scores(model.eval()(**MODELS[name].inputs()))


@pytest.mark.parametrize("way", ["ours", "accelerated"])
def test_state_dict_keeps_names_and_order(way: str) -> None:
    stock, fast = build_with("stock", "unet"), build_with(way, "unet")
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert set(trained(fast)) == set(trained(stock))


def test_file_of_ours_loads_in_stock_peft(tmp_path: Path) -> None:
    fast = build_with("ours", "bert", modules_to_save=["classifier"])
    move(fast)
    fast.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(build("bert"), tmp_path)
    torch.testing.assert_close(loss_outputs("bert", stock), loss_outputs("bert", fast), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("trainable", [False, True])
def test_file_of_stock_peft_loads_in_ours(tmp_path: Path, trainable: bool) -> None:
    stock = build_with("stock", "bert", modules_to_save=["classifier"])
    move(stock)
    stock.save_pretrained(tmp_path)
    fast = load_hra_model(build("bert"), tmp_path, is_trainable=trainable)
    torch.testing.assert_close(loss_outputs("bert", fast), loss_outputs("bert", stock), rtol=RTOL, atol=RTOL)
    assert bool(trained(fast)) == trainable


def test_files_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for way in ("stock", "ours"):
        build_with(way, "llama").save_pretrained(tmp_path / way)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


@pytest.mark.parametrize("name", ["llama", "unet", "llama-tied-head"])
def test_merge_is_that_of_stock_peft(name: str) -> None:
    stock, fast = build_with("stock", name), build_with("ours", name)
    for model in (stock, fast):
        move(model)
    # PEFT would rotate the embedding that is tied to the head too; there the live model is the judge.
    expected = loss_outputs(name, fast if name == "llama-tied-head" else stock.merge_and_unload())
    torch.testing.assert_close(loss_outputs(name, fast.merge_and_unload()), expected, rtol=RTOL, atol=RTOL)


def test_two_active_adapters_compose_as_in_stock_peft() -> None:
    outputs = []
    for way in ("stock", "ours"):
        model = build_with(way, "llama")
        model.add_adapter("second", config("llama", init_weights=False))
        model.base_model.set_adapter(["default", "second"])
        move(model)
        outputs.append(loss_outputs("llama", model))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=RTOL, atol=RTOL)


def test_accelerated_model_keeps_its_parameters_and_optimizer() -> None:
    """A script that made its optimizer before the swap goes on with it."""
    model = build_with("stock", "llama")
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    before = {name: id(value) for name, value in model.named_parameters()}
    assert accelerate_peft(model) is model
    assert {name: id(value) for name, value in model.named_parameters()} == before
    first = loss_of("llama", model, seed=0)
    first.backward()
    optimizer.step()
    assert loss_of("llama", model, seed=0).item() != first.item()


def test_accelerate_takes_adapters_that_diffusers_added() -> None:
    """`add_adapter` of diffusers and transformers leaves no `PeftModel`, but PEFT's layers alone."""
    outputs = []
    for accelerated in (False, True):
        model = build("unet")
        torch.manual_seed(1)
        model.add_adapter(config("unet", init_weights=False))
        outputs.append(loss_outputs("unet", accelerate_peft(model) if accelerated else model))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=RTOL, atol=RTOL)
