"""In which dtype products take their operands on a GPU, and in Triton's interpreter.

The interpreter holds bfloat16 as the bits of it, in NumPy's uint16, and multiplies those: products there take float32,
which holds every bfloat16. On a GPU operands stay as they are, for tensor cores.
"""

import torch
import triton.language as tl
from triton import JITFunction, jit

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@jit  # type: ignore[untyped-decorator]  # Triton has no types
def _probe() -> None:
    pass


IS_COMPILED = isinstance(_probe, JITFunction)


def operand(dtype: torch.dtype) -> tl.dtype:
    """Triton's dtype for operands of products of a torch dtype."""
    return DTYPES[dtype] if IS_COMPILED else tl.float32
