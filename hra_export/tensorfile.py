"""The safetensors container: read its header strictly, its tensors lazily, and lay out new files.

The header is parsed here once, stricter than the format's own library: duplicate keys are refused, and so are
overlaps, holes, sizes that disagree with shapes, and anything after the last tensor. Bytes are read by position
(`pread`), so that nothing stays mapped and several threads can share one file.

Source: safetensors format, https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hra_export.errors import FormatError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_ELEMENTS = 2**63

# Bits per element, and the name of the torch dtype: the format's list without F4, F6_E2M3 and F6_E3M2, whose elements
# do not fill a byte.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}
# What arithmetic is done on; everything else is copied as it lies.
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype in the format's spelling, bytes counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis; the whole tensor when it has none."""
        return self.size_bytes // self.shape[0] if self.shape and self.shape[0] else self.size_bytes


@dataclass(frozen=True)
class TensorFile:
    """A checked header. `tensors` is in the order of the bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header_digest: str
    size_bytes: int

    @contextmanager
    def open(self) -> Iterator[int]:
        """A file descriptor for `pread`, closed at the end of the block."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def map(self, name: str) -> "torch.Tensor":
        """The tensor as a lazily paged, private view of the file; writes to it never reach the file."""
        import torch

        info = self.tensors[name]
        dtype = getattr(torch, DTYPES[info.dtype][1])
        if info.size_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        page = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.open() as descriptor:
            length = info.start + info.size_bytes - page
            view = mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=page)
        count = math.prod(info.shape)
        return torch.frombuffer(view, dtype=dtype, count=count, offset=info.start - page).reshape(info.shape)


@dataclass(frozen=True)
class TensorLayout:
    """A file to be written: its header's bytes, and where each tensor goes."""

    header: bytes
    tensors: Mapping[str, TensorInfo]
    size_bytes: int = field(default=0)


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file, without touching its tensors.

    Raises:
        FormatError: not a regular file, truncated, or any rule of the format is broken; names file and tensor.
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: a FIFO must not hang
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"`{path}` is not a regular file")
        raw = _header_bytes(path, descriptor, status.st_size)
    finally:
        os.close(descriptor)
    entries = _parse_header(path, raw)
    metadata = _checked_metadata(path, entries.pop("__metadata__", {}))
    data_start = 8 + len(raw)
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.start + info.size_bytes))
    _check_contiguous(path, infos, data_start, status.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    return TensorFile(path, {info.name: info for info in infos}, metadata, digest, status.st_size)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> TensorLayout:
    """Plan a safetensors file of (name, dtype, shape), wide dtypes first so that every tensor is aligned.

    The order is otherwise kept, so equal inputs give equal bytes.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]][0])
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes, offset = [], 0
    for name, dtype, shape in ordered:
        size = tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        sizes.append((name, dtype, shape, offset, size))
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = {name: TensorInfo(name, dtype, shape, len(header) + at, size) for name, dtype, shape, at, size in sizes}
    return TensorLayout(header, infos, len(header) + offset)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor of this dtype (the format's spelling) and shape."""
    return math.prod(shape) * DTYPES[dtype][0] // 8


def dtype_name(dtype: "torch.dtype") -> str:
    """The format's spelling of a torch dtype.

    Raises:
        ValueError: the format has no such dtype.
    """
    word = str(dtype).removeprefix("torch.")
    for name, (_, torch_name) in DTYPES.items():
        if torch_name == word:
            return name
    raise ValueError(f"safetensors has no dtype for {dtype}")


def strict_json(path: Path, text: bytes) -> object:
    """Parse JSON that repeats no key and holds no NaN, Infinity or half of a surrogate pair.

    Raises:
        FormatError: malformed, nested too deep, duplicate key, or a number or character JSON does not have.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise FormatError(f"`{path}` repeats the JSON key `{repeated}`")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"`{path}` holds {constant}, which is not JSON")

    try:
        parsed: object = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if b"\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is no text: nothing can write it
    except (ValueError, RecursionError) as error:
        raise FormatError(f"`{path}` is not valid JSON: {error}") from error
    return parsed


def _header_bytes(path: Path, descriptor: int, file_size: int) -> bytes:
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise FormatError(f"`{path}` is truncated: {file_size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"`{path}` is not a safetensors file: it claims a header of {length} bytes")
    if 8 + length > file_size:
        raise FormatError(f"`{path}` is truncated: its header takes {8 + length} bytes, the file has {file_size}")
    return os.pread(descriptor, length, 8)


def _parse_header(path: Path, raw: bytes) -> dict[str, object]:
    entries = strict_json(path, raw)
    if not isinstance(entries, dict):
        raise FormatError(f"`{path}`: expected a JSON object as header, got {type(entries).__name__}")
    return entries


def _checked_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"`{path}`: `__metadata__` maps strings to strings, and this one does not")
    return metadata


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"`{path}`: tensor `{name}` needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"`{path}`: tensor `{name}` has the unknown dtype {dtype!r}")
    if not _is_shape(shape) or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"`{path}`: tensor `{name}` has the impossible shape {shape!r} or offsets {offsets!r}")
    expected, got = tensor_bytes(dtype, tuple(shape)), offsets[1] - offsets[0]
    if expected != got:
        raise FormatError(f"`{path}`: tensor `{name}` of {dtype} {shape} takes {expected} bytes, its offsets say {got}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], got)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_shape(value: object) -> bool:
    """Whether these are sizes whose product, zeros counted as ones, fits torch's int64; no product grows beyond it."""
    if not isinstance(value, list) or not _is_sizes(value):
        return False
    elements = 1
    for size in value:
        elements *= size or 1
        if elements >= MAX_ELEMENTS:
            return False
    return True


def _check_contiguous(path: Path, infos: list[TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for info in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise FormatError(f"`{path}`: tensor `{info.name}` {what} (byte {info.start}, expected {position})")
        position += info.size_bytes
    if position > file_size:
        raise FormatError(f"`{path}` is truncated: its tensors end at byte {position}, the file at {file_size}")
    if position < file_size:
        raise FormatError(f"`{path}` has {file_size - position} bytes that belong to no tensor")
