"""U and S of many chains on a GPU, in one launch for all chains of one shape.

    factor(vectors, dtype)    u (…, d, r) unit columns, stored as Uᵀ; s (…, r, r) = (diag(½ uᵢᵀuᵢ) + tril(UᵀU, −1))⁻¹

The Gram matrix is that of the rounded columns, in float32; S comes from it by forward substitution, whose entries are
4 at most. A program does a whole chain, so that no program waits for another.

A model's training step takes two launches for each shape of chains, `torch.stack` and this: for the 224 chains of
32 Llama layers, 192 of d = 4096 and 32 of d = 14336, four in all. (One launch for both shapes would take a table of
pointers, which must be copied to the GPU each time.)

What must be moved is the vectors once, and U once: (v + e) b d r bytes, of v and e bytes an element; the vectors are
read twice, the second time from L2 where a program's share of it holds them. Operations are 2 b d r² for the Gram
matrices, and r rows of substitution one after another, each about 0.3 µs (RANK² / threads, and a sum over the
program). At the 3.35 TB/s of an H100, bfloat16, r = 32:

| chains | bytes | floor | a program, whose processor takes about 64 bytes a clock |
|---|---|---|---|
| 192 of d = 4096 | 151 MB | 45 µs | 1.3 MB: 12 µs, and 10 µs of substitution |
| 32 of d = 14336 | 88 MB | 26 µs | 4.6 MB: 42 µs, and 10 µs of substitution |

These times are reckoned; nothing here has run on a GPU.

Letters: b chains, d in_features, r rank.
Limits: vectors and activations of float32, float16 or bfloat16; r ≤ 128.
"""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from hra_export.kernels.factors_kernel import factor_kernel
from hra_export.kernels.operands import operand

# Elements of a step, RANK × COLUMNS: 32 for each of 128 threads.
STEP = 4096


def factor(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and S of chains. A vector of zeros has no direction and gives NaN.

    Args:
        vectors: (…, d, r), columns not normalized, of any size that float32 holds.
        dtype: of the activations.

    Returns:
        u (…, d, r) in `dtype`, each chain stored as Uᵀ, and s (…, r, r), lower triangular, float32.
    """
    *leading, d, r = vectors.shape
    chains = vectors.reshape(-1, d, r)
    u = torch.empty(len(chains), r, d, dtype=dtype, device=vectors.device)
    s = torch.empty(len(chains), r, r, dtype=torch.float32, device=vectors.device)
    rank = max(16, triton.next_power_of_2(r))
    if len(chains) > 0:
        with torch.cuda.device(vectors.device) if vectors.is_cuda else nullcontext():
            factor_kernel[(len(chains),)](
                chains,
                *chains.stride(),
                u,
                s,
                d,
                r,
                OPERAND=operand(dtype),
                COLUMNS=STEP // rank,
                RANK=rank,
                num_warps=warps_for(rank),
                num_stages=2,
            )
    return u.view(*leading, r, d).mT, s.view(*leading, r, r)


def warps_for(rank: int) -> int:
    """Warps that hold the Gram matrix and S, RANK² float32 each, in 64 registers a thread at most."""
    return {16: 4, 32: 4, 64: 4, 128: 8}[rank]
