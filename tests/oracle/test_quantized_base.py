"""HRA in front of layers that bitsandbytes quantized, on its CPU backend."""

from typing import Any

import pytest
import torch
from peft import HRAConfig
from torch import Tensor, nn

from hra_export.errors import UnsupportedModelError
from hra_export.householder import compact_wy, dense
from hra_export.training.tuner import get_hra_model

bnb: Any = pytest.importorskip("bitsandbytes")

pytestmark = [
    # It casts activations to float16 for the 8-bit product, and says so at every pass.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized again.*:UserWarning"),
]
FEATURES, OUT = 64, 96
# The quantized layer is the same on both sides; the rotated rows differ by float32's rounding, which 8-bit rounding of
# activations may carry over a step of max|z| / 127: about 1e-2 of an output of size 1.
ATOL = {4: 1e-5, 8: 2e-2}


def quantized(bits: int) -> Any:
    torch.manual_seed(0)
    source = nn.Linear(FEATURES, OUT)
    if bits == 4:
        layer = bnb.nn.Linear4bit(FEATURES, OUT, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(FEATURES, OUT, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")  # quantizes


def adapted(bits: int, *, paired: bool = False) -> Any:
    config = HRAConfig(r=4, target_modules=["0"], init_weights=paired)
    return get_hra_model(nn.Sequential(quantized(bits)), config).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_reflection_stands_in_front_of_the_quantized_layer(bits: int) -> None:
    model, x = adapted(bits), torch.randn(5, FEATURES)
    layer = model.base_model.model[0]
    # With a gradient to carry, both take the same of bitsandbytes' products.
    turned = (x.double() @ dense(compact_wy(layer.hra_u["default"])).T).float().requires_grad_()
    torch.testing.assert_close(model(x), layer.base_layer(turned), rtol=0, atol=ATOL[bits])
    assert not layer.base_layer.weight.is_floating_point()


@pytest.mark.parametrize("bits", [4, 8])
def test_paired_start_is_the_quantized_base(bits: int) -> None:
    x = torch.randn(5, FEATURES)
    torch.testing.assert_close(adapted(bits, paired=True)(x), quantized(bits)(x), rtol=0, atol=ATOL[bits])


@pytest.mark.parametrize("bits", [4, 8])
def test_training_moves_the_vectors_alone(bits: int) -> None:
    model, x, target = adapted(bits, paired=True).train(), torch.randn(50, FEATURES), torch.randn(50, OUT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"base_model.model.0.hra_u.default"}


@pytest.mark.parametrize("bits", [4, 8])
def test_unmerge_restores_the_exact_bits(bits: int) -> None:
    model, x = adapted(bits), torch.randn(5, FEATURES)
    live, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    merged: Tensor = model(x)
    # Quantized twice: each time the error of a 4-bit weight of size 1/8 in blocks of 64, or of an 8-bit one.
    torch.testing.assert_close(merged, live, rtol=0, atol=0.5 if bits == 4 else 0.05)
    assert not torch.equal(merged, live)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), live)


def test_merge_into_an_unknown_quantized_layer_is_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = FEATURES, OUT
            self.register_buffer("qweight", torch.zeros(FEATURES, OUT, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.qweight.to(x.dtype)

    model = get_hra_model(nn.Sequential(Packed()), HRAConfig(r=4, target_modules=["0"]))
    assert model(torch.randn(2, FEATURES)).shape == (2, OUT)
    with pytest.raises(UnsupportedModelError, match="merge into the unquantized base"):
        model.merge_adapter()
