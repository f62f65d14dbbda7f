"""GGUF files: opened, asked for their metadata, dequantized, written. The only door to the package `gguf`.

Limits: no split files, no big-endian ones.

Source: GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hra_export import filesystem
from hra_export.errors import FormatError, UnsupportedModelError

MAGIC = b"GGUF"
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# torch's dtype → ggml's name of the type.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HINT = "pip install 'hra-export[gguf]'"


class TensorPlan(NamedTuple):
    """A tensor that `write_file` is to write; its shape as torch has it, the reverse of ggml's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_file(source: Path) -> Any:
    """A GGUFReader: the file mapped, its header parsed.

    Raises:
        FormatError: not a GGUF file, or damaged.
        CheckpointError: not a regular file.
        OutputError: the file system does not let us read it.
        UnsupportedModelError: `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedModelError(
            f"`{source}` is a GGUF file, and the package that reads those is not installed", hint=_HINT
        ) from error
    with filesystem.open_regular(source):
        pass
    with source.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        raise FormatError(f"`{source}` is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
    try:
        return GGUFReader(source)
    except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise FormatError(
            f"`{source}` is truncated or damaged: {error}", hint="fetch it again, and compare its size or digest"
        ) from error


def read_architecture(source: Path, reader: Any) -> str:
    """llama.cpp's name of the model's architecture.

    Raises:
        FormatError: the file names none.
        UnsupportedModelError: a part of a split file, or of the other byte order.
    """
    if SPLIT_NAME.search(source.name) or _metadata(source, reader, "split.count") not in (None, 1):
        raise UnsupportedModelError(
            f"`{source}` is one part of a split GGUF file",
            hint="join the parts with llama.cpp's `llama-gguf-split --merge`",
        )
    if reader.byte_order != "I":
        raise UnsupportedModelError(f"`{source}` was written for machines of the other byte order")
    kind = _metadata(source, reader, "general.architecture")
    if not isinstance(kind, str):
        raise FormatError(f"`{source}` names no architecture in `general.architecture`")
    return kind


def _metadata(source: Path, reader: Any, key: str) -> object:
    field = reader.get_field(key)
    try:
        return field.contents() if field is not None else None
    except (ValueError, LookupError) as error:
        raise FormatError(f"`{source}`: `{key}` cannot be read: {error}") from error


def kind_of(path: Path) -> object:
    """`general.type` of a file, `model` or `adapter`; None when it has none, or is no GGUF file."""
    try:
        return _metadata(path, open_file(path), "general.type")
    except FormatError:
        return None


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a reader's tensor, as torch has it."""
    return tuple(int(size) for size in reversed(tensor.shape))


def type_of(tensor: Any) -> str:
    """ggml's name of the type of a reader's tensor."""
    return str(tensor.tensor_type.name)


def dequantized(source: Path, tensor: Any) -> NDArray[Any]:
    """The values of a reader's tensor.

    Raises:
        UnsupportedModelError: `gguf` cannot dequantize its type.
    """
    from gguf import dequantize

    try:
        values: NDArray[Any] = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"`{source}`: `{tensor.name}` is stored as {type_of(tensor)}, which `gguf` cannot dequantize"
        ) from error
    return values


def name_tensor(architecture: str, layers: int) -> Callable[[str], str | None]:
    """llama.cpp's name of a parameter of transformers, by the list that its own converter goes by.

    Args:
        architecture: llama.cpp's name of it.
        layers: of the model.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    names = get_tensor_name_map(kind, layers)
    return lambda parameter: names.get_name(parameter, try_suffixes=(".weight",))


def check_installed() -> None:
    """Refuse to go on without the package.

    Raises:
        UnsupportedModelError: `gguf` is not installed.
    """
    try:
        import gguf  # noqa: F401  # asked for, not used
    except ImportError as error:
        raise UnsupportedModelError("the package that writes GGUF files is not installed", hint=_HINT) from error


class _Bytes(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array whose `tofile` fails when the disk is full: numpy's own loses the last buffer without a word."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """Its bytes, through the stream's own buffer."""
        fid.write(self.data)


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, str | float | int],
    plans: Sequence[TensorPlan],
    values: Iterable[Tensor],
) -> None:
    """Write a file, one tensor in memory at a time.

    Args:
        path: written over.
        architecture: `general.architecture`.
        metadata: floats become float32, whole numbers uint32; in this order. Empty strings are left out.
            File names that are no Unicode lose those letters.
        plans: every tensor, in order.
        values: of the tensors, in the same order; on the CPU.

    Raises:
        OSError: the file system said no.
        ValueError: the values are not those that were planned.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    with closing(GGUFWriter(path, architecture)) as writer:
        for key, value in metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value.encode(errors="replace").decode())
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        for plan in plans:
            size = prod(plan.shape) * plan.dtype.itemsize
            kind = GGMLQuantizationType[TYPES[plan.dtype]]
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for plan, tensor in zip(plans, values, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (plan.shape, plan.dtype):
                raise ValueError(f"expected {plan}, got {tuple(tensor.shape)} of {tensor.dtype}")
            data = tensor.contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
            writer.write_tensor_data(data.view(_Bytes))
