"""The weights of a base layer as `merge` sees them: dense, transposed (GPT-2's Conv1D), or quantized by bitsandbytes.

A merge into a quantized weight dequantizes, folds and quantizes again, which costs more accuracy than the adapter may
be worth: serve such a base with the adapter in front, or merge into the unquantized model.
"""

import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from hra_export.errors import UnsupportedModelError


@dataclass(frozen=True)
class Kept:
    """A base layer's own weight, to be put back.

    Attributes:
        weight: the parameter itself.
        state: bitsandbytes' 8-bit state, which takes the weight's data over at the first forward pass.
    """

    weight: nn.Parameter
    state: object | None

    @classmethod
    def of(cls, base: Any) -> Self:
        """Keep what `install` will replace.

        Raises:
            UnsupportedModelError: quantized by anything but bitsandbytes.
        """
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not (_is_dense(base) or _bits(base)):
            raise UnsupportedModelError(
                f"cannot merge into a {type(base).__name__}: its weight is quantized",
                hint="merge into the unquantized base with `hra-export merge`",
            )
        return cls(weight, getattr(base, "state", None))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that merged values are rounded to; float32 before they are quantized."""
        return self.weight.dtype if self.weight.is_floating_point() else torch.float32

    def restore(self, base: Any) -> None:
        """Put it back; on the device and in the floating-point dtype that the base has by now."""
        current = base.weight
        if _bits(base) or (current.device, current.dtype) == (self.weight.device, self.weight.dtype):
            base.weight = self.weight
        else:
            moved = self.weight.detach().to(current.device, current.dtype)
            base.weight = nn.Parameter(moved, requires_grad=self.weight.requires_grad)
        if self.state is not None:
            base.state = self.state


def dense_weight(base: Any, kept: Kept) -> Tensor:
    """The kept weight as rows (o, d), or (o, in, kh, kw) for a convolution, dequantized where needed."""
    if _is_dense(base):
        weight = kept.weight.detach()
        return weight.T if _is_transposed(base) else weight
    merged = base.weight
    kept.restore(base)
    try:
        dense: Tensor = dequantize_module_weight(base).detach()
    finally:
        base.weight = merged
    return dense


def install(base: Any, rows: Tensor, kept: Kept) -> None:
    """Give a base layer new weights, as a new parameter: one that shares the old one keeps it."""
    if _is_dense(base):
        value = (rows.T if _is_transposed(base) else rows).to(kept.dtype).contiguous()
        base.weight = nn.Parameter(value, requires_grad=kept.weight.requires_grad)
    else:
        warnings.warn("the merged weight is quantized again, which rounds it; unmerge restores the base", stacklevel=4)
        _quantize(base, rows.to("cpu", torch.float32), kept)


def _quantize(base: Any, rows: Tensor, kept: Any) -> None:
    """As the kept weight is, by bitsandbytes; its parameters quantize when they are moved to a device."""
    bnb: Any = import_module("bitsandbytes")
    if _bits(base) == 8:
        has_half = kept.weight.has_fp16_weights
        base.weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=has_half).to(kept.weight.device)
        base.state = bnb.MatmulLtState()
        base.state.threshold, base.state.has_fp16_weights = kept.state.threshold, has_half
    else:
        options = {k: v for k, v in kept.weight.__dict__.items() if not k.startswith("_") and k != "data"}
        options |= {"bnb_quantized": False, "requires_grad": False, "quant_state": None}
        base.weight = bnb.nn.Params4bit(rows, **options).to(kept.weight.device)


def _is_dense(base: nn.Module) -> bool:
    weight = getattr(base, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.is_floating_point() and not _bits(base)


def _is_transposed(base: nn.Module) -> bool:
    return type(base).__name__ == "Conv1D"


def _bits(base: nn.Module) -> int:
    """8 or 4 for bitsandbytes' layers, else 0."""
    return {"Int8Params": 8, "Params4bit": 4}.get(type(getattr(base, "weight", None)).__name__, 0)
