"""ΔW = B A: what formats of low-rank adapters take of any source, and what rounding the factors costs.

Chains before a layer give B = −(W U) T and A = Uᵀ, exactly and for this base alone. Near-parallel reflection vectors,
which every lightly trained adapter has, cancel in these factors; balanced ones lose what their dtype loses, no more.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hra_export import composition, householder
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.errors import MismatchError, UnsupportedModelError
from hra_export.householder import BlockReflector
from hra_export.rotation import decompose
from hra_export.target_weights import TargetWeight, find_targets


class DeltaSource(Protocol):
    """Whatever changes weights by W + B A, and what was trained beside it."""

    @property
    def label(self) -> str:
        """How messages call it."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files and directories, which no output may replace."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """Targets, as module paths."""
        ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Parameter name → its trained value."""
        ...

    @property
    def bias(self) -> str:
        """PEFT's `none`, `hra_only` or `all`."""
        ...

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that were trained whole."""
        ...

    @property
    def base(self) -> str | None:
        """`base_model_name_or_path`."""
        ...

    @property
    def task(self) -> str | None:
        """PEFT's `task_type`."""
        ...

    @property
    def model_class(self) -> str | None:
        """The class that was adapted."""
        ...

    @property
    def model_library(self) -> str | None:
        """The module that has this class."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about it, one sentence each."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides ΔW, hex."""
        ...

    def entries(self) -> list[dict[str, object]]:
        """How manifests name it, an entry for each adapter."""
        ...

    def misfit(self, weight: TargetWeight) -> str | None:
        """Why it cannot act on a weight, in one line; None when it can."""
        ...

    def rank(self, module: str) -> int:
        """The rank of ΔW at most; 0 when nothing changes. Needs no weight."""
        ...

    def factors(self, weight: TargetWeight) -> tuple[Tensor, Tensor]:
        """B (o, r) and A (r, d), float64, with ΔW = B A exactly; not balanced."""
        ...


class HraSource:
    """Adapters that compose in the order given: ΔW = s (W R_1 R_2 … − W).

    Args:
        adapters: at least one.
        strength: s. A part of a rotation is a change of the adapters themselves.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, adapters: Sequence[HraAdapter], *, strength: float = 1.0) -> None:
        self.adapters = tuple(adapters)
        self.strength = strength

    @property
    def label(self) -> str:
        """The adapters' own."""
        return ", ".join(f"`{adapter.label}`" for adapter in self.adapters)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The adapters' directories."""
        sources = (source for adapter in self.adapters for source in adapter.sources)
        return tuple(source.path for source in sources if source.path is not None)

    @property
    def modules(self) -> tuple[str, ...]:
        """Every target of any adapter."""
        return tuple(composition.modules_of(self.adapters))

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """Biases and saved modules.

        Raises:
            MismatchError: two adapters carry different values for one.
        """
        found, clashes = composition.parameters_of(self.adapters)
        if clashes:
            raise MismatchError(f"{self.label} do not compose", findings=clashes)
        return found

    @property
    def bias(self) -> str:
        """The widest of the adapters' settings."""
        return composition.bias_of(self.adapters)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Those of all adapters."""
        return composition.saved_modules_of(self.adapters)

    @property
    def base(self) -> str | None:
        """The first that an adapter names."""
        return next((adapter.base for adapter in self.adapters if adapter.base), None)

    @property
    def task(self) -> str | None:
        """The first adapter's."""
        return self.adapters[0].task

    @property
    def model_class(self) -> str | None:
        """The first adapter's."""
        return self.adapters[0].model_class

    @property
    def model_library(self) -> str | None:
        """The first adapter's."""
        return self.adapters[0].model_library

    @property
    def digest(self) -> str:
        """Over what tells the adapters from others, in order, and the strength."""
        described = [[adapter.identity for adapter in self.adapters], self.strength]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def entries(self) -> list[dict[str, object]]:
        """The adapters' own, and of what they were made of; with the part of ΔW that is taken, where it is one."""
        part = {} if self.strength == 1 else {"strength": self.strength, "interpolation": "linear"}
        return [{**entry, **part} for adapter in self.adapters for entry in adapter.entries()]

    def misfit(self, weight: TargetWeight) -> str | None:
        """U has a row for each column of W."""
        for adapter in self.adapters:
            vectors = adapter.chains.get(weight.module)
            if vectors is not None and vectors.shape[0] != weight.shape[1]:
                expected = f"expected U of shape ({weight.shape[1]}, r)"
                return f"{weight.module}: {expected}, got {tuple(vectors.shape)}"
        return None

    def rank(self, module: str) -> int:
        """The fewest reflections that give R: pairs of equal vectors do not count."""
        return decompose(self.reflector(module)).rank if self.strength else 0

    def reflector(self, module: str) -> BlockReflector:
        """R_1 R_2 … of a target, float64."""
        return composition.reflector_of(self.adapters, module)

    def factors(self, weight: TargetWeight) -> tuple[Tensor, Tensor]:
        """B = −s (W U) T and A = Uᵀ."""
        block = self.reflector(weight.module)
        return -self.strength * (weight.times(block.u) @ block.t), block.u.T


