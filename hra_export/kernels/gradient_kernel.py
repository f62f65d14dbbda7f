"""The device code of the backward pass: two kernels, which `hra_export.kernels.gradient` launches.

    accumulate    gᵀM + xᵀK, MᵀK and the lengths of the vectors, in partial sums
    finish        adds them up, and makes ∂U of them

Letters: n rows, d features, r rank; RANK is r, padded with zeros to a power of 2, at least 16. Thin matrices lie down:
M, K (r, n), U (r, d). A program of `accumulate` owns COLUMNS features and a split of the rows, and goes through those
ROWS at a time; behind the programs for the d features come those for the r columns of MᵀK.
"""
# ruff: noqa: N803  compile-time constants are capitals, as in Triton's own kernels
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# Triton gives these functions their types; `untyped-decorator` is its decorator, which has none.

import triton
import triton.language as tl

# Inner dimension of a float32 product: both operands of a step lie in registers, whole.
STEP: tl.constexpr = tl.constexpr(16)


@triton.jit(do_not_specialize=["r"])
def accumulate(
    grads, grads_row, grads_column,  # g (n, d)
    x, x_row, x_column,  # (n, d)
    m, k, u,  # (r, n), (r, n), (r, d)
    vectors, vectors_row, vectors_column,  # (d, r)
    partials,  # (splits, r, d) float32: M g + K x over the rows of a split
    grams,  # (splits, r, r) float32: M Kᵀ over the rows of a split
    lengths,  # (tiles, r) float32: uᵢᵀûᵢ over the features of a tile
    n, d, r, rows_of_split,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Program (tile, split)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(d, COLUMNS)
    rank = tl.arange(0, RANK)[:, None]
    rank_is_real = rank < r
    m += rank.to(tl.int64) * n  # r n can be 2³¹ and more
    first = split * rows_of_split
    last = tl.minimum(first + rows_of_split, n)
    sums = tl.zeros((RANK, COLUMNS), tl.float32)
    if tile < tiles:
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        far = column.to(tl.int64)
        inside = rank_is_real & (column < d)
        if split == 0:
            unit = tl.load(u + rank * d + column, mask=inside, other=0.0).to(tl.float32)
            vector = tl.load(vectors + rank * vectors_column + column * vectors_row, mask=inside, other=0.0)
            length = tl.sum(vector.to(tl.float32) * unit, axis=1, keep_dims=True)
            tl.store(lengths + tile * r + rank, length, mask=rank_is_real)
        for start in range(first, last, ROWS):
            down = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
            across = (start + tl.arange(0, ROWS))[None, :]
            here, thin = (down < last) & (column < d), rank_is_real & (across < last)
            g = tl.load(grads + down * grads_row + far * grads_column, mask=here, other=0.0).to(OPERAND)
            a = tl.load(x + down * x_row + far * x_column, mask=here, other=0.0).to(OPERAND)
            of_x = tl.load(m + across, mask=thin, other=0.0).to(OPERAND)
            of_g = tl.load(k + rank.to(tl.int64) * n + across, mask=thin, other=0.0).to(OPERAND)
            sums = tl.dot(of_x, g, sums, input_precision="ieee")
            sums = tl.dot(of_g, a, sums, input_precision="ieee")
        tl.store(partials + split * r * d + rank * d + column, sums, mask=inside)
    else:
        column = (tile - tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        for start in range(first, last, ROWS):
            down = (start + tl.arange(0, ROWS))[:, None]
            across = (start + tl.arange(0, ROWS))[None, :]
            of_x = tl.load(m + across, mask=rank_is_real & (across < last), other=0.0).to(OPERAND)
            of_g = tl.load(k + column.to(tl.int64) * n + down, mask=(column < r) & (down < last), other=0.0).to(OPERAND)
            sums = tl.dot(of_x, of_g, sums, input_precision="ieee")
        tl.store(grams + split * r * r + rank * r + column, sums, mask=rank_is_real & (column < r))


@triton.jit(do_not_specialize=["r", "splits", "tiles"])
def finish(
    partials, grams, lengths, u,  # as in `accumulate`
    grad_vectors,  # (d, r)
    d, r, splits, tiles,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """∂Uᵀ (r, COLUMNS) = (sym(C) Ûᵀ − M g − K x) / ‖uᵢ‖, C = M Kᵀ; a program for each tile of COLUMNS features."""
    rank = tl.arange(0, RANK)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rank < r) & (column < d)
    sums = tl.zeros((RANK, COLUMNS), tl.float32)
    for split in range(splits):
        sums -= tl.load(partials + split * r * d + rank * d + column, mask=inside, other=0.0)
    for start in range(0, r, STEP):
        across = start + tl.arange(0, STEP)[None, :]
        down = start + tl.arange(0, STEP)[:, None]
        mirrored = tl.maximum(rank, across) * r + tl.minimum(rank, across)  # the lower triangle twice
        c = tl.zeros((RANK, STEP), tl.float32)
        for split in range(splits):
            c += tl.load(grams + split * r * r + mirrored, mask=(rank < r) & (across < r), other=0.0)
        unit = tl.load(u + down * d + column, mask=(down < r) & (column < d), other=0.0).to(tl.float32)
        sums = tl.dot(c, unit, sums, input_precision="ieee")
    length = tl.zeros((RANK, 1), tl.float32)
    for start in range(0, tiles, STEP):
        across = start + tl.arange(0, STEP)[None, :]
        mask = (rank < r) & (across < tiles)
        length += tl.sum(tl.load(lengths + across * r + rank, mask=mask, other=0.0), axis=1, keep_dims=True)
    # IEEE's division: the fast one makes 0 of a quotient by more than 2^126.
    quotient = tl.div_rn(sums, tl.broadcast_to(tl.where(rank < r, length, 1.0), (RANK, COLUMNS)))
    tl.store(grad_vectors + column * r + rank, quotient.to(grad_vectors.dtype.element_ty), mask=inside)
