"""HRA → a LoRA adapter of llama.cpp: one `.gguf` file, for one base.

ΔW = B A holds for the weights that were multiplied, so the adapter of a quantized base is computed from the values
that llama.cpp dequantizes, and no other file of the same model takes it exactly.

Limits: matrices of the architectures in `ARCHITECTURES`, each of which is compared with llama.cpp in a test; no biases,
saved modules, embeddings or stacked experts.

Source: llama.cpp, `convert_lora_to_gguf.py` for the layout, `llama_adapter_lora_weight::get_scale` for the scale.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hra_export import __version__, architecture, gguf_files, llama_cpp
from hra_export.checkpoint import Checkpoint
from hra_export.converted import ConvertedTarget, ConvertReport
from hra_export.errors import ConversionError, MismatchError, NumericalError, OutputError, UnsupportedModelError
from hra_export.file_output import check_file, staged_file
from hra_export.gguf_files import TensorPlan
from hra_export.low_rank import DeltaSource, locate, rounded
from hra_export.names import weight_name
from hra_export.target_weights import TargetWeight

FORMAT = "LoRA of llama.cpp"
# transformers' model type → llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "starcoder2": "starcoder2",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
}
# `general.file_type`, from llama.cpp's `llama_ftype`.
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
OTHER_FILES = "for a `.gguf` file that was quantized from them, pass that file as base"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a target lies in llama.cpp's model.

    Attributes:
        tensor: its name there.
        rank: of ΔW, above 0.
        order: which row of the tensor each row of the weight is.
    """

    weight: TargetWeight
    tensor: str
    rank: int
    order: Tensor


@dataclass(frozen=True)
class GgufPlan:
    """A conversion that was checked; headers only were read.

    Attributes:
        architecture: llama.cpp's name of it.
        ranks: every target → its rank in the output, 0 where it is left out.
        places: where the others go.
    """

    architecture: str
    ranks: Mapping[str, int]
    places: tuple[Place, ...]

    @property
    def read_bytes(self) -> int:
        """Of the weights that will be multiplied."""
        return sum(place.weight.size_bytes for place in self.places)


