"""The CUDA kernel of the ONNX operator on torch's tensors, without ONNX Runtime around it."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Member(ctypes.Structure):
    """`hra::Member` of `task.h`."""

    _fields_: ClassVar = [
        ("u", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("adapters", ctypes.c_int64),
    ]


class Task(ctypes.Structure):
    """`hra::Task` of `task.h`."""

    _fields_: ClassVar = [
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("rows_per_index", ctypes.c_int64),
        ("members", ctypes.POINTER(Member)),
        ("count", ctypes.c_int64),
    ]


class CudaOperator:
    """`HraExportReflectOnCuda` of a library, which must have CUDA kernels.

    Args:
        path: of the library.
    """

    def __init__(self, path: Path) -> None:
        self._call: Any = ctypes.CDLL(str(path)).HraExportReflectOnCuda
        self._call.restype = ctypes.c_char_p
        self._call.argtypes = [ctypes.POINTER(Task), ctypes.c_void_p]

    def __call__(self, x: Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Y of every member, queued on torch's stream.

        Args:
            x: (n, d) in one piece.
            pairs: U (d, r) and V (r, d) of each member, in one piece, of x's dtype.

        Raises:
            RuntimeError: what the kernel says.
        """
        task, results = task_of(x, pairs)
        failure = self._call(ctypes.byref(task), torch.cuda.current_stream(x.device).cuda_stream)
        if failure is not None:
            raise RuntimeError(failure.decode())
        return results


def task_of(x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Task, list[Tensor]]:
    """The task of one call, and the tensors that it writes to."""
    results = [torch.empty_like(x) for _ in pairs]
    rows = [
        Member(u.data_ptr(), v.data_ptr(), y.data_ptr(), u.shape[-1], 1)
        for (u, v), y in zip(pairs, results, strict=True)
    ]
    members = (Member * len(rows))(*rows)
    return Task(TYPES[x.dtype], x.data_ptr(), *x.shape, None, max(1, len(x)), members, len(rows)), results
