"""Tensors on their way into a session: what a graph takes, and whether what it is given fits.

NumPy itself has no bfloat16: arrays of it have the type that `ml_dtypes` registers and onnx_ir uses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

BFLOAT16 = ir.DataType.BFLOAT16.numpy()
ONNX_BFLOAT16 = int(ir.DataType.BFLOAT16)

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": BFLOAT16,
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: as in the file.
        dtype: NumPy's name of it, `bfloat16` included; ONNX's own (`seq(tensor(float))`) for what is no tensor.
        shape: sizes; a string where the graph names a dynamic one, None where it is open.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, argument: Any) -> "TensorSpec":
        """From ONNX Runtime's `NodeArg`."""
        dtype = DTYPES.get(argument.type)
        return cls(argument.name, argument.type if dtype is None else dtype.name, tuple(argument.shape))

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} ({sizes})"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a name, `bfloat16` included."""
    return BFLOAT16 if name == BFLOAT16.name else np.dtype(name)


def dtype_of(value: Any) -> str:
    """NumPy's name of the dtype of an array, a torch tensor or an OrtValue."""
    if hasattr(value, "data_type") and hasattr(value, "element_type"):
        return DTYPES[value.data_type()].name
    return str(value.dtype).removeprefix("torch.")


def shape_of(value: Any) -> tuple[int, ...]:
    """Sizes of an array, a torch tensor or an OrtValue."""
    return tuple(value.shape() if callable(value.shape) else value.shape)


def as_tensors(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Lists and numbers as arrays; what has a dtype already is as it was."""
    return {name: value if hasattr(value, "shape") else np.asarray(value) for name, value in feeds.items()}


def misfits(feeds: Mapping[str, Any], specs: Sequence[TensorSpec], optional: Sequence[TensorSpec] = ()) -> list[str]:
    """What is wrong with the feeds of a graph, one line each: names, dtypes, ranks and fixed sizes.

    Args:
        feeds: name → array, torch tensor or OrtValue.
        specs: inputs that must be fed.
        optional: inputs that have defaults.
    """
    known = {spec.name: spec for spec in (*specs, *optional)}
    findings = [f"`{spec.name}`: missing, expected {spec}" for spec in specs if spec.name not in feeds]
    for name, value in feeds.items():
        if name not in known:
            findings.append(f"`{name}`: the graph has no such input")
        elif not _fits(value, known[name]):
            got = TensorSpec(name, dtype_of(value), shape_of(value))
            findings.append(f"`{name}`: expected {known[name]}, got {got}")
    return findings


def _fits(value: Any, spec: TensorSpec) -> bool:
    sizes = shape_of(value)
    if dtype_of(value) != spec.dtype or len(sizes) != len(spec.shape):
        return False
    return all(not isinstance(want, int) or want == got for want, got in zip(spec.shape, sizes, strict=True))


def to_array(value: Any) -> Array:
    """An OrtValue on any device as an array, bfloat16 included."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    import torch
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(value._ortvalue).view(torch.int16).cpu().numpy().view(BFLOAT16)
