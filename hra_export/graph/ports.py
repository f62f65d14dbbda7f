"""What goes into a graph and what comes out, told before it is traced.

A dotted name (`past_key_values.0.key`) is a leaf of the nested structure that the traced module takes or returns.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Family = Literal["encoder", "decoder", "encoder-decoder", "image", "image-text", "denoiser"]
Nested = dict[str, Any]

# Sizes of the example that is traced: no two alike, so that no two axes are taken for one, and none is 0 or 1, which a
# tracer takes for a constant. Height and width cannot be halved: a denoiser then restores whatever size it had.
EXAMPLE_SIZES = {
    "batch": 2,
    "text_batch": 3,
    "image_batch": 2,
    "sequence": 7,
    "past_sequence": 5,
    "total_sequence": 12,
    "encoder_sequence": 9,
    "height": 19,
    "width": 27,
}


@dataclass(frozen=True)
class Port:
    """One input of a graph.

    Attributes:
        name: of the graph input.
        dtype: int64, or the model's float type.
        axes: a size, or the name of an axis that may change.
        bound: values of an integer input lie in [0, bound).
    """

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]
    bound: int = 2

    def example(self) -> Tensor:
        """A tensor to trace with: floats from −1 to 1, ones for a mask, counting integers otherwise."""
        shape = torch.Size(EXAMPLE_SIZES[axis] if isinstance(axis, str) else axis for axis in self.axes)
        if self.dtype.is_floating_point:
            return torch.linspace(-1, 1, shape.numel()).reshape(shape).to(self.dtype)
        if self.name.endswith("mask"):
            return torch.ones(shape, dtype=self.dtype)
        return torch.arange(shape.numel()).reshape(shape) % self.bound


@dataclass(frozen=True)
class GraphSpec:
    """One graph to be exported.

    Attributes:
        name: stem of the file: `model`, `encoder_model`, `decoder_model`.
        family: what kind of model it belongs to.
        task: in the words of the Hub: `text-generation`, `feature-extraction`, …
        module: what is traced; takes `example()` by keyword and returns nested tensors by name.
        inputs: in the order of the graph.
        outputs: names, in the order of the graph.
    """

    name: str
    family: Family
    task: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]

    def example(self) -> Nested:
        """Inputs to trace with, as the module takes them."""
        return nested({port.name: port.example() for port in self.inputs})


def nested(flat: Mapping[str, Any]) -> Nested:
    """{"a.0.key": x} as {"a": {"0": {"key": x}}}."""
    tree: Nested = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return tree


def twin(model: nn.Module, forward: Callable[..., Nested]) -> nn.Module:
    """A second object of the same parameters and submodules, with a forward pass of its own.

    Args:
        model: not changed.
        forward: takes the twin first, as a method does.
    """
    made = copy.copy(model)
    made.forward = lambda **inputs: forward(made, **inputs)
    return made


def float_dtype(model: nn.Module) -> torch.dtype:
    """The float type that a model computes in: that of its first float parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
