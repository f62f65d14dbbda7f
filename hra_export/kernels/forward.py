"""The reflection on a GPU: z = x − ((x U) S) Uᵀ and M = ((x U) S)ᵀ, in one launch, or in two.

    reflect(x, u, s)                one chain for all rows
    reflect_rows(x, index, u, s)    chain index[i] for x[i], of chains that are stacked
    coefficients(x, u, s)           M alone

With Sᵀ for S, `reflect` makes ∂x of ∂z, and `coefficients` K.

One kernel serves all. A program owns a tile of rows and a slice of the columns of z. It needs all r coefficients of
its rows, and there are three ways to them (`hra_export.kernels.tuning` chooses):

    alone      each program reads all d columns of x and U for itself, all but the first from the L2 cache. No program
               waits for another. For many rows (one program a tile), and where U is small
    together   each program multiplies its slice alone, leaves the (rows, r) partial sums in memory, waits at a barrier
               for the others of its tile, and adds all partial sums in a fixed order: no atomic adds of floats, so
               equal calls give equal bits. The launch is cooperative: all programs are on the GPU at the same time
    in turn    the same as two launches, where a barrier cannot be: in Triton's interpreter, which runs one program
               after another, and for more tiles than there are counters

What must be moved is x once, z once and U once: (2 n + r) d elements. At the 3.35 TB/s of an H100, in bfloat16:

    n = 1, d = 4096, r = 8         82 kB     0.02 µs    a launch in a CUDA graph takes 1.5 to 2.5 µs: latency is all
    n = 1, d = 14336, r = 64       1.9 MB    0.57 µs
    n = 64, d = 14336, r = 128     7.3 MB    2.2 µs
    n = 4096, d = 4096, r = 32     67 MB     20 µs      x is read a second time, from L2: 132 tiles of 32 rows are 35 MB

Beside the launch, a program that is alone takes U from L2 at about 64 bytes a clock: 0.6 µs for 64 kB. A meeting in
memory (write, arrive, see the last arrival, read) takes about 1 µs. These times are reckoned, not measured.

All sums are float32. Products of float32 are IEEE's, not TF32's. Half-precision coefficients are rounded to the dtype
of x before they meet Uᵀ, as in the plain version; in tiles of one row they stay float32.

Limits: float32, float16, bfloat16; r ≤ 128; less than 2³¹ rows. Any strides, but leading dimensions of x that two
strides cannot describe are copied. Importing this file imports Triton.
"""

import functools
import math
from contextlib import nullcontext

import torch
from torch import Tensor

from hra_export.kernels import barriers, tuning
from hra_export.kernels.operands import IS_COMPILED, operand
from hra_export.kernels.reflection_kernel import ALONE, FINISH, PARTIAL, TOGETHER, reflection_kernel
from hra_export.kernels.tuning import Gpu, Launch, Shape

# Partial sums that a program reads at once, float32: 64 registers of each of 128 threads.
GATHERED = 8192
# For Triton's interpreter, which runs on CPUs: an H100's.
INTERPRETER = Gpu("interpreter", 132)


