"""GPU code: Triton kernels for PyTorch, and in `ort/` the native operators of ONNX Runtime.

Triton is imported with the files that hold kernels, so not by `import hra_export.kernels`. Where it is missing, for the
dtypes and ranks that the kernels do not take, and on every device but NVIDIA's, the plain version runs.
"""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 128
# bfloat16 on tensor cores, and enough shared memory.
LEAST_CAPABILITY = (8, 0)


def take(x: Tensor, rank: int) -> bool:
    """Whether the kernels run for activations like x and chains of a rank."""
    return x.is_cuda and x.dtype in DTYPES and 1 <= rank <= MAX_RANK and _is_capable(x.device)


@functools.cache
def _is_capable(device: torch.device) -> bool:
    return (
        find_spec("triton") is not None
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )
