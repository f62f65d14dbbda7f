"""bitsandbytes in 4 bits → a plain directory: every weight in float32, as bitsandbytes itself dequantizes it.

NF4 and FP4, with or without double quantization, whatever integers or floats the bytes are stored as. Floating-point
tensors beside them are widened, everything else is copied; tensor by tensor, a piece of each in memory at a time.

Limits: LLM.int8 is refused, for it rounds activations too. The other components of a pipeline stay as they are.

Source: bitsandbytes `functional.QuantState.as_dict(packed=True)`; transformers `integrations/bitsandbytes.py`, which
stores the layers that it makes of a Conv1D as (out, in).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from hra_export import filesystem, publish
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint, open_checkpoint
from hra_export.codebook import STATE, CodebookMatrix, Kind, read_matrices
from hra_export.errors import CheckpointError, FormatError, HraExportError, UnsupportedModelError
from hra_export.layout import may_have_conv1d, read_layout
from hra_export.tensorfile import DTYPES, TensorFile, TensorLayout, lay_out, tensor_bytes

# Part of every cache name: raised when the same directory would become another one.
CONVERSION = 1
MAX_SHARD_BYTES = 5 * 10**9
# Values that are dequantized at once.
PIECE = 2**22
# What lies beside `X.weight`; its state is a fifth.
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
WIDENED = ("F16", "BF16")
# Experts stored one by one, which transformers stacks in memory.
EXPERT = re.compile(r"\.experts\.\d+\.")
# Half of each codebook, the rest of FP4 being its negative. Source: bitsandbytes `functional.get_4bit_type`.
FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
NF4_NEGATIVE = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
NF4_POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
CODEBOOKS: Mapping[Kind, tuple[float, ...]] = {
    "nf4": (*NF4_NEGATIVE, *NF4_POSITIVE),
    "fp4": (*FP4, *(-value for value in FP4)),
}
ATOL_CODEBOOK = 1e-6  # files differ in the last bits


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion wrote.

    Attributes:
        tensors: how many.
        dequantized: how many of them were in 4 bits in the source.
    """

    source: Path
    output: Path
    tensors: int
    dequantized: int
    size_bytes: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about it, one sentence each."""
        return (
            f"{self.dequantized} of {self.tensors} tensors were in 4 bits; they are now the float32 they stand for",
        )


def recognizes(source: Path) -> bool:
    """Whether a path leads to a checkpoint whose configuration says that bitsandbytes quantized it."""
    try:
        return source.is_dir() and _settings(open_checkpoint(source)) is not None
    except HraExportError:  # whoever opens it for its weights says what is wrong
        return False


def convert(
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write a checkpoint of bitsandbytes as one in float32.

    The output path is absent, the old directory, or complete at every instant.

    Args:
        source: directory of transformers or diffusers, its weights in 4 bits.
        output: directory to be made.
        overwrite: replace an earlier output of ours.
        max_shard_bytes: of one weight file.
        progress: called with the bytes of each tensor written.

    Raises:
        CheckpointError: not a checkpoint of bitsandbytes, or damaged.
        FormatError: matrices lack parts, or parts do not fit one another; all of them.
        UnsupportedModelError: LLM.int8, or a codebook other than those of NF4 and FP4.
        OutputError: the output exists, the disk is full or cannot be written.
    """
    plan = _plan(source)
    shards = _shards(plan, max_shard_bytes)
    layouts = {name: _lay_out(group) for name, group in shards.items()}
    files = {plan.path("config.json"): _json(_plain_config(plan.checkpoint.config))}
    if len(layouts) > 1:
        files[plan.path(f"{plan.stem}.safetensors.index.json")] = _index(layouts)
    companions = {str(name): source / name for name in plan.checkpoint.companions() if str(name) not in files}
    size = sum(layout.size_bytes for layout in layouts.values()) + sum(map(len, files.values()))
    report = ConvertReport(source, output, len(plan.tensors), len(plan.matrices), size)
    total = size + sum(path.stat().st_size for path in companions.values())
    key = f"{cache_name(source)} {list(layouts)}"
    with publish.stage(output, key=key, size_bytes=total, overwrite=overwrite, protected=[source]) as stage:
        for name, layout in layouts.items():
            if stage.is_finished(name):  # by an interrupted conversion of the same directory
                continue
            with stage.create(name, layout.size_bytes) as descriptor:
                _write_shard(plan, layout, descriptor, progress)
        for name, path in companions.items():
            stage.copy(path, name)
        for name, data in files.items():
            stage.write_bytes(name, data)
        stage.publish(MANIFEST_NAME, _manifest(plan, report))
    return report