def convert(
    source: DeltaSource,
    output: Path,
    *,
    base: Checkpoint,
    file: Path | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write what a source does to a base as an adapter file that llama.cpp loads beside that base.

    Ranks may differ from target to target; a target that does not change is left out.

    Args:
        source: chains before the layers, or whatever else has factors.
        output: the `.gguf` file to be made. It is absent, the old file, or complete at every instant.
        base: the checkpoint whose weights are multiplied.
        file: the `.gguf` file that `base` was dequantized from; its tensors are then the ones that must exist.
        dtype: of the factors. llama.cpp rounds what it multiplies with half factors to the same half.
        overwrite: replace an adapter of llama.cpp, and nothing else.
        progress: called with the bytes of each weight read.

    Raises:
        ConversionError, MismatchError, UnsupportedModelError: as `plan`.
        NumericalError: the dtype overflows.
        OutputError: the output exists, or cannot be written.
    """
    protected = [*source.paths, base.root, *([file] if file else [])]
    check_file(output, overwrite=overwrite, protected=protected)
    _refuse_replacing(output)
    planned, kind = plan(source, base=base, file=file), DTYPES[dtype]
    metadata = _metadata(source, base, file, planned, kind)
    done: dict[str, ConvertedTarget] = {}
    values = _factors(source, planned, kind, done, progress)
    with staged_file(output, overwrite=overwrite, protected=protected) as partial_path:
        gguf_files.write_file(partial_path, planned.architecture, metadata, _layout(planned, kind), values)
    targets = tuple(done.get(module, ConvertedTarget(module, 0, 0.0, 0.0)) for module in source.modules)
    notes = source.notes if file else (*source.notes, f"exact for the weights of `{base.root}`: {OTHER_FILES}")
    return ConvertReport(FORMAT, output, output.stat().st_size, targets, notes)


def plan(source: DeltaSource, *, base: Checkpoint, file: Path | None = None) -> GgufPlan:
    """Find a place for every target, and check everything that headers tell.

    Raises:
        ConversionError: biases, saved modules, a tied head, or no target left: llama.cpp has no place for them.
        MismatchError: source and base do not fit, or the file does not hold the targets.
        UnsupportedModelError: an architecture, or a kind of layer, that is not known to work; or no `gguf`.
    """
    gguf_files.check_installed()
    _refuse_parameters(source)
    kind = _architecture(base)
    shapes = _tensor_shapes(file, kind) if file else None
    weights = locate(source, base)
    _refuse_layers(source, weights)
    places = tuple(_places(source, base, kind, weights, shapes))
    ranks = {place.weight.module: place.rank for place in places}
    return GgufPlan(kind, {module: ranks.get(module, 0) for module in source.modules}, places)


def _refuse_replacing(output: Path) -> None:
    """What exists may be replaced if it is an adapter: not a model, nor a file of another kind."""
    if output.exists() and gguf_files.kind_of(output) != "adapter":
        raise OutputError(
            f"output `{output}` is not overwritten: it is no adapter of llama.cpp", hint="choose another output"
        )


def _refuse_parameters(source: DeltaSource) -> None:
    if source.parameters:
        raise ConversionError(
            f"{source.label} carries {len(source.parameters)} parameters that a LoRA of llama.cpp cannot",
            findings=[f"{name}: trained beside the chains" for name in source.parameters],
            hint="`hra-export merge` writes them into a model, which llama.cpp's own converter takes",
        )


def _architecture(base: Checkpoint) -> str:
    """llama.cpp's name of the base's architecture."""
    kind = str(base.config.get("model_type") or base.config.get("_class_name"))
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"base `{base.root}` is a `{kind}` model, whose adapters have not been compared with llama.cpp",
            findings=[f"known: {', '.join(ARCHITECTURES)}"],
            hint="`hra-export merge` writes a model, which llama.cpp's own converter takes",
        )
    return ARCHITECTURES[kind]


def _tensor_shapes(file: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's file."""
    reader = gguf_files.open_file(file)
    found = gguf_files.read_architecture(file, reader)
    if found != kind:
        raise MismatchError(f"`{file}` holds a `{found}` model, and the base beside it is of `{kind}`")
    return {tensor.name: gguf_files.shape_of(tensor) for tensor in reader.tensors}


def _refuse_layers(source: DeltaSource, weights: Mapping[str, TargetWeight]) -> None:
    findings = [
        f"{module}: {weight.kind}" for module, weight in weights.items() if weight.kind not in ("linear", "conv1d")
    ]
    if findings:
        raise UnsupportedModelError(
            f"{source.label} adapts {len(findings)} layers of kinds that adapters of llama.cpp are not written for",
            findings=findings,
        )


def _places(
    source: DeltaSource,
    base: Checkpoint,
    kind: str,
    weights: Mapping[str, TargetWeight],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> list[Place]:
    """A place for every target that changes; all that have none are named."""
    model = architecture.build_on_meta(architecture.find_class("AutoModelForCausalLM"), base.config)
    name_tensor = gguf_files.name_tensor(kind, model.config.num_hidden_layers)
    processor = llama_cpp.tensor_processor(kind, model.config.to_dict())
    tied = architecture.ties(model)
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    places, tied_heads, homeless = [], [], []
    for module, weight in weights.items():
        parameter = _parameter(module, weight, parameters, f"{model.base_model_prefix}.")
        tensor = name_tensor(parameter) if parameter else None
        if parameter in tied:
            tied_heads.append(f"{module}: llama.cpp multiplies with `token_embd.weight` in its place")
        elif tensor is None or (shapes is not None and tensor not in shapes):
            homeless.append(f"{module}: no tensor of the {kind} model is this weight")
        elif shapes is not None and shapes[tensor] != weight.shape:
            homeless.append(f"{module}: expected `{tensor}` of shape {weight.shape}, got {shapes[tensor]}")
        elif rank := source.rank(module):
            order = torch.from_numpy(llama_cpp.row_order(processor, tensor, weight.shape))
            places.append(Place(weight, tensor, rank, order))
    _refuse_places(source, tied_heads, homeless, has_places=bool(places))
    return places


def _refuse_places(source: DeltaSource, tied: Sequence[str], homeless: Sequence[str], *, has_places: bool) -> None:
    if homeless:
        raise MismatchError(f"{source.label} does not fit llama.cpp's model", findings=[*homeless, *tied])
    if tied:
        raise ConversionError(
            f"{source.label} adapts a head that is tied to the embedding, which llama.cpp cannot adapt apart from it",
            findings=tied,
            hint="`hra-export merge` unties it, and llama.cpp's own converter takes the result",
        )
    if not has_places:
        raise ConversionError(f"{source.label} changes nothing: every chain is the identity")


def _parameter(module: str, weight: TargetWeight, parameters: Set[str], prefix: str) -> str | None:
    """The parameter of the causal language model that a target is, also when it was adapted without the head."""
    names = [weight_name(module), *(weight.names if len(weight.names) == 1 else ())]
    candidates = [candidate for name in names for candidate in (name, prefix + name)]
    return next((name for name in candidates if name in parameters), None)


def _metadata(
    source: DeltaSource, base: Checkpoint, file: Path | None, planned: GgufPlan, dtype: torch.dtype
) -> dict[str, str | float | int]:
    """What llama.cpp reads, and where the file came from. No times and no machine: equal inputs, equal bytes.

    llama.cpp multiplies a product of rank r by alpha / r, and by 1 where alpha is 0: for ranks that differ.
    """
    ranks = {rank for rank in planned.ranks.values() if rank}
    return {
        "general.type": "adapter",
        "general.name": " + ".join(path.name for path in source.paths),
        "general.file_type": FILE_TYPES[dtype],
        "general.base_model.count": 1,
        "general.base_model.0.name": file.name if file else base.root.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ranks.pop()) if len(ranks) == 1 else 0.0,
        "hra_export.version": __version__,
        "hra_export.source.digest": source.digest,
        "hra_export.base.fingerprint": base.fingerprint(),
    }


def _layout(planned: GgufPlan, dtype: torch.dtype) -> list[TensorPlan]:
    """A (r, d) and B (o, r) of every target."""
    layout = []
    for place in planned.places:
        rows, columns = place.weight.shape
        layout.append(TensorPlan(f"{place.tensor}.lora_a", (place.rank, columns), dtype))
        layout.append(TensorPlan(f"{place.tensor}.lora_b", (rows, place.rank), dtype))
    return layout


def _factors(
    source: DeltaSource,
    planned: GgufPlan,
    dtype: torch.dtype,
    done: dict[str, ConvertedTarget],
    progress: Callable[[int], None] | None,
) -> Iterator[Tensor]:
    """The values of `_layout`, computed when they are asked for; what rounding cost is put into `done`.

    Raises:
        NumericalError: factors overflow the dtype; all of them, at the end.
    """
    overflown = []
    for place in planned.places:
        module = place.weight.module
        left, right, error, norm = rounded(*source.factors(place.weight), place.rank, dtype)
        if error == float("inf"):
            overflown.append(f"{module}: ‖ΔW‖ is {norm:.3g}")
        done[module] = ConvertedTarget(module, place.rank, norm, error)
        yield right
        moved = torch.empty_like(left)
        moved[place.order] = left
        yield moved
        if progress is not None:
            progress(place.weight.size_bytes)
    if overflown:
        raise NumericalError(
            f"the factors of {len(overflown)} targets are beyond {dtype}",
            findings=overflown,
            hint="`--dtype bfloat16` and `float32` reach further; or training diverged",
        )
