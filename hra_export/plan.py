"""A merge plan: what every tensor of the merged checkpoint is made of.

A plan fixes names, dtypes, shapes, shards and, for each tensor, the segments of rows it is put together from: base
bytes, base rows times a chain, or an adapter's own values. Values only: `planning` makes one, `merge` carries it out
and decides nothing more.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.strength import Interpolation, linear_part
from hra_export.tensorfile import TensorInfo, tensor_bytes

DtypeChoice = Literal["keep", "float32", "bfloat16", "float16"]
STORED_DTYPES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Action = Literal["copy", "cast", "fold", "replace", "add", "untie"]


@dataclass(frozen=True)
class ChainSite:
    """One chain of one adapter: where a fold takes its reflections from."""

    adapter: int
    module: str


@dataclass(frozen=True)
class Segment:
    """A run of rows of an output tensor, seen as a matrix (n, columns).

    Attributes:
        start, stop: rows of the output.
        source: base tensor, or values from an adapter.
        source_start: the first row in the source.
        chains: the chains to fold, in order; none for a plain copy.
        transposed: the run is W stored (d, o): rows are input features, and R acts from the left.
    """

    start: int
    stop: int
    source: TensorInfo | Tensor
    source_start: int
    chains: tuple[ChainSite, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    action: Action

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The (rows, columns) in which segments count."""
        return matrix_shape(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the output."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One weight file of the output."""

    name: str
    tensors: tuple[OutputTensor, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do.

    Attributes:
        adapters: what is folded: those that were given, or one in their place that is their R^t.
        strength, interpolation: as asked for.
        config_changes: keys of `config.json` that must change for the merged tensors to be read rightly.
        notes: what a user should know about the plan, one sentence each.
    """

    base: Checkpoint
    adapters: tuple[HraAdapter, ...]
    shards: tuple[Shard, ...]
    strength: float
    dtype: DtypeChoice
    config_changes: Mapping[str, object]
    notes: tuple[str, ...]
    interpolation: Interpolation = "geodesic"

    @property
    def sources(self) -> tuple[HraAdapter, ...]:
        """The adapters as they were given."""
        return tuple(source for adapter in self.adapters for source in adapter.sources)

    @property
    def linear(self) -> float:
        """The factor of every ΔW."""
        return linear_part(self.strength, self.interpolation)

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """Every output tensor."""
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def count(self, action: Action) -> int:
        """How many tensors get this action."""
        return sum(tensor.action == action for tensor in self.tensors)

    def flop(self) -> int:
        """Multiplications and additions of all folds: 4·o·d·r for each."""
        total = 0
        for tensor in self.tensors:
            for segment in tensor.segments:
                rank = sum(self.adapters[site.adapter].chains[site.module].shape[1] for site in segment.chains)
                total += 4 * rank * (segment.stop - segment.start) * tensor.matrix_shape[1]
        return total


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as rows of a matrix: (o, rest); stacked experts (e, a, b) as (e·a, b)."""
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
