"""ONNX files: open one and trust nothing, write one as `NAME.onnx` with its large tensors in `NAME.onnx.data`.

A model in memory is an `onnx_ir.Model`. Tensors of an opened file stay on the disk until they are used, so the file
must lie still while the model lives. Writing streams tensor by tensor; the same model makes the same bytes.

Limits: a file must declare an opset that ONNX Runtime takes and the operator's rules hold for, 17 to 26.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from hra_export import filesystem
from hra_export.errors import CheckpointError, GraphError
from hra_export.filesystem import as_output_error
from hra_export.graph import external
from hra_export.graph.soundness import is_text, structure_finding
from hra_export.publish import Stage

MIN_OPSET, MAX_OPSET = 17, 26  # LayerNormalization came with 17; ONNX Runtime 1.31 ends at 26
MAX_IR_VERSION = 13  # ONNX Runtime 1.31
MAX_FILE_BYTES = 2**31 - 1  # protobuf's bound
# Smaller tensors stay in the graph: shapes and axes, which shape inference and runtimes read at load.
EXTERNAL_FROM_BYTES = 1024
# Tensors start at a cache line, large ones at a page, so that a runtime can map them.
CACHE_LINE, PAGE, PAGE_ALIGNED_FROM_BYTES = 64, 4096, 2**20


def open_graph(path: Path) -> ir.Model:
    """Open an ONNX file; external tensors are mapped when they are first used.

    Raises:
        GraphError: not an ONNX file, damaged, for another opset or IR version, or a tensor whose bytes are missing,
            out of bounds or outside the file's folder; all findings at once.
        OutputError: the file system does not let us read it.
    """
    proto = _read_proto(path)
    _drop_repeated_inputs_(proto)
    folder = path.absolute().parent
    findings = [*_version_findings(proto), *external.findings(external.tensors_of(proto), folder)]
    structure = None if findings else structure_finding(proto)
    findings += [structure] if structure is not None else []
    if findings:
        hint = "`cp -rL` copies a folder with what its links lead to" if "link" in "".join(findings) else None
        raise GraphError(f"`{path}` cannot be used: {len(findings)} things are wrong", findings=findings, hint=hint)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises what its parts raise; every one of them means a malformed graph
        raise GraphError(f"`{path}` is not a sound ONNX graph: {_first_line(error)}") from error
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, str(folder))
        _load_attributes_(graph)
    return model


def size_bytes(model: ir.Model) -> int:
    """What `save_graph` will write, in bytes.

    Raises:
        GraphError: as `save_graph`.
    """
    files = _lay_out(model, "model")
    return len(files.proto) + files.data_bytes


def save_graph(model: ir.Model, target: Path | Stage, name: str = "model") -> tuple[str, ...]:
    """Write `NAME.onnx`, and `NAME.onnx.data` where a tensor is large enough, tensor by tensor.

    The model is as before when this returns; tensors that share their bytes are written once.

    Args:
        model: any size.
        target: an existing folder that has no files of these names, or the stage of a directory.
        name: of the graph; may have folders in it for a stage.

    Returns:
        The names that were written.

    Raises:
        GraphError: the graph without its tensors is larger than protobuf allows, or cannot be expressed.
        OutputError: the file system said no.
    """
    files = _lay_out(model, name)
    if files.data_bytes:
        with _new_file(target, files.data_name, files.data_bytes) as descriptor:
            _write_tensors(files, descriptor)
    with _new_file(target, files.graph_name, len(files.proto)) as descriptor:
        filesystem.write_all(descriptor, files.proto, 0)
    return (files.graph_name, files.data_name) if files.data_bytes else (files.graph_name,)


@dataclass(frozen=True)
class _Placed:
    """A tensor and where its bytes go."""

    tensor: ir.TensorProtocol
    offset: int


@dataclass(frozen=True)
class _GraphFiles:
    """A graph as it will lie on disk."""

    graph_name: str
    data_name: str
    proto: bytes
    placed: tuple[_Placed, ...]
    data_bytes: int


def _read_proto(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise GraphError(f"`{path}`: no such file")
    try:
        with filesystem.open_regular(path) as (descriptor, status):
            if status.st_size > MAX_FILE_BYTES:
                raise GraphError(f"`{path}` is not an ONNX file: expected less than 2 GiB, got {status.st_size} bytes")
            with os.fdopen(os.dup(descriptor), "rb") as stream, as_output_error(f"read `{path}`"):
                content = stream.read()
    except CheckpointError as error:
        raise GraphError(error.message, hint=error.hint) from error
    proto = onnx.ModelProto()
    refusal = GraphError(f"`{path}` is not an ONNX file, or it is damaged", hint="copy or download it again")
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError; that package is onnx's dependency, not ours
        raise refusal from error
    if not is_text(proto):
        raise refusal
    return proto


def _drop_repeated_inputs_(proto: onnx.ModelProto) -> None:
    """Olive's ExtractAdapters lists an input that has a default twice, which runtimes take and the checker does not."""
    distinct = {value.SerializeToString(deterministic=True): value for value in proto.graph.input}
    if len(distinct) < len(proto.graph.input):
        kept = [onnx.ValueInfoProto.FromString(content) for content in distinct]
        del proto.graph.input[:]
        proto.graph.input.extend(kept)


