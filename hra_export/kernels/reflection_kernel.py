"""The device code of the forward pass: one kernel, which `hra_export.kernels.forward` launches.

A program owns a tile of ROWS rows and a slice of the columns of z. PHASE says how it comes to the coefficients of its
rows: ALONE, over a barrier (TOGETHER), or as two launches (PARTIAL, then FINISH).

Letters: n rows, d columns of x, r rank; RANK is r, padded with zeros to a power of 2. Tiles of one row multiply and add
in registers; larger ones use tensor cores, but for float32, whose products are IEEE's. OPERAND is the dtype that
products of tiles take: x's own, but float32 in the interpreter, which takes the bits of bfloat16 for integers.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# Triton gives these functions their types; `untyped-decorator` is its decorator, which has none.
# ruff: noqa: N803  capital names are Triton's custom for what is constant when a kernel is compiled

import triton
import triton.language as tl

ALONE: tl.constexpr = tl.constexpr(0)
PARTIAL: tl.constexpr = tl.constexpr(1)
FINISH: tl.constexpr = tl.constexpr(2)
TOGETHER: tl.constexpr = tl.constexpr(3)
# Inner dimension of a float32 product: both operands of a step lie in registers, whole.
STEP: tl.constexpr = tl.constexpr(16)


@triton.jit
def _coefficients_of_slice(
    x_row, row_is_real, x_column, u_rank, rank_is_real, u_column, first, last,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """x U over columns first … last: (ROWS, RANK), float32."""
    column = tl.arange(0, COLUMNS)
    if ROWS == 1:
        products = tl.zeros((RANK, COLUMNS), tl.float32)
        for start in range(first, last, COLUMNS):
            here = start + column
            inside = (here < last)[None, :]
            x = tl.load(x_row + here[None, :].to(tl.int64) * x_column, mask=row_is_real & inside, other=0.0)
            u = tl.load(u_rank + here[None, :] * u_column, mask=rank_is_real & inside, other=0.0)
            products += x.to(tl.float32) * u.to(tl.float32)
        sums = tl.sum(products, axis=1)[None, :]
    else:
        sums = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(first, last, COLUMNS):
            here = start + column
            inside = (here < last)[None, :]
            x = tl.load(x_row + here[None, :].to(tl.int64) * x_column, mask=row_is_real & inside, other=0.0)
            u = tl.load(u_rank + here[None, :] * u_column, mask=rank_is_real & inside, other=0.0)
            sums = tl.dot(x.to(OPERAND), tl.trans(u).to(OPERAND), sums, input_precision="ieee")
    return sums


@triton.jit
def _times(left, matrix, stride, column, r, inside, ROWS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """left (ROWS, RANK) times rows 0 … r of a float32 matrix, at WIDTH columns; IEEE products, STEP rows at a time."""
    steps = tl.reshape(left, (ROWS, RANK // STEP, STEP))
    which = tl.arange(0, RANK // STEP)[None, :, None]
    product = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.static_range(RANK // STEP):
        part = tl.sum(tl.where(which == i, steps, 0.0), axis=1)  # (ROWS, STEP)
        row = i * STEP + tl.arange(0, STEP)[:, None]
        block = tl.load(matrix + row * stride + column, mask=(row < r) & inside, other=0.0)
        product = tl.dot(part, block, product, input_precision="ieee")
    return product


@triton.jit
def _through_s(sums, s, s_row, s_column, r, ROWS: tl.constexpr, RANK: tl.constexpr):
    """(x U) S: (ROWS, RANK), float32."""
    rank = tl.arange(0, RANK)
    if ROWS == 1:
        row = rank[:, None]
        block = tl.load(s + row * s_row + rank[None, :] * s_column, mask=(row < r) & (rank < r)[None, :], other=0.0)
        product = tl.sum(tl.trans(sums) * block, axis=0)[None, :]
    else:
        product = _times(sums, s, s_row, rank[None, :] * s_column, r, (rank < r)[None, :], ROWS, RANK, RANK)
    return product


@triton.jit
def _meet(counter):
    """Wait for the programs of the same tile, all programs of grid axis 1.

    The programs of one meeting add 2^31 in all, so the sign turns when the last one arrives, and the counter serves the
    next meeting as it is, whatever its size. This is the grid barrier of CUDA's cooperative groups; PyTorch's Inductor
    has it as `x_grid_barrier`.
    """
    tl.debug_barrier()  # the partial sums of all threads are written
    first = 0x7FFFFFFF - (tl.num_programs(1) - 2)  # 2^31 less one for each of the others
    before = tl.atomic_add(counter, tl.where(tl.program_id(1) == 0, first, 1), sem="acq_rel", scope="gpu")
    now = before
    while (before ^ now) >= 0:  # the same sign
        now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _sum_of_splits(partials, SPLITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    """The partial sums (SPLITS, ROWS, RANK) of a tile, added in an order that depends on the launch alone."""
    split = tl.arange(0, GROUP)[:, None, None] * (ROWS * RANK)
    place = split + tl.arange(0, ROWS)[None, :, None] * RANK + tl.arange(0, RANK)[None, None, :]
    sums = tl.zeros((ROWS, RANK), tl.float32)
    for group in tl.static_range(SPLITS // GROUP):
        # .cg: other processors wrote it, and the L1 cache does not see that
        block = tl.load(partials + group * GROUP * ROWS * RANK + place, cache_modifier=".cg")
        sums += tl.sum(block, axis=0)
    return sums


@triton.jit
def _finish_slice(
    x_row, row_is_real, x_column, u, u_stride, u_column, z_row, coefficients, is_known, first, last, r,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """z = x − coefficients Uᵀ at columns first … last; NaN where the chain is not known."""
    dtype = z_row.dtype.element_ty
    rank = tl.arange(0, RANK)[:, None]
    column = tl.arange(0, COLUMNS)
    for start in range(first, last, COLUMNS):
        here = start + column
        inside = (here < last)[None, :]
        x = tl.load(x_row + here[None, :].to(tl.int64) * x_column, mask=row_is_real & inside, other=0.0)
        if ROWS > 1 and dtype == tl.float32:
            update = _times(
                coefficients, u, u_stride, here[None, :] * u_column, r, inside & is_known, ROWS, RANK, COLUMNS
            )
        else:
            block = tl.load(
                u + rank * u_stride + here[None, :] * u_column, mask=(rank < r) & inside & is_known, other=0.0
            )
            if ROWS == 1:
                update = tl.sum(tl.trans(coefficients) * block.to(tl.float32), axis=0)[None, :]
            else:
                update = tl.dot(coefficients.to(dtype).to(OPERAND), block.to(OPERAND))
        z = tl.where(is_known, x.to(tl.float32) - update, float("nan"))
        tl.store(z_row + here[None, :], z.to(dtype), mask=row_is_real & inside)


@triton.jit(do_not_specialize=["rows", "rows_of_chain", "inner", "chains", "r"])
def reflection_kernel(
    x,  # (n, d); row i lies at (i // inner) · x_outer + (i % inner) · x_inner
    u,  # (d, r), or (chains, d, r) with an index
    s,  # (r, r), or (chains, r, r), float32
    z,  # (n, d) in one piece
    m,  # (r, n) in one piece
    index,  # the chain of each rows_of_chain rows, int64
    partials,  # (tiles, SPLITS, ROWS, RANK) float32: x U over the columns of a split
    counters,  # (tiles,) int32, one for each meeting
    rows, rows_of_chain, inner, chains, d, r, slice_columns,
    x_outer, x_inner, x_column, u_chain, u_stride, u_column, s_chain, s_row, s_column,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    PHASE: tl.constexpr, INDEXED: tl.constexpr, WRITES_Z: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): the rows of the tile, the columns of the split."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_of_chain = tl.cdiv(rows_of_chain, ROWS)
    shared = tile // tiles_of_chain  # rows that share an entry of the index
    row = shared * rows_of_chain + (tile % tiles_of_chain) * ROWS + tl.arange(0, ROWS)[:, None]
    row_is_real = row < (shared + 1) * rows_of_chain
    x_row = x + (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner  # (ROWS, 1)
    is_known = True
    if INDEXED:
        chain = tl.load(index + shared)
        is_known = (chain >= 0) & (chain < chains)
        chain = tl.where(is_known, chain, 0)
        u += chain * u_chain
        s += chain * s_chain
    rank = tl.arange(0, RANK)[:, None]
    rank_is_real = (rank < r) & is_known
    partials += (tile * SPLITS).to(tl.int64) * (ROWS * RANK)
    first = split * slice_columns
    last = tl.minimum(first + slice_columns, d)

    if PHASE == ALONE:
        sums = _coefficients_of_slice(
            x_row,
            row_is_real,
            x_column,
            u + rank * u_stride,
            rank_is_real,
            u_column,
            0,
            d,
            ROWS,
            RANK,
            COLUMNS,
            OPERAND,
        )
    if PHASE == PARTIAL or PHASE == TOGETHER:  # noqa: SIM109  Triton knows no `in`
        part = _coefficients_of_slice(
            x_row,
            row_is_real,
            x_column,
            u + rank * u_stride,
            rank_is_real,
            u_column,
            first,
            last,
            ROWS,
            RANK,
            COLUMNS,
            OPERAND,
        )
        place = tl.arange(0, ROWS)[:, None] * RANK + tl.arange(0, RANK)[None, :]
        tl.store(partials + split * (ROWS * RANK) + place, part)
    if PHASE == TOGETHER:
        _meet(counters + tile)
    if PHASE == FINISH or PHASE == TOGETHER:  # noqa: SIM109  the same
        sums = _sum_of_splits(partials, SPLITS, GROUP, ROWS, RANK)
    if PHASE != PARTIAL:
        coefficients = _through_s(sums, s, s_row, s_column, r, ROWS, RANK)
        if split == 0:
            column = tl.arange(0, RANK)[None, :]
            kept = tl.where(is_known, coefficients, float("nan")).to(m.dtype.element_ty)
            tl.store(m + column.to(tl.int64) * rows + row, kept, mask=(column < r) & row_is_real)
        if WRITES_Z:
            _finish_slice(
                x_row,
                row_is_real,
                x_column,
                u,
                u_stride,
                u_column,
                z + row.to(tl.int64) * d,
                coefficients,
                is_known,
                first,
                last,
                r,
                ROWS,
                RANK,
                COLUMNS,
                OPERAND,
            )
