"""GGUF → a transformers directory: safetensors, configuration, tokenizer. What the file holds, nothing rounded.

Quantized blocks become the float32 values that they stand for; F32, F16 and BF16 tensors keep their dtype (vectors are
float32, as llama.cpp writes them). Names, row orders and the configuration are transformers' own reading of the file,
one tensor in memory at a time, where its loader holds all of them.

Limits: the architectures whose tensors transformers maps by `modeling_gguf_pytorch_utils`; no split files, no
big-endian ones. llama.cpp keeps long-context RoPE factors in a tensor that transformers does not read: the report
names it.

Source: GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hra_export import architecture, filesystem, ggml, gguf_files, llama_cpp, publish
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.errors import CheckpointError, UnsupportedModelError
from hra_export.gguf_files import shape_of, type_of
from hra_export.quantization import QuantizedMatrix
from hra_export.tensorfile import DTYPES, TensorLayout, lay_out, tensor_bytes

# Part of every cache name: raised when the same file would become another directory.
CONVERSION = 1
MAX_SHARD_BYTES = 5 * 10**9
PLAIN_TYPES = ("F32", "F16", "BF16")
# Tensors without trained values: RoPE frequencies, which transformers computes from the configuration.
ROPE_TENSORS = re.compile(r"(.*\.)?rope_(freqs|factors_long|factors_short)\.weight")
# What loading leaves in a configuration: paths and options of this run.
LOADING_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "is_local", "local_files_only")


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion wrote.

    Attributes:
        tensors: how many.
        dequantized: how many of them were blocks in the source.
        left_out: source tensors that are not part of the output, RoPE frequencies only.
    """

    source: Path
    output: Path
    tensors: int
    dequantized: int
    left_out: tuple[str, ...]
    size_bytes: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about it, one sentence each."""
        notes = [
            f"{self.dequantized} of {self.tensors} tensors were quantized; they are now the float32 they stand for"
        ]
        if self.left_out:
            names = ", ".join(f"`{name}`" for name in self.left_out)
            notes.append(
                f"{names} is left out, as in transformers: long contexts may behave otherwise than in llama.cpp"
            )
        return tuple(notes)


def convert(
    source: Path,
    output: Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write a GGUF file as a transformers directory.

    The output path is absent, the old directory, or complete at every instant.

    Args:
        source: a `.gguf` file.
        output: directory to be made.
        overwrite: replace an earlier output of ours.
        max_shard_bytes: of one weight file.
        progress: called with the bytes of each tensor written.

    Raises:
        FormatError: not a GGUF file, or damaged.
        CheckpointError: the file lacks tensors, or its metadata makes no model.
        UnsupportedModelError: architecture, split file or tensor type that cannot be read; or `gguf` is not installed.
        OutputError: the output exists, the disk is full or cannot be written.
    """
    reader = gguf_files.open_file(source)
    kind = _architecture(source, reader)
    config = _configuration(source, kind)
    companions = _tokenizer_files(source, kind)
    plan = _plan(source, reader, kind, config)
    companions |= _model_files(plan)
    layouts = {name: _lay_out(parameters) for name, parameters in plan.shards(max_shard_bytes).items()}
    if len(layouts) > 1:
        companions["model.safetensors.index.json"] = _index(layouts)
    return _write(plan, layouts, companions, output, overwrite=overwrite, progress=progress)


def quantized_matrices(source: Path) -> Iterator[tuple[str, QuantizedMatrix]]:
    """The file's quantized matrices with their own codes, for graphs that compute with them.

    Stacked experts, types without affine blocks and everything in floating point are left out.

    Args:
        source: a `.gguf` file.

    Yields:
        The name of transformers' parameter, and its matrix (o, d) with rows in the parameter's order; one at a time,
        nothing dequantized.

    Raises:
        FormatError: not a GGUF file, or damaged.
        CheckpointError: the file lacks tensors, or its metadata makes no model.
        UnsupportedModelError: as for `convert`.
    """
    reader = gguf_files.open_file(source)
    kind = _architecture(source, reader)
    plan = _plan(source, reader, kind, _configuration(source, kind))
    for parameter in plan.parameters:
        tensor = parameter.sources[0]
        shape = shape_of(tensor)
        if len(parameter.sources) > 1 or len(shape) != 2:
            continue
        matrix = ggml.read_blocks(type_of(tensor), tensor.data, (shape[0], shape[1]))
        if matrix is not None:
            order = llama_cpp.row_order(plan.processor, tensor.name, (shape[0], shape[1]), mapping=plan.mapping)
            yield parameter.name, matrix.rows(order)


