"""Chains of softened reflections, on either side of a weight: what HRA files cannot hold, and LoRA can.

The authors' LLaMA code, and what they wrote before HRA had its name, divide a vector by √(‖u‖² + ε). Then û is shorter
than 1, and I − 2 û ûᵀ is I − β v vᵀ with β = 2 ‖u‖² / (‖u‖² + ε) for the unit vector v: near the identity for small u,
a reflection where ‖u‖² ≫ ε, orthogonal nowhere between. Their product keeps the compact form
P = (I − 2 û_1 û_1ᵀ) … (I − 2 û_r û_rᵀ) = I − V T Vᵀ with columns û_i and T⁻¹ = ½ I + triu(VᵀV, 1): the diagonal of
T⁻¹ stays ½, since V carries the norms. Before the layer W' = W P, after it W' = Pᵀ W = P_r … P_1 W.

Source: `llama/peft/oft/layer.py` and `generation/subject/oft_utils/attention_processor.py` of DaShenZi721/HRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import digest_of
from hra_export.errors import NumericalError
from hra_export.householder import BlockReflector
from hra_export.target_weights import TargetWeight

Side = Literal["input", "output"]

# float64 leaves singular values of P − I uncertain by about 1e-15; vectors in float32 tell directions apart from 1e-7.
SMALLEST_CHANGE = 1e-12


@dataclass(frozen=True)
class SoftSource:
    """An adapter whose chains are softened, act after their layers, or both; a source of ΔW = B A.

    Attributes:
        chains: module path → vectors as stored, columns in the order of the product: (d, r) before the layer, (o, r)
            after it.
        side: `input` is before the layer, W P; `output` after it, Pᵀ W.
        epsilon: ε; 0 for reflections.
        orthogonalize: Gram-Schmidt the columns first, then P = I − 2 Q Qᵀ, without ε.
        layout: whose code wrote it.
        strength: s in W + s (W' − W).
        path: the file or directory it came from, if any.
    """

    chains: Mapping[str, Tensor]
    side: Side
    epsilon: float
    orthogonalize: bool = False
    layout: str = ""
    strength: float = 1.0
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None
    task: str | None = None
    model_class: str | None = None
    model_library: str | None = None
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"`{self.path}`" if self.path is not None else "(in memory)"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its file or directory."""
        return () if self.path is None else (self.path,)

    @property
    def modules(self) -> tuple[str, ...]:
        """Targets, as module paths."""
        return tuple(self.chains)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over vectors, parameters and settings, hex."""
        settings = [self.side, self.epsilon, self.orthogonalize, self.strength]
        return digest_of({**self.chains, **self.parameters}, settings)

    def entries(self) -> list[dict[str, object]]:
        """How manifests name it, with the part of ΔW that is taken, where it is one."""
        part = {} if self.strength == 1 else {"strength": self.strength, "interpolation": "linear"}
        return [
            {
                "name": self.path.name if self.path else None,
                "digest": self.digest,
                "rank": max(vectors.shape[1] for vectors in self.chains.values()),
                "apply_GS": self.orthogonalize,
                "targets": len(self.chains),
                "layout": self.layout,
                "side": self.side,
                "epsilon": self.epsilon,
                **part,
            }
        ]

    def misfit(self, weight: TargetWeight) -> str | None:
        """The vectors have a row for each output feature of W, or for each column, by the side."""
        got, rows = tuple(self.chains[weight.module].shape), weight.shape[0 if self.side == "output" else 1]
        if got[0] == rows:
            return None
        return f"{weight.module}: expected vectors of shape ({rows}, r) on the {self.side} side, got {got}"

    def rank(self, module: str) -> int:
        """The rank of P − I; 0 for a chain that is the identity."""
        block = self.reflector(module)
        triangle = torch.linalg.qr(block.u).R
        changes = torch.linalg.svdvals(triangle @ block.t @ triangle.T)
        return int((changes > SMALLEST_CHANGE).sum()) if self.strength else 0

    def reflector(self, module: str) -> BlockReflector:
        """P = I − V T Vᵀ of a target, float64; V has no unit columns unless ε is 0, and P is then not orthogonal.

        Raises:
            NumericalError: a vector is not finite, or zero where ε is 0; names the target.
        """
        try:
            return soft_wy(self.chains[module], self.epsilon, orthogonalize=self.orthogonalize)
        except NumericalError as error:
            raise NumericalError(
                f"adapter {self.label}, target `{module}`: {error.message}", hint=error.hint
            ) from error

    def factors(self, weight: TargetWeight) -> tuple[Tensor, Tensor]:
        """B = −s V Tᵀ and A = Vᵀ W after the layer, B = −s (W V) T and A = Vᵀ before it."""
        block = self.reflector(weight.module)
        if self.side == "output":
            return -self.strength * (block.u @ block.t.T), weight.transposed_times(block.u).T
        return -self.strength * (weight.times(block.u) @ block.t), block.u.T


def soft_wy(vectors: Tensor, epsilon: float, *, orthogonalize: bool = False) -> BlockReflector:
    """Gather a chain of softened reflections into I − V T Vᵀ.

    Args:
        vectors: (n, r), any float dtype; column i is u_i as stored.
        epsilon: ε ≥ 0.
        orthogonalize: Gram-Schmidt instead of ε.

    Returns:
        V (n, r) with columns u_i / √(‖u_i‖² + ε) and T (r, r) upper triangular, float64 on the CPU.

    Raises:
        NumericalError: a vector is not finite, or has no direction where it needs one.
        ValueError: `vectors` is not (n, r) with 1 ≤ r ≤ n, or ε is negative or not finite.
    """
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon: expected a finite number of at least 0, got {epsilon}")
    if orthogonalize or epsilon == 0:
        return householder.compact_wy(vectors.detach().cpu(), orthogonalize=orthogonalize)
    if vectors.ndim != 2 or not 1 <= vectors.shape[1] <= vectors.shape[0]:
        raise ValueError(f"expected vectors of shape (n, r) with 1 <= r <= n, got {tuple(vectors.shape)}")
    columns = vectors.detach().to("cpu", torch.float64)
    if not columns.isfinite().all():
        raise NumericalError("a vector of the chain is not finite")
    return householder.gathered(columns / (columns.square().sum(dim=0) + epsilon).sqrt())


def softness(vectors: Tensor, epsilon: float) -> float:
    """How far the softest reflection of a chain is from one: the largest ε / (‖u_i‖² + ε), between 0 and 1.

    Args:
        vectors: (n, r), any float dtype.
        epsilon: ε ≥ 0.
    """
    squares = vectors.detach().double().square().sum(dim=0)
    return float((epsilon / (squares + epsilon)).max()) if epsilon else 0.0