def locate(source: DeltaSource, base: Checkpoint) -> dict[str, TargetWeight]:
    """The weights that a source acts on, from headers only.

    Raises:
        MismatchError: targets without a weight in the base, or of another shape; all of them.
        UnsupportedModelError: a quantized base, a grouped convolution, a weight that is no matrix.
    """
    targets = find_targets(base, source.modules, task=source.task, model_class=source.model_class)
    findings = [finding for weight in targets.values() if (finding := source.misfit(weight)) is not None]
    if findings:
        _refuse_grouped(findings, targets)
        raise MismatchError(
            f"{source.label} does not fit base `{base.root}`: {len(findings)} targets have another shape",
            findings=findings,
        )
    return targets


def kept_parameters(source: DeltaSource, weights: Mapping[str, TargetWeight]) -> tuple[dict[str, Tensor], list[str]]:
    """What was trained beside the targets' chains or factors, by name, and the names of what nothing can stand for.

    The weight of a target that PEFT saved along needs no place where it is the base's own. Where it was trained, ΔW is
    that of another weight.
    """
    kept, retrained = {}, []
    for name, value in source.parameters.items():
        module, _, leaf = name.rpartition(".")
        if module not in weights or leaf != "weight":
            kept[name] = value
        elif not weights[module].is_value(value):
            retrained.append(name)
    return kept, retrained


def rounded(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, float]:
    """Factors of a given rank and dtype that lose least of a product.

    Args:
        left: B (o, r), float64.
        right: A (r, d), float64.
        rank: of the result; directions beyond the product's own are zeros.
        dtype: of the result, rounded to once.

    Returns:
        B (o, rank), A (rank, d), ‖B A after − B A before‖ / ‖B A‖, and ‖B A‖. The error is 0 where ‖B A‖ is, and
        infinite where the dtype overflows.
    """
    exact_left, exact_right = householder.balanced(left, right)
    norm = _product_norm(exact_left, exact_right)
    kept_left, kept_right = _columns(exact_left, rank).to(dtype), _columns(exact_right.T, rank).T.to(dtype)
    if not (kept_left.isfinite().all() and kept_right.isfinite().all()):
        return kept_left, kept_right, float("inf"), norm
    # B' A' − B A = (B' − B) A' + B (A' − A), in which nothing cancels.
    width = max(rank, exact_left.shape[1])
    before_left, before_right = _columns(exact_left, width), _columns(exact_right.T, width).T
    after_left, after_right = _columns(kept_left.double(), width), _columns(kept_right.double().T, width).T
    lost = _product_norm(
        torch.cat([after_left - before_left, before_left], dim=1),
        torch.cat([after_right, after_right - before_right], dim=0),
    )
    return kept_left.contiguous(), kept_right.contiguous(), lost / norm if norm else 0.0, norm


def _columns(matrix: Tensor, count: int) -> Tensor:
    """The first columns, with zeros behind where there are fewer."""
    missing = count - matrix.shape[1]
    return matrix[:, :count] if missing <= 0 else torch.nn.functional.pad(matrix, (0, missing))


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left · right‖_F of thin matrices."""
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return float(torch.linalg.matrix_norm(core))


def _refuse_grouped(findings: Sequence[str], targets: Mapping[str, TargetWeight]) -> None:
    grouped = [line for line in findings if targets[line.partition(":")[0]].kind == "conv2d"]
    if grouped:
        raise UnsupportedModelError(
            "convolutions that do not fit: HRA defines no chain for grouped ones", findings=grouped
        )
