"""A merge plan for chains that HRA cannot hold: softened ones, and those that act after their layers.

A fold takes any chain I − V T Vᵀ, whatever its norms. After the layer it is W' = Pᵀ W, and so W'ᵀ = Wᵀ P: the fold of a
weight that is stored the other way round. Only the orientation of the planned segments changes.

Limits: after a layer, chains mix the rows of the layer, so that these must lie together and in order in one tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from hra_export import names
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.errors import UnsupportedModelError
from hra_export.householder import BlockReflector
from hra_export.locator import Locator
from hra_export.low_rank import locate
from hra_export.official.soft_chain import SoftSource
from hra_export.plan import DtypeChoice, MergePlan, OutputTensor, Segment, Shard
from hra_export.planning import plan_merge


@dataclass(frozen=True)
class _Placed(HraAdapter):
    """A soft source in the place of an adapter: its chains are shapes, the reflectors are the source's own."""

    soft: SoftSource = field(kw_only=True)

    def reflector(self, module: str, *, dtype: torch.dtype = torch.float64) -> BlockReflector:
        """I − V T Vᵀ, not orthogonal where V is soft."""
        return self.soft.reflector(module).to("cpu", dtype)

    def entry(self) -> dict[str, object]:
        """The source's own."""
        return self.soft.entries()[0]


def plan_soft_merge(
    base: Checkpoint, source: SoftSource, *, dtype: DtypeChoice = "keep", max_shard_bytes: int | None = None
) -> MergePlan:
    """Decide what every output tensor is made of; `merge.merge_checkpoint` carries it out.

    Args:
        base: as opened by `open_checkpoint`.
        source: with its strength.
        dtype: as `plan_merge`.
        max_shard_bytes: as `plan_merge`.

    Raises:
        MismatchError: a chain or parameter has no place in the base, or the wrong shape; all of them.
        NumericalError: a chain cannot be computed.
        UnsupportedModelError: as `plan_merge`; or the rows of a layer do not lie together in one tensor.
    """
    weights = locate(source, base)
    ranks = {module: vectors.shape[1] for module, vectors in source.chains.items()}
    adapter = _Placed(
        {module: torch.empty(weights[module].shape[1], ranks[module], device="meta") for module in source.chains},
        max(ranks.values()),
        source.orthogonalize,
        parameters=source.parameters,
        bias=source.bias,
        modules_to_save=source.modules_to_save,
        base=source.base,
        task=source.task,
        model_class=source.model_class,
        model_library=source.model_library,
        path=source.path,
        digest=source.digest,
        soft=source,
    )
    plan = plan_merge(
        base,
        [adapter],
        strength=source.strength,
        interpolation="linear",
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    plan = replace(plan, notes=(*source.notes, *plan.notes))
    if source.side == "input":
        return plan
    _refuse_scattered(base, source)
    return replace(plan, shards=tuple(_turned(shard) for shard in plan.shards))


def _turned(shard: Shard) -> Shard:
    """The same shard with every fold on the other side."""
    return replace(shard, tensors=tuple(replace(tensor, segments=_turned_segments(tensor)) for tensor in shard.tensors))


def _turned_segments(tensor: OutputTensor) -> tuple[Segment, ...]:
    return tuple(
        replace(segment, transposed=not segment.transposed) if segment.chains else segment
        for segment in tensor.segments
    )


def _refuse_scattered(base: Checkpoint, source: SoftSource) -> None:
    locator = Locator(base, source.task, source.model_class)
    findings = []
    for module in source.modules:
        regions = locator.find(module, names.weight_name(module)).regions
        pieces = [piece for region in regions for piece in region.pieces]
        if len(regions) > 1 or len(pieces) > 1 or any(_steps(piece.index) for piece in pieces):
            tensors = ", ".join(f"`{region.tensor}`" for region in regions)
            findings.append(f"{module}: its rows lie apart, or in another order, in {tensors}")
    if findings:
        raise UnsupportedModelError(
            "chains after a layer mix its rows, and these cannot be folded where they lie",
            findings=findings,
            hint="`--to lora` holds them",
        )


def _steps(index: Iterable[range]) -> bool:
    return any(span.step != 1 for span in index)