def quantized_matrices(source: Path) -> Iterator[tuple[str, CodebookMatrix]]:
    """The checkpoint's matrices with their own codes, for graphs that compute with them.

    Experts that are stored one by one are left out: a loaded model has them stacked.

    Args:
        source: directory of transformers or diffusers, its weights in 4 bits.

    Yields:
        The parameter's name, and its matrix (o, d), nothing dequantized.

    Raises:
        CheckpointError, FormatError, UnsupportedModelError: as for `convert`.
    """
    plan = _plan(source)
    for name in plan.matrices:
        if not EXPERT.search(name):
            yield name, plan.matrix(name)


def cache_name(source: Path) -> str:
    """A folder name for a converted checkpoint: another one whenever it is moved, or a file of it resized or touched.

    Raises:
        CheckpointError: there is no checkpoint.
        OSError: a file went away.
    """
    checkpoint, resolved = open_checkpoint(source), source.resolve(strict=True)
    paths = [*(file.path for file in checkpoint.files), *(source / name for name in checkpoint.companions())]
    status = [(str(path.relative_to(source)), path.stat()) for path in paths]
    described = [CONVERSION, str(resolved), *((name, each.st_size, each.st_mtime_ns) for name, each in status)]
    return f"{resolved.name}-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output; `matrix` where it is in 4 bits in the source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    matrix: bool = False


@dataclass(frozen=True)
class _Plan:
    """Everything a conversion will do.

    Attributes:
        matrices: parameter name → the names of its parts in the source, its bytes among them.
        transposed: the matrices that the float model has as (in, out).
        tensors: of the output, in the order of the source.
    """

    checkpoint: Checkpoint
    matrices: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    tensors: tuple[_Tensor, ...]

    @cached_property
    def owners(self) -> Mapping[str, TensorFile]:
        """Parts of one matrix may lie in several files."""
        return {name: file for file in self.checkpoint.files for name in file.tensors}

    @property
    def stem(self) -> str:
        index = self.checkpoint.index_name
        return index.removesuffix(".safetensors.index.json") if index else self.checkpoint.files[0].path.stem

    def path(self, name: str) -> str:
        return str(PurePosixPath(self.checkpoint.component) / name)

    def matrix(self, name: str) -> CodebookMatrix:
        return _read(name, self.matrices[name], self.owners)


def _plan(source: Path) -> _Plan:
    checkpoint = open_checkpoint(source)
    settings = _settings(checkpoint)
    if settings is None:
        raise CheckpointError(f"`{source}` was not quantized by bitsandbytes")
    if settings.get("load_in_8bit") or any(name.endswith(".SCB") for name in checkpoint.tensors):
        raise UnsupportedModelError(
            f"`{source}` is in LLM.int8, bitsandbytes' 8 bits, which rounds activations too: only 4 bits can be kept",
            hint="use the model's own weights as base, and `--precision int8`",
        )
    matrices = _matrices(checkpoint)
    owners = {name: file for file in checkpoint.files for name in file.tensors}
    shapes = _checked_shapes(checkpoint, matrices, owners)
    transposed = _transposed(checkpoint, shapes)
    return _Plan(checkpoint, matrices, transposed, tuple(_tensors(checkpoint, matrices, shapes, transposed)))