def cache_name(source: Path) -> str:
    """A folder name for a converted file: another one whenever the file is moved, resized or touched.

    Raises:
        OSError: there is no such file.
    """
    resolved = source.resolve(strict=True)
    status = resolved.stat()
    described = f"{CONVERSION}\0{resolved}\0{status.st_size}\0{status.st_mtime_ns}"
    return f"{resolved.stem}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the model, and the tensors of the file that it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Any, ...]


@dataclass(frozen=True)
class _Plan:
    """Everything a conversion will do; `parameters` in the order in which the file completes them."""

    source: Path
    model: Any
    config: Mapping[str, object]
    processor: Any
    mapping: Mapping[str, str]
    parameters: tuple[_Parameter, ...]
    left_out: tuple[str, ...]

    @property
    def dequantized(self) -> int:
        return sum(any(type_of(each) not in PLAIN_TYPES for each in parameter.sources) for parameter in self.parameters)

    def shards(self, max_bytes: int) -> dict[str, list[_Parameter]]:
        groups: list[list[_Parameter]] = [[]]
        size = 0
        for parameter in self.parameters:
            bytes_ = tensor_bytes(parameter.dtype, parameter.shape)
            if groups[-1] and size + bytes_ > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(parameter)
            size += bytes_
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _architecture(source: Path, reader: Any) -> str:
    """`general.architecture`, if it and the file's form can be read."""
    kind = gguf_files.read_architecture(source, reader)
    if not llama_cpp.is_known(kind):
        raise UnsupportedModelError(
            f"`{source}` holds a `{kind}` model, whose tensors transformers cannot map",
            hint="use the model's own safetensors as base",
        )
    return kind


def _configuration(source: Path, kind: str) -> dict[str, object]:
    """The model's configuration, as transformers reads it from the metadata."""
    from transformers import AutoConfig

    with _alone(source, kind) as (folder, options):
        config = AutoConfig.from_pretrained(folder, **options).to_diff_dict()
    return {key: value for key, value in config.items() if key not in LOADING_KEYS}


