"""How the forward kernel is launched: tiles, splits, warps; by kind of GPU, rows, features, rank and dtype.

    choose(shape, device)     what was measured for this case (`MEASURED`), else what is reasoned (`reasoned`)

Nothing has been measured yet: `MEASURED` is empty, and `python -m benchmarks.tune_gpu` prints lines for it. All else in
this file is reasoned:

- **Tiles.** A half-precision product on tensor cores has 16 rows at least; a single row is multiplied in registers.
  Products of float32 take no tensor cores, so that padding costs: up to 8 rows are tiles of one. Larger tiles read U
  less often, which counts from r = 64 on; smaller ones leave x in the L2 cache between its two reads:
  132 tiles × 32 rows × 4096 × 2 bytes = 35 MB of H100's 50 MB.
- **Steps.** What one step of a loop has in flight, stages × (rows + r) × columns, is 16 to 48 kB a program: by Little's
  law H100 needs 3.35 TB/s × 0.6 µs / 132 = 15 kB a processor.
- **Splits.** As many programs as processors, no more: they are all there at the same time, as a barrier asks.
- **Alone or together.** A program alone takes all of U from L2, r·d elements at about 64 bytes a clock; together it
  takes a part, and a meeting, about 1 µs or 1700 clocks: even at 110 kB. With P splits a program reads U's r·d/P
  elements and P partial sums of rows × r float32; the sum of both is smallest at P = √(d · bytes / (4 · rows)).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Exchange = Literal["alone", "together", "in turn"]

# From here on U is multiplied in parts: reading it costs a program more than a meeting.
SHARED_BYTES = 112 * 1024
# Elements of U that a single-row program holds in registers in one step; 32 of each of 256 threads.
SINGLE_ROW_STEP = 8192
MAX_RANK = 128


@dataclass(frozen=True)
class Shape:
    """One call.

    Attributes:
        groups: entries of the index, or 1.
        rows: of x for each entry, or all.
        features: d.
        rank: r, 1 … 128.
        itemsize: bytes of an element of x, 2 or 4.
    """

    groups: int
    rows: int
    features: int
    rank: int
    itemsize: int


@dataclass(frozen=True)
class Gpu:
    """What counts of a GPU: compute capability, as in `sm90`, and processors."""

    kind: str
    processors: int


@dataclass(frozen=True)
class Tile:
    """What one program handles at a time.

    Attributes:
        rows: of a tile.
        columns: of one step.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """A tile, how many programs share its columns, and how they come to the coefficients.

    Attributes:
        splits: a power of 2.
        exchange: see `hra_export.kernels.forward`.
    """

    tile: Tile
    splits: int
    exchange: Exchange


@dataclass(frozen=True)
class Case:
    """The key of a measured launch: a kind of GPU and powers of 2, rounded up, of what `Shape` holds."""

    kind: str
    groups: int
    rows: int
    features: int
    rank: int
    itemsize: int

    @classmethod
    def of(cls, shape: Shape, gpu: Gpu) -> "Case":
        """The case of a call."""
        groups, rows, features, rank = map(power_of_2, (shape.groups, shape.rows, shape.features, shape.rank))
        return cls(gpu.kind, groups, rows, features, rank, shape.itemsize)


# Measured on a GPU, by benchmarks/tune_gpu.py. None yet.
MEASURED: Mapping[Case, Launch] = {}

# By bytes of an element and the padded rank, for tiles of more than one row: first for up to 64 rows, then for many.
FEW_ROWS: Mapping[tuple[int, int], Tile] = {
    (2, 16): Tile(rows=16, columns=128, warps=4, stages=4),
    (2, 32): Tile(rows=16, columns=128, warps=4, stages=4),
    (2, 64): Tile(rows=16, columns=64, warps=4, stages=4),
    (2, 128): Tile(rows=16, columns=64, warps=4, stages=3),
    (4, 16): Tile(rows=16, columns=32, warps=4, stages=4),
    (4, 32): Tile(rows=16, columns=32, warps=4, stages=4),
    (4, 64): Tile(rows=16, columns=32, warps=4, stages=3),
    (4, 128): Tile(rows=16, columns=32, warps=8, stages=3),
}
MANY_ROWS: Mapping[tuple[int, int], Tile] = {
    (2, 16): Tile(rows=32, columns=128, warps=4, stages=3),
    (2, 32): Tile(rows=32, columns=128, warps=4, stages=3),
    (2, 64): Tile(rows=64, columns=64, warps=4, stages=3),
    (2, 128): Tile(rows=32, columns=64, warps=8, stages=3),
    (4, 16): Tile(rows=32, columns=32, warps=4, stages=3),
    (4, 32): Tile(rows=32, columns=32, warps=4, stages=3),
    (4, 64): Tile(rows=32, columns=32, warps=8, stages=3),
    (4, 128): Tile(rows=32, columns=32, warps=8, stages=3),
}
# Rows that decoding has at most; above, tiles grow.
FEW = 64
# Up to so many rows are tiles of one, by bytes of an element.
SINGLE = {2: 1, 4: 8}
# Tiles that a slot of barrier counters serves, see `hra_export.kernels.barriers`.
MOST_TILES_TOGETHER = 32


def choose(shape: Shape, gpu: Gpu) -> Launch:
    """The launch for a call."""
    return MEASURED.get(Case.of(shape, gpu)) or reasoned(shape, gpu)


def reasoned(shape: Shape, gpu: Gpu) -> Launch:
    """The launch that the arguments at the top of this file lead to."""
    tile = reasoned_tile(shape)
    tiles = count_tiles(shape, tile)
    steps = math.ceil(shape.features / tile.columns)
    most = max(1, min(gpu.processors // tiles, steps))
    if 2 * tiles >= gpu.processors or most == 1:
        return Launch(tile, 1, "alone")
    if shape.rank * shape.features * shape.itemsize <= SHARED_BYTES:
        return Launch(tile, power_of_2(most, up=False), "alone")
    best = math.sqrt(shape.features * shape.itemsize / (4 * min(tile.rows, shape.rows)))
    splits = power_of_2(max(2, min(most, round(best))), up=False)
    return Launch(tile, splits, "together" if tiles <= MOST_TILES_TOGETHER else "in turn")


def reasoned_tile(shape: Shape) -> Tile:
    """The tile for a call."""
    if shape.rows <= SINGLE[shape.itemsize]:
        return single_row_tile(shape.rank, shape.features)
    table = FEW_ROWS if shape.rows <= FEW else MANY_ROWS
    return table[shape.itemsize, padded_rank(shape.rank, rows=2)]


def single_row_tile(rank: int, features: int) -> Tile:
    """A tile of one row."""
    columns = min(1024, SINGLE_ROW_STEP // padded_rank(rank, rows=1), power_of_2(features))
    return Tile(rows=1, columns=max(16, columns), warps=8, stages=2)


def padded_rank(rank: int, *, rows: int) -> int:
    """RANK of the kernel: a power of 2, and at least 16 where it is a side of a product of tiles."""
    return power_of_2(rank) if rows == 1 else max(16, power_of_2(rank))


def count_tiles(shape: Shape, tile: Tile) -> int:
    """Tiles of a call; a tile has rows of one entry of the index."""
    return shape.groups * math.ceil(shape.rows / tile.rows)


def power_of_2(number: int, *, up: bool = True) -> int:
    """The next power of 2 from a positive number, upwards or downwards, the number itself included."""
    return 1 << ((number - 1).bit_length() if up else number.bit_length() - 1)
