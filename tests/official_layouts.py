"""The maths of other people's HRA code, each from its description and with dense matrices, and the files it leaves.

None of it calls the library. A model gets its layers replaced by these, and its state dict is then what that code
saves, while its forward pass says what the file stands for.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# The layers of an attention block that the diffusion code adapts.
ATTENTION_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")


def orthonormal_columns(vectors: Tensor) -> Tensor:
    """Gram-Schmidt, one column after the other, each freed of those before it in turn."""
    done: list[Tensor] = []
    for column in vectors.T:
        rest = column
        for earlier in done:
            rest = rest - (earlier @ rest) * earlier
        done.append(rest / rest.norm())
    return torch.stack(done, dim=1)


def dense_chain(vectors: Tensor, *, epsilon: float = 0.0, gram_schmidt: bool = False) -> Tensor:
    """(I − 2 û_1 û_1ᵀ) … (I − 2 û_r û_rᵀ) with û = u / √(‖u‖² + ε), or I − 2 Q Qᵀ."""
    identity = torch.eye(len(vectors), dtype=vectors.dtype)
    if gram_schmidt:
        q = orthonormal_columns(vectors)
        return identity - 2 * q @ q.T
    product = identity
    for column in vectors.T:
        unit = (column / torch.sqrt((column**2).sum() + epsilon))[:, None]
        product = product @ (identity - 2 * unit @ unit.T)
    return product


class NluLinear(nn.Linear):
    """`nlu/adapterlib/layers.py`: W H_1 … H_r in front of the layer; the weight keeps its name."""

    name = "hra_u"

    def __init__(self, linear: nn.Linear, rank: int, *, gram_schmidt: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.gram_schmidt = gram_schmidt
        self.register_parameter(self.name, nn.Parameter(torch.randn(self.in_features, rank, dtype=self.weight.dtype)))

    def folded(self) -> Tensor:
        """What the layer multiplies by."""
        return self.weight @ dense_chain(getattr(self, self.name), gram_schmidt=self.gram_schmidt)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.folded(), self.bias)


class OlderNluLinear(NluLinear):
    """The same under the parameter's first name."""

    name = "householder_U"


class ControlLinear(nn.Module):
    """`generation/control/hra.py`: the same maths; the frozen layer lies one level further down."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.hra_u = nn.Parameter(torch.randn(linear.in_features, rank, dtype=linear.weight.dtype))
        self.fixed_linear = linear

    def folded(self) -> Tensor:
        """What the layer multiplies by."""
        return self.fixed_linear.weight @ dense_chain(self.hra_u)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.folded(), self.fixed_linear.bias)


class LlamaLinear(nn.Module):
    """`llama/peft/oft/layer.py`: y = (x Wᵀ) P + b, softened; the older code calls the parameter `hra_r`."""

    def __init__(self, linear: nn.Linear, rank: int, *, epsilon: float, gram_schmidt: bool = False) -> None:
        super().__init__()
        self.base_layer = linear
        self.oft_r = nn.Parameter(0.02 * torch.randn(linear.out_features, rank, dtype=linear.weight.dtype))
        self.epsilon, self.gram_schmidt = epsilon, gram_schmidt

    def chain(self) -> Tensor:
        """P (o, o)."""
        return dense_chain(self.oft_r, epsilon=self.epsilon, gram_schmidt=self.gram_schmidt)

    def folded(self) -> Tensor:
        """As that code merges: (Wᵀ P)ᵀ."""
        return (self.base_layer.weight.T @ self.chain()).T

    def forward(self, x: Tensor) -> Tensor:
        bias = self.base_layer.bias
        result = functional.linear(x, self.base_layer.weight) @ self.chain()
        return result if bias is None else result + bias


class DraftLinear(LlamaLinear):
    """PEFT's first draft: after the layer like the LLaMA code, and hard."""

    def __init__(self, linear: nn.Linear, rank: int, *, gram_schmidt: bool = False) -> None:
        super().__init__(linear, rank, epsilon=0.0, gram_schmidt=gram_schmidt)