def _settings(checkpoint: Checkpoint) -> Mapping[str, object] | None:
    settings = checkpoint.config.get("quantization_config")
    is_ours = isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"
    return settings if is_ours and isinstance(settings, dict) else None


def _matrices(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Parameter name → its parts, by the states that the checkpoint has."""
    tensors = checkpoint.tensors
    found: dict[str, tuple[str, ...]] = {}
    for key in tensors:
        name, is_state, _ = key.partition(STATE)
        if is_state:
            parts = [name, *(f"{name}{part}" for part in PARTS)]
            found[name] = (*found.get(name, [part for part in parts if part in tensors]), key)
    if not found:
        raise FormatError(f"`{checkpoint.root}` holds no 4-bit matrix of bitsandbytes, and its configuration says so")
    return found


def _checked_shapes(
    checkpoint: Checkpoint, matrices: Mapping[str, tuple[str, ...]], owners: Mapping[str, TensorFile]
) -> dict[str, tuple[int, int]]:
    """The shape (o, d) of every matrix, all of them read and checked once."""
    shapes, findings, unknown = {}, [], []
    for name, parts in matrices.items():
        try:
            matrix = _read(name, parts, owners)
        except FormatError as error:
            findings.append(error.message)
            continue
        shapes[name] = matrix.shape
        if not _is_known(matrix):
            unknown.append(f"{name}: not the codebook of {matrix.kind}")
    used = {part for parts in matrices.values() for part in parts}
    findings += [
        f"`{name}` belongs to no 4-bit matrix" for name in checkpoint.tensors if _is_orphan(name, used, owners)
    ]
    if findings:
        raise FormatError(f"`{checkpoint.root}`: {len(findings)} tensors are damaged or incomplete", findings=findings)
    if unknown:
        raise UnsupportedModelError(f"`{checkpoint.root}` has codebooks of its own", findings=unknown)
    return shapes


def _is_known(matrix: CodebookMatrix) -> bool:
    return np.allclose(matrix.codebook, CODEBOOKS[matrix.kind], rtol=0, atol=ATOL_CODEBOOK)


def _is_orphan(name: str, used: set[str], owners: Mapping[str, TensorFile]) -> bool:
    is_packed = name.endswith(".weight") and owners[name].tensors[name].dtype in ("U8", "I8")
    return name not in used and (is_packed or name.endswith(PARTS))


def _read(name: str, parts: Sequence[str], owners: Mapping[str, TensorFile]) -> CodebookMatrix:
    """One matrix; its bytes stay on disk until they are used.

    Raises:
        FormatError: parts are missing or do not fit one another.
    """
    try:
        tensors = {part: owners[part].map(part) for part in parts}
        if name in tensors:  # `bnb_4bit_quant_storage` may have given the bytes another dtype
            tensors[name] = tensors[name].reshape(-1).view(torch.uint8)
        ((_, matrix),) = read_matrices(tensors)
        _check(matrix)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, RecursionError) as error:
        raise FormatError(f"`{name}` is no 4-bit matrix of bitsandbytes: {error}") from error
    return matrix


def _check(matrix: CodebookMatrix) -> None:
    if not all(type(size) is int and size > 0 for size in matrix.shape) or matrix.block_size < 1:
        raise ValueError(f"shape {matrix.shape}, block size {matrix.block_size}")
    if not isinstance(matrix.dtype, torch.dtype) or not matrix.dtype.is_floating_point:
        raise TypeError(f"dtype {matrix.dtype}")
    if matrix.codebook.shape != (16,):
        raise ValueError(f"a codebook of shape {matrix.codebook.shape}")
    if not np.isfinite(matrix.absmax).all():
        raise ValueError("NaN or Inf among the largest values of its blocks")


def _transposed(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The matrices whose module is a Conv1D in the float model."""
    if not may_have_conv1d(checkpoint.config):
        return frozenset()
    layout = read_layout(checkpoint.config, shapes)
    return frozenset(name for name in shapes if layout.is_transposed(name.removesuffix(".weight")))


def _tensors(
    checkpoint: Checkpoint,
    matrices: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, int]],
    transposed: frozenset[str],
) -> Iterator[_Tensor]:
    used = {part for parts in matrices.values() for part in parts}
    for name, info in checkpoint.tensors.items():
        if name in shapes:
            o, d = shapes[name]
            yield _Tensor(name, "F32", (d, o) if name in transposed else (o, d), matrix=True)
        elif name not in used:
            yield _Tensor(name, "F32" if info.dtype in WIDENED else info.dtype, info.shape)