def _tokenizer_files(source: Path, kind: str) -> dict[str, bytes]:
    """The tokenizer's files, as transformers reads them from the metadata."""
    from transformers import AutoTokenizer

    with _alone(source, kind) as (folder, options):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    with TemporaryDirectory(prefix="hra-export-") as saved:
        tokenizer.save_pretrained(saved)
        files = {path.name: path.read_bytes() for path in sorted(Path(saved).iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = _json({key: settings[key] for key in settings if key not in LOADING_KEYS})
    return files


@contextmanager
def _alone(source: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A folder with nothing but the file, and how to load from it: its neighbours must not be taken for its tokenizer.

    Raises:
        CheckpointError: transformers fails inside the block. Metadata that makes no sense fails anywhere in it, with
            any exception.
    """
    with TemporaryDirectory(prefix="hra-export-") as folder:
        Path(folder, "model.gguf").symlink_to(source.resolve())
        try:
            yield folder, {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        except Exception as error:
            raise CheckpointError(
                f"transformers cannot read the metadata of `{source}` ({kind}): {type(error).__name__}: {error}"
            ) from error


def _plan(source: Path, reader: Any, kind: str, config: dict[str, object]) -> _Plan:
    """Match the file's tensors with the model's parameters; every one must have its place."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(reader.tensors):
        raise CheckpointError(f"`{source}` claims {layers} layers and holds {len(reader.tensors)} tensors")
    try:
        model = architecture.build_on_meta(_model_class(config), config)
        processor = llama_cpp.tensor_processor(kind, config)
        mapping = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"`{source}`: {error}".splitlines()[0]) from error
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"`{source}`: its metadata makes no {kind} model: {error}") from error
    sources, left_out = _group(reader.tensors, mapping)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_complete(source, model, sources, left_out)
    parameters = tuple(_Parameter(name, _dtype(parts), shapes[name], tuple(parts)) for name, parts in sources.items())
    _check_sizes(source, parameters)
    return _Plan(source, model, config, processor, mapping, parameters, left_out)


def _model_class(config: Mapping[str, object]) -> Any:
    """The class that the file was written from: a causal language model, or an encoder and decoder."""
    import transformers
    from transformers.models.auto import modeling_auto

    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return architecture.find_class(str(architectures[0]))
    kind = str(config.get("model_type"))
    is_seq2seq = kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForSeq2SeqLM if is_seq2seq else transformers.AutoModelForCausalLM


def _group(tensors: Sequence[Any], mapping: Mapping[str, str]) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """Parameter → its tensors, in the order of their completion; and the tensors that belong to none."""
    found: dict[str, list[Any]] = {}
    left_out = []
    for tensor in tensors:
        name = _target(tensor.name, mapping)
        if name is None:
            left_out.append(tensor.name)
        else:
            found[name] = [*found.pop(name, []), tensor]
    return found, tuple(left_out)


def _target(name: str, mapping: Mapping[str, str]) -> str | None:
    """The parameter of a tensor; stacked experts are mapped without the `.weight` that the file gives them."""
    return mapping.get(name) or mapping.get(name.removesuffix(".weight"))


def _check_complete(source: Path, model: Any, found: Mapping[str, object], left_out: Sequence[str]) -> None:
    unknown = [name for name in left_out if not ROPE_TENSORS.fullmatch(name)]
    unknown += [name for name in found if name not in model.state_dict()]
    if unknown:
        raise UnsupportedModelError(
            f"`{source}` holds {len(unknown)} tensors that transformers' {type(model).__name__} has no place for",
            findings=[f"{name}: not part of this model" for name in unknown],
            hint="use the model's own safetensors as base",
        )
    tied = architecture.ties(model)
    missing = [name for name, _ in model.named_parameters() if name not in found and tied.get(name) not in found]
    if missing:
        raise CheckpointError(
            f"`{source}` lacks {len(missing)} parameters of its {type(model).__name__}",
            findings=[f"{name}: no tensor for it" for name in missing],
        )


def _check_sizes(source: Path, parameters: Sequence[_Parameter]) -> None:
    findings = []
    for parameter in parameters:
        got = [shape_of(tensor) for tensor in parameter.sources]
        if sum(map(math.prod, got)) != math.prod(parameter.shape):
            findings.append(f"{parameter.name}: expected shape {parameter.shape}, got {', '.join(map(str, got))}")
    if findings:
        raise CheckpointError(f"`{source}`: {len(findings)} tensors disagree with its metadata", findings=findings)


def _dtype(sources: Sequence[Any]) -> str:
    kinds = {type_of(tensor) for tensor in sources}
    is_half = len(kinds) == 1 and kinds <= {"F16", "BF16"} and all(len(tensor.shape) > 1 for tensor in sources)
    return kinds.pop() if is_half else "F32"


def _write(
    plan: _Plan,
    layouts: Mapping[str, TensorLayout],
    companions: Mapping[str, bytes],
    output: Path,
    *,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> ConvertReport:
    size = sum(layout.size_bytes for layout in layouts.values()) + sum(map(len, companions.values()))
    key = f"{cache_name(plan.source)} {list(layouts)}"
    with publish.stage(output, key=key, size_bytes=size, overwrite=overwrite, protected=[plan.source]) as stage:
        for name, layout in layouts.items():
            if stage.is_finished(name):  # by an interrupted conversion of the same file
                continue
            with stage.create(name, layout.size_bytes) as descriptor:
                _write_shard(plan, layout, descriptor, progress)
        for name, data in companions.items():
            stage.write_bytes(name, data)
        report = ConvertReport(plan.source, output, len(plan.parameters), plan.dequantized, plan.left_out, size)
        stage.publish(MANIFEST_NAME, _manifest(plan, report))
    return report


def _write_shard(plan: _Plan, layout: TensorLayout, descriptor: int, progress: Callable[[int], None] | None) -> None:
    filesystem.write_all(descriptor, layout.header, 0)
    for name, value in _values(plan, [parameter for parameter in plan.parameters if parameter.name in layout.tensors]):
        info = layout.tensors[name]
        if tuple(value.shape) != info.shape:
            raise CheckpointError(f"`{plan.source}`: `{name}`: expected shape {info.shape}, got {tuple(value.shape)}")
        stored = value.to(getattr(torch, DTYPES[info.dtype][1])).contiguous()
        if stored.dtype != value.dtype and not _is_same(stored, value):
            raise UnsupportedModelError(
                f"`{plan.source}`: transformers changes `{name}`, which does not fit {info.dtype}"
            )
        filesystem.write_all(descriptor, stored.view(-1).view(torch.uint8).numpy().data, info.start)
        if progress is not None:
            progress(info.size_bytes)


def _values(plan: _Plan, parameters: Sequence[_Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter in float32, rows in transformers' order. Stacked experts arrive in parts, kept in `held`."""
    for parameter in parameters:
        held: dict[str, Tensor] = {}
        for tensor in parameter.sources:
            weights = gguf_files.dequantized(plan.source, tensor)
            result = plan.processor.process(
                weights=weights,
                name=tensor.name,
                tensor_key_mapping=plan.mapping,
                parsed_parameters={"tensors": held},
            )
            if result.name is not None:
                # Copied: the values of an F32 tensor are the mapped file itself.
                held[parameter.name] = torch.from_numpy(result.weights.copy())
        if parameter.name not in held:
            raise UnsupportedModelError(
                f"`{plan.source}`: transformers does not say how `{parameter.name}` is put together"
            )
        yield parameter.name, held[parameter.name]


def _is_same(stored: Tensor, value: Tensor) -> bool:
    return bool(((stored.to(value.dtype) == value) | value.isnan()).all())


def _model_files(plan: _Plan) -> dict[str, bytes]:
    """`config.json` for the dtype that is stored, and `generation_config.json` where the model generates."""
    from transformers import GenerationConfig

    widest = max((parameter.dtype for parameter in plan.parameters), key=lambda dtype: DTYPES[dtype][0])
    settings = {"architectures": [type(plan.model).__name__], "dtype": DTYPES[widest][1]}
    files = {"config.json": _json({**plan.config, **settings})}
    if plan.model.can_generate():
        generation = GenerationConfig.from_model_config(plan.model.config)
        files["generation_config.json"] = (generation.to_json_string() + "\n").encode()
    return files


def _lay_out(parameters: Sequence[_Parameter]) -> TensorLayout:
    return lay_out(((each.name, each.dtype, each.shape) for each in parameters), {"format": "pt"})


def _index(layouts: Mapping[str, TensorLayout]) -> bytes:
    total = sum(info.size_bytes for layout in layouts.values() for info in layout.tensors.values())
    weight_map = {name: shard for shard, layout in layouts.items() for name in layout.tensors}
    return _json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _manifest(plan: _Plan, report: ConvertReport) -> bytes:
    """Where every tensor came from. No times and no machine: equal inputs, equal bytes."""
    tensors = {
        parameter.name: {
            "dtype": parameter.dtype,
            "source": {each.name: type_of(each) for each in parameter.sources},
        }
        for parameter in plan.parameters
    }
    source = {"name": plan.source.name, "size_bytes": plan.source.stat().st_size}
    described = {"schema_version": 1, "conversion": CONVERSION, "source": source, "notes": report.notes}
    return _json({**described, "left_out": report.left_out, "tensors": tensors})


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