class FirstLinear(nn.Module):
    """`HouseholderLinearLayer` of the first commit: a list of (d, 1), softened, W P_1 … P_l."""

    def __init__(self, linear: nn.Linear, rank: int, *, epsilon: float, scale: float = 0.02) -> None:
        super().__init__()
        self.base_layer, self.epsilon = linear, epsilon
        dtype = linear.weight.dtype
        self.v_list = nn.ParameterList(scale * torch.randn(linear.in_features, 1, dtype=dtype) for _ in range(rank))

    def folded(self) -> Tensor:
        """What the layer multiplies by."""
        return self.base_layer.weight @ dense_chain(torch.cat(list(self.v_list), dim=1), epsilon=self.epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.folded(), self.base_layer.bias)


class LoraLiteLinear(nn.Module):
    """lora-lite's hook in front of a layer: rows of `lora_U`, from the last to the first, or the other way round."""

    def __init__(self, linear: nn.Linear, rank: int, *, reversed_order: bool = False) -> None:
        super().__init__()
        self.base_layer, self.reversed_order = linear, reversed_order
        self.lora_U = nn.Parameter(torch.randn(rank, linear.in_features, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = list(self.lora_U)
        for row in rows if self.reversed_order else reversed(rows):
            x = x - ((x @ row) * (2.0 / (row * row).sum().clamp_min(1e-12)))[..., None] * row
        return functional.linear(x, self.base_layer.weight, self.base_layer.bias)

    def folded(self) -> Tensor:
        """What the layer multiplies by, column by column of the unit vectors it is fed."""
        identity = torch.eye(self.lora_U.shape[1], dtype=self.lora_U.dtype)
        bias = self.base_layer.bias
        answers = self(identity) if bias is None else self(identity) - bias
        return answers.T


def replace_linears(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], chosen: Callable[[str], bool]
) -> dict[str, Any]:
    """Put layers of other code in the place of a model's own, in it; returns them by their module path."""
    found = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and chosen(path):
            parent, _, leaf = path.rpartition(".")
            found[path] = make(module)
            setattr(model.get_submodule(parent), leaf, found[path])
    return found


def processor_owner(module: str) -> str:
    """Where the DreamBooth code keeps the chain of an attention layer: in its processor."""
    attention, _, leaf = module.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{leaf}"


def stable_diffusion_layers(multipliers: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2) -> Iterator[tuple[str, int]]:
    """Module paths of the layers that the controllable generation adapts, with their in_features.

    The walk of `UNetModel` in `ldm/modules/diffusionmodules/openaimodel.py` with `model_channels` 320, `context_dim`
    768 and attention in every resolution but the last.
    """
    number, last = 1, len(multipliers) - 1
    for level, factor in enumerate(multipliers):
        for _ in range(blocks):
            if level != last:
                yield from _transformer_layers(f"input_blocks.{number}.1", 320 * factor)
            number += 1
        number += level != last  # a downsampler has a number of its own
    yield from _transformer_layers("middle_block.1", 320 * multipliers[-1])
    number = 0
    for level in reversed(range(len(multipliers))):
        for _ in range(blocks + 1):
            if level != last:
                yield from _transformer_layers(f"output_blocks.{number}.1", 320 * multipliers[level])
            number += 1


def _transformer_layers(block: str, channels: int) -> Iterator[tuple[str, int]]:
    prefix = f"model.diffusion_model.{block}.transformer_blocks.0"
    for attention, context in (("attn1", channels), ("attn2", 768)):
        sizes = {"to_q": channels, "to_k": context, "to_v": context, "to_out.0": channels}
        yield from ((f"{prefix}.{attention}.{leaf}", size) for leaf, size in sizes.items())
    yield f"{prefix}.ff.net.0.proj", channels