def _shards(plan: _Plan, max_bytes: int) -> dict[str, list[_Tensor]]:
    groups: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in plan.tensors:
        bytes_ = tensor_bytes(tensor.dtype, tensor.shape)
        if groups[-1] and size + bytes_ > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += bytes_
    if len(groups) == 1:
        return {plan.path(f"{plan.stem}.safetensors"): groups[0]}
    total = len(groups)
    return {plan.path(f"{plan.stem}-{i:05}-of-{total:05}.safetensors"): group for i, group in enumerate(groups, 1)}


def _lay_out(tensors: Sequence[_Tensor]) -> TensorLayout:
    return lay_out(((each.name, each.dtype, each.shape) for each in tensors), {"format": "pt"})


def _write_shard(plan: _Plan, layout: TensorLayout, descriptor: int, progress: Callable[[int], None] | None) -> None:
    filesystem.write_all(descriptor, layout.header, 0)
    for name, info in layout.tensors.items():
        position = info.start
        for piece in _pieces(plan, name, getattr(torch, DTYPES[info.dtype][1])):
            data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            filesystem.write_all(descriptor, data, position)
            position += data.nbytes
        if progress is not None:
            progress(info.size_bytes)


def _pieces(plan: _Plan, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of a tensor in their order, as they are written."""
    if name not in plan.matrices:
        flat = plan.owners[name].map(name).reshape(-1)
        yield from (flat[start : start + PIECE].to(dtype) for start in range(0, flat.numel(), PIECE))
        return
    matrix = plan.matrix(name)
    o, d = matrix.shape
    if name in plan.transposed:
        yield torch.from_numpy(matrix.loaded_values()).T
        return
    rows = max(1, PIECE // d)
    for start in range(0, o, rows):
        yield torch.from_numpy(matrix.loaded_values(slice(start, start + rows)))


def _plain_config(config: Mapping[str, object]) -> dict[str, object]:
    """The configuration of the float32 model; one of parts, as a language model with eyes has it, in all of them."""
    parts = {key: _floating(value) if isinstance(value, dict) else value for key, value in config.items()}
    plain = _floating(parts)
    if not {"_class_name", "dtype", "torch_dtype"} & plain.keys():  # diffusers has no dtype there
        plain["dtype"] = "float32"
    return plain


def _floating(config: Mapping[str, object]) -> dict[str, object]:
    changes = {key: "float32" for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    return {key: value for key, value in {**config, **changes}.items() if key != "quantization_config"}


def _index(layouts: Mapping[str, TensorLayout]) -> bytes:
    total = sum(info.size_bytes for layout in layouts.values() for info in layout.tensors.values())
    weight_map = {name: PurePosixPath(shard).name for shard, layout in layouts.items() for name in layout.tensors}
    return _json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _manifest(plan: _Plan, report: ConvertReport) -> bytes:
    """What became of every tensor. No times and no machine: equal inputs, equal bytes."""
    tensors = {
        tensor.name: {"dtype": tensor.dtype, "source": "4 bits" if tensor.matrix else "as it was"}
        for tensor in plan.tensors
    }
    source = {"name": plan.checkpoint.root.name, "fingerprint": plan.checkpoint.fingerprint()}
    described = {"schema_version": 1, "conversion": CONVERSION, "source": source, "notes": report.notes}
    return _json({**described, "tensors": tensors})


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