def _version_findings(proto: onnx.ModelProto) -> Iterator[str]:
    if not proto.HasField("graph") or not proto.graph.node:
        yield "it has no nodes: not an ONNX model, or cut short"
    if not 3 <= proto.ir_version <= MAX_IR_VERSION:
        yield f"IR version: expected 3 to {MAX_IR_VERSION}, got {proto.ir_version}"
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        yield "it does not say which version of the ONNX operators it uses"
    for version in versions:
        if not MIN_OPSET <= version <= MAX_OPSET:
            yield f"opset: expected {MIN_OPSET} to {MAX_OPSET}, got {version}; `onnx.version_converter` converts"
    names = Counter(tensor.name for tensor in proto.graph.initializer)
    yield from (f"initializer `{name}` is there {count} times" for name, count in names.items() if count > 1)


def _load_attributes_(graph: ir.Graph) -> None:
    """Bring external tensors of attributes into memory: they are small, and no writer keeps them outside."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for attribute in list(node.attributes.values()):
            tensor = attribute.value
            if attribute.type == ir.AttributeType.TENSOR and isinstance(tensor, ir.ExternalTensor):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _in_memory(tensor))


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _lay_out(model: ir.Model, name: str) -> _GraphFiles:
    graph_name, data_name = f"{name}.onnx", f"{name}.onnx.data"
    location = data_name.rpartition("/")[2]
    placed: dict[object, _Placed] = {}
    end = 0
    stored: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in _initializers(model):
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.STRING and tensor.nbytes >= EXTERNAL_FROM_BYTES:
            key = _bytes_of(tensor)
            if key not in placed:
                placed[key] = _Placed(tensor, _aligned(end, tensor.nbytes))
                end = placed[key].offset + tensor.nbytes
            stored.append((value, _reference(value, tensor, placed[key].offset, location)))
        elif isinstance(tensor, ir.ExternalTensor):
            stored.append((value, _in_memory(tensor)))
    with _stored_as_(stored):
        proto = _serialize(model)
    return _GraphFiles(graph_name, data_name, proto, tuple(placed.values()), end)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer with a value, graphs in order, each once."""
    for graph in dict.fromkeys(model.graphs()):
        yield from (value for value in graph.initializers.values() if value.const_value is not None)


def _bytes_of(tensor: ir.TensorProtocol) -> object:
    """What two tensors have in common when they share their bytes."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset, tensor.nbytes
    return id(tensor)


def _aligned(offset: int, size: int) -> int:
    step = PAGE if size >= PAGE_ALIGNED_FROM_BYTES else CACHE_LINE
    return -(-offset // step) * step


def _reference(value: ir.Value, tensor: ir.TensorProtocol, offset: int, location: str) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or "")


@contextmanager
def _stored_as_(stored: list[tuple[ir.Value, ir.TensorProtocol]]) -> Iterator[None]:
    """Let initializers stand for what the file will hold, in the block."""
    before = [(value, value.const_value) for value, _ in stored]
    try:
        for value, tensor in stored:
            value.const_value = tensor
        yield
    finally:
        for value, original in before:
            value.const_value = original


def _serialize(model: ir.Model) -> bytes:
    proto = ir.serde.serialize_model(model)
    try:
        return proto.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf's EncodeError or ValueError, by its implementation; nothing else is done here
        raise GraphError(
            "the graph without its initializers is larger than the 2 GiB of an ONNX file",
            hint="weights that stand in Constant nodes must become initializers",
        ) from error


def _write_tensors(files: _GraphFiles, descriptor: int) -> None:
    """Each tensor at its place; one at a time is in memory, and none that lies in a file."""
    with os.fdopen(os.dup(descriptor), "r+b", buffering=0) as stream:
        for item in files.placed:
            stream.seek(item.offset)
            item.tensor.tofile(stream)  # type: ignore[attr-defined]  # every tensor class has it, the protocol not yet
            if (end := stream.tell()) != item.offset + item.tensor.nbytes:
                raise RuntimeError(f"`{item.tensor.name}` wrote {end - item.offset} of {item.tensor.nbytes} bytes")
            filesystem.begin_writeback(descriptor, item.offset, item.tensor.nbytes)


@contextmanager
def _new_file(target: Path | Stage, name: str, size: int) -> Iterator[int]:
    if isinstance(target, Stage):
        with target.create(name, size) as descriptor:
            yield descriptor
        return
    path = target / name
    with as_output_error(f"write `{path}`"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            filesystem.allocate(descriptor, size)
            yield descriptor
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