def reflect(x: Tensor, u: Tensor, s: Tensor, *, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """z = x − ((x U) S) Uᵀ.

    Args:
        x: (…, d), float32, float16 or bfloat16, any strides.
        u: (d, r), of x's dtype; fastest when stored as Uᵀ.
        s: (r, r), float32, any strides.
        launch: how; chosen if None.

    Returns:
        z (…, d), and M = Sᵀ Uᵀ xᵀ (r, n), both of x's dtype and in one piece.
    """
    return _reflected(x, None, u, s, launch)


def reflect_rows(
    x: Tensor, index: Tensor, u: Tensor, s: Tensor, *, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """z[i] = x[i] − ((x[i] U) S) Uᵀ with U and S of chain index[i].

    Args:
        x: (b, …, d), float32, float16 or bfloat16, any strides.
        index: (b,), int64, on x's device. Rows whose entry is not in 0 … a − 1 become NaN; nothing is read for them.
        u: (a, d, r), of x's dtype; fastest when stored as Uᵀ.
        s: (a, r, r), float32.
        launch: how; chosen if None.

    Returns:
        z (b, …, d), and M (r, n), both of x's dtype and in one piece.
    """
    return _reflected(x, index.contiguous(), u, s, launch)


def coefficients(x: Tensor, u: Tensor, s: Tensor, *, launch: Launch | None = None) -> Tensor:
    """M = Sᵀ Uᵀ xᵀ (r, n), in x's dtype; arguments as for `reflect`."""
    return _reflected(x, None, u, s, launch, writes_z=False)[1]


def _reflected(
    x: Tensor, index: Tensor | None, u: Tensor, s: Tensor, launch: Launch | None, *, writes_z: bool = True
) -> tuple[Tensor, Tensor]:
    _check_fit(x, u, s)
    rows = math.prod(x.shape[:-1])
    m = x.new_empty(u.shape[-1], rows)
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device) if writes_z else m
    if rows == 0:
        return z, m
    groups = 1 if index is None else len(index)
    shape = Shape(groups, rows // groups, x.shape[-1], u.shape[-1], x.element_size())
    if launch is None:
        launch = tuning.choose(shape, _gpu(x.device))
        if not writes_z and launch.exchange == "alone":
            launch = Launch(launch.tile, 1, "alone")  # other splits would have columns of z to write, and nothing else
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _run(launch, shape, x, index, u, s, z, m)
    return z, m


def _check_fit(x: Tensor, u: Tensor, s: Tensor) -> None:
    """A kernel would read beyond the end of what is too small.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    d, r = u.shape[-2:]
    if x.shape[-1] != d or s.shape[-2:] != (r, r):
        raise ValueError(f"expected x (…, {d}) and s ({r}, {r}), got {tuple(x.shape)} and {tuple(s.shape[-2:])}")
    if x.dtype != u.dtype or not x.device == u.device == s.device:
        found = ", ".join(f"{value.dtype} on {value.device}" for value in (x, u, s))
        raise ValueError(f"expected x and U of one dtype, and S beside them on their device, got {found}")


def _run(
    launch: Launch, shape: Shape, x: Tensor, index: Tensor | None, u: Tensor, s: Tensor, z: Tensor, m: Tensor
) -> None:
    """Write m, and z unless it is m."""
    tile, splits = launch.tile, launch.splits
    rank = tuning.padded_rank(shape.rank, rows=tile.rows)
    tiles = tuning.count_tiles(shape, tile)
    partials, meeting, phases = m, None, [ALONE]  # m stands in for what is not used
    if launch.exchange != "alone":
        partials = x.new_empty(tiles * splits * tile.rows * rank, dtype=torch.float32)
        if launch.exchange == "together" and IS_COMPILED and tiles <= tuning.MOST_TILES_TOGETHER:
            meeting = barriers.counters(x.device, tiles)
        phases = [PARTIAL, FINISH] if meeting is None else [TOGETHER]
    inner, x_outer, x_inner, x = _rows_of(x)
    for phase in phases:
        reflection_kernel[tiles, splits](
            x,
            u,
            s,
            z,
            m,
            m if index is None else index,
            partials,
            m if meeting is None else meeting,
            m.shape[1],
            shape.rows,
            inner,
            1 if index is None else len(u),
            shape.features,
            shape.rank,
            math.ceil(shape.features / tile.columns / splits) * tile.columns,
            x_outer,
            x_inner,
            x.stride(-1),
            0 if index is None else u.stride(0),
            u.stride(-1),
            u.stride(-2),
            0 if index is None else s.stride(0),
            s.stride(-2),
            s.stride(-1),
            ROWS=tile.rows,
            RANK=rank,
            COLUMNS=tile.columns,
            SPLITS=splits,
            GROUP=group_of(splits, tile.rows * rank),
            PHASE=phase.value,
            INDEXED=index is not None,
            WRITES_Z=z is not m,
            OPERAND=operand(x.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
            launch_cooperative_grid=phase.value == TOGETHER.value,  # a bool: Triton keeps options as JSON
        )


def group_of(splits: int, sums: int) -> int:
    """How many splits' partial sums a program reads at once, a power of 2."""
    return max(1, min(splits, GATHERED // sums))


def _rows_of(x: Tensor) -> tuple[int, int, int, Tensor]:
    """Row i of x (…, d) lies at (i // inner) · outer stride + (i % inner) · inner stride.

    Returns:
        inner, both strides, and x, or a copy of it where two strides are not enough.
    """
    merged: list[tuple[int, int]] = []  # size and stride
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return _rows_of(x.contiguous())
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *merged][-2:]
    return inner, outer, stride, x


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return Gpu(f"sm{found.major}{found.minor}", found.multi_processor_count)
