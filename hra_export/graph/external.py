"""Tensors of an ONNX file whose bytes lie in another file: every claim is checked before a byte is trusted.

A location is relative to the folder of the `.onnx` file and must stay in it, links resolved. Links to files outside and
files with several hard links are refused, as ONNX Runtime, the checker and onnx_ir do.
"""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a file: initializers and attributes, in subgraphs and functions too."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs.extend([attribute.g] if attribute.HasField("g") else [])
            graphs.extend(attribute.graphs)
        nodes = []


def findings(tensors: Iterable[onnx.TensorProto], folder: Path) -> Iterator[str]:
    """One line for each tensor whose type, shape and bytes do not fit together, or whose file may not be used.

    Args:
        tensors: of one model.
        folder: where its `.onnx` file lies.
    """
    files: dict[str, int | str] = {}
    for tensor in tensors:
        name = f"tensor `{tensor.name}`"
        size_bytes = _size_bytes(tensor)
        if isinstance(size_bytes, str):
            yield f"{name}: {size_bytes}"
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            finding = _external_finding(tensor, size_bytes, folder, files)
            if finding:
                yield f"{name}: {finding}"
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != size_bytes:
            yield f"{name}: expected {size_bytes} bytes, got {len(tensor.raw_data)}"


@dataclass(frozen=True)
class _Reference:
    location: str
    offset: int
    length: int

    @classmethod
    def parse(cls, tensor: onnx.TensorProto, size_bytes: int) -> "_Reference | str":
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) != len(tensor.external_data):
            return "an entry of its external data is given twice"
        numbers = [entries.get("offset", "0"), entries.get("length", str(size_bytes))]
        if not entries.get("location") or not all(number.isascii() and number.isdecimal() for number in numbers):
            return f"expected a location, an offset and a length, got {entries}"
        return cls(entries["location"], int(numbers[0]), int(numbers[1]))


def _external_finding(
    tensor: onnx.TensorProto, size_bytes: int, folder: Path, files: dict[str, int | str]
) -> str | None:
    reference = _Reference.parse(tensor, size_bytes)
    if isinstance(reference, str):
        return reference
    if reference.location not in files:
        files[reference.location] = _usable_size(reference.location, folder)
    available = files[reference.location]
    if isinstance(available, str):
        return f"its data file `{reference.location}` {available}"
    if reference.length != size_bytes:
        return f"expected {size_bytes} bytes of external data, got {reference.length}"
    if reference.offset + reference.length > available:
        end = reference.offset + reference.length
        return f"its data ends at byte {end} of `{reference.location}`, which has {available}"
    return None


def _usable_size(location: str, folder: Path) -> int | str:
    """The size of a data file, or why it may not be used."""
    try:
        base, path = os.path.realpath(folder), os.path.realpath(folder / location)
        lexical = os.path.normpath(location)
        if Path(location).is_absolute() or lexical == ".." or lexical.startswith(f"..{os.sep}"):
            return "lies outside the model's folder"
        if os.path.commonpath([base, path]) != base:
            return "is a link to a place outside the model's folder"
        status = Path(path).stat()
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_nlink > 1:
        return "has more than one hard link, which runtimes refuse: copy it"
    return status.st_size


def _size_bytes(tensor: onnx.TensorProto) -> int | str:
    """The bytes that type and shape ask for, or why there is no answer."""
    if tensor.data_type not in ir.DataType.__members__.values() or tensor.data_type == onnx.TensorProto.UNDEFINED:
        return f"unknown data type {tensor.data_type}"
    if any(size < 0 for size in tensor.dims):
        return f"negative size in its shape {list(tensor.dims)}"
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0 if tensor.data_location != onnx.TensorProto.EXTERNAL else "strings cannot be external data"
    return math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
