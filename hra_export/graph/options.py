"""What an export can be asked for, and which wishes go together."""

from dataclasses import dataclass
from typing import Literal

import torch

from hra_export.strength import Interpolation, check_strength, linear_part

Mode = Literal["merged", "reflect"]
Runtime = Literal["ort", "genai"]
Precision = Literal["keep", "fp32", "fp16", "bf16", "int8", "int4"]
Provider = Literal["cpu", "cuda", "tensorrt"]
Swap = Literal["none", "adapter", "rows"]
Default = Literal["base", "adapter"]
Fusions = Literal["none", "cpu", "cuda"]

FLOATS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GraphOptions:
    """How a model is written as graphs.

    Attributes:
        mode: the chain folded into the weights, or an operator in front of them.
        runtime: ONNX Runtime, or a directory for ONNX Runtime GenAI.
        precision: of the weights; `keep` takes the blocks that a quantized base is made of.
        block_size: columns that share a scale in weight-only quantization.
        symmetric: quantize around zero, without zero points.
        provider: where the graph will run; it decides the activations of quantized weights.
        swap: whether U and V are inputs, for the whole batch or for each of its rows.
        default: what a swappable graph computes while nothing is swapped in.
        plain_ops: no operator and no function, only ONNX's own operators in their fastest form.
        opset: version of the ONNX domain.
        fusions: the runtime's own fused operators, for one kind of provider.
        strength: t of the adapters' R^t, or of W + t (W R − W).
        interpolation: which of the two.

    Raises:
        ValueError: wishes that exclude each other.
    """

    mode: Mode = "merged"
    runtime: Runtime = "ort"
    precision: Precision = "fp32"
    block_size: int = 32
    symmetric: bool = False
    provider: Provider = "cpu"
    swap: Swap = "none"
    default: Default = "base"
    plain_ops: bool = False
    opset: int = 20
    fusions: Fusions = "none"
    strength: float = 1.0
    interpolation: Interpolation = "geodesic"

    def __post_init__(self) -> None:
        check_strength(self.strength, self.interpolation)
        if self.swap != "none" and self.mode == "merged":
            raise ValueError("a merged graph has no adapter to swap: ask for reflect")
        if self.swap == "rows" and self.runtime == "genai":
            raise ValueError("ONNX Runtime GenAI gives all rows of a batch one adapter: ask for runtime ort")
        if self.precision == "keep" and self.mode == "merged":
            raise ValueError(
                "folding changes the base's bits, and rounding them again loses: ask for reflect to keep them"
            )
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block size: expected a power of two from 16 on, got {self.block_size}")

    @property
    def activations(self) -> torch.dtype:
        """The dtype of activations, and of U and V."""
        if self.precision in FLOATS:
            return FLOATS[self.precision]
        return torch.float32 if self.provider == "cpu" else torch.float16

    @property
    def linear(self) -> float:
        """The factor of every ΔW; a part of a rotation is in the adapters themselves."""
        return linear_part(self.strength, self.interpolation)
