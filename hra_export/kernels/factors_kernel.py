"""The device code for the factors of chains, which `hra_export.kernels.factors` launches.

A program works on one chain of vectors (d, r) and goes through its features COLUMNS at a time, twice: for the lengths
of the vectors, then for U and its Gram matrix. It then inverts S⁻¹ row by row.

RANK is r, padded with zeros to a power of 2, at least 16.
"""
# ruff: noqa: N803  compile-time constants are capitals, as in Triton's own kernels
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# Triton gives these functions their types; `untyped-decorator` is its decorator, which has none.

import triton
import triton.language as tl

# 2^-126: its reciprocal is finite, and what is scaled by it stays at 2^-23 or more, whose square float32 holds.
LEAST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _scales_and_lengths(
    vectors, row_stride, column_stride, d, r,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """What to multiply each vector (RANK, 1) by before it is squared, and its length then.

    One pass, as LAPACK's `lassq`: the squares of 1e-25 and of 1e30 leave float32's range.
    """
    rank = tl.arange(0, RANK)[:, None]
    largest = tl.full((RANK, 1), LEAST_NORMAL, tl.float32)
    squares = tl.zeros((RANK, 1), tl.float32)
    scale = tl.div_rn(tl.full((RANK, 1), 1.0, tl.float32), largest)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (rank < r) & (column < d)
        vector = tl.load(vectors + column * row_stride + rank * column_stride, mask=inside, other=0.0).to(tl.float32)
        larger = tl.maximum(largest, tl.max(tl.abs(vector), axis=1, keep_dims=True))
        # IEEE's division: the fast one makes 0 of the reciprocal of more than 2^126.
        scale = tl.div_rn(tl.full((RANK, 1), 1.0, tl.float32), larger)
        shrunk, scaled = largest * scale, vector * scale
        squares = squares * shrunk * shrunk + tl.sum(scaled * scaled, axis=1, keep_dims=True)
        largest = larger
    return scale, tl.sqrt_rn(squares)


@triton.jit
def _inverse(gram, r, RANK: tl.constexpr):
    """S, the inverse of diag(½ Gᵢᵢ) + tril(G, −1), by forward substitution; zero beyond r. Both (RANK, RANK)."""
    row, column = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    s = tl.zeros((RANK, RANK), tl.float32)
    for i in range(r):
        # Row i of S⁻¹ as a column: G is symmetric.
        known = tl.sum(tl.where(column == i, gram, 0.0), axis=1, keep_dims=True)
        diagonal = tl.sum(tl.where(row == i, known, 0.0), axis=0, keep_dims=True) * 0.5
        found = tl.where(column == i, 1.0, 0.0) - tl.sum(tl.where(row < i, known, 0.0) * s, axis=0, keep_dims=True)
        s = tl.where(row == i, found / diagonal, s)
    return s


@triton.jit
def factor_kernel(
    vectors, chain_stride, row_stride, column_stride,  # (b, d, r)
    u,  # (b, r, d)
    s,  # (b, r, r) float32
    d, r,
    OPERAND: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Program (chain)."""
    chain = tl.program_id(0).to(tl.int64)
    vectors += chain * chain_stride
    u += chain * r * d
    rank = tl.arange(0, RANK)[:, None]
    scale, length = _scales_and_lengths(vectors, row_stride, column_stride, d, r, COLUMNS, RANK)
    # A vector of zeros has length 0, and 0 · ∞ is the NaN that it is due.
    shorten = tl.div_rn(tl.full((RANK, 1), 1.0, tl.float32), tl.where(rank < r, length, 1.0))
    gram = tl.zeros((RANK, RANK), tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (rank < r) & (column < d)
        vector = tl.load(vectors + column * row_stride + rank * column_stride, mask=inside, other=0.0).to(tl.float32)
        unit = (vector * scale * shorten).to(u.dtype.element_ty)
        tl.store(u + rank * d + column, unit, mask=inside)
        cast = unit.to(OPERAND)
        gram = tl.dot(cast, tl.trans(cast), gram, input_precision="ieee")
    place = tl.arange(0, RANK)[None, :]
    tl.store(s + chain * r * r + rank * r + place, _inverse(gram, r, RANK), mask=(rank < r) & (place < r))
