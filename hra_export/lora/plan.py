"""A LoRA adapter before it is written: targets, ranks, layout of the weights file. Headers only, all findings at once.

What readers make of the files, where they say nothing themselves, becomes a note: vLLM, SGLang and TGI read PEFT's
files by rules of their own.

Source: vLLM `lora/peft_helper.py` and `lora/lora_model.py`; SGLang `srt/lora/lora_config.py`; TGI `adapters/lora.py`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hra_export import names, tensorfile
from hra_export.checkpoint import Checkpoint
from hra_export.composition import for_every_chain
from hra_export.errors import ConversionError
from hra_export.locator import Locator
from hra_export.lora import layout as lora_layout
from hra_export.lora.layout import FileLayout
from hra_export.low_rank import DeltaSource, kept_parameters, locate
from hra_export.plan import STORED_DTYPES
from hra_export.target_weights import TargetWeight

Dtype = Literal["float32", "bfloat16", "float16"]
LayoutChoice = Literal["auto", "peft", "diffusers"]

# vLLM makes room for this rank unless `--max-lora-rank` says more.
VLLM_DEFAULT_RANK = 16
LAYER_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class LoraPlan:
    """A conversion that was checked against the base.

    Attributes:
        component: of a diffusers pipeline; None for PEFT's layout.
        weights: the targets that are written.
        idle: those of them that change nothing: zeros, for which no weight is read.
        ranks: of every target of the source, in its order; 0 for those left out.
        parameters: key → value of what was trained beside the chains.
        arguments: of PEFT's LoraConfig, those that say which modules have factors and of which rank.
        file: the weights file to be written.
        notes: what a user should know about it, one sentence each.
    """

    source: DeltaSource
    base: Checkpoint
    component: str | None
    dtype: Dtype
    weights: Mapping[str, TargetWeight]
    idle: frozenset[str]
    ranks: Mapping[str, int]
    parameters: Mapping[str, Tensor]
    arguments: Mapping[str, object]
    file: tensorfile.TensorLayout
    notes: tuple[str, ...]

    @property
    def layout(self) -> FileLayout:
        """Whose files these are."""
        return "peft" if self.component is None else "diffusers"

    @property
    def weights_name(self) -> str:
        """Name of the weights file."""
        return lora_layout.WEIGHTS_NAMES[self.layout]

    @property
    def size_bytes(self) -> int:
        """Of the weights file."""
        return self.file.size_bytes

    @property
    def read_bytes(self) -> int:
        """Of the weights that are read, which progress counts."""
        return sum(weight.size_bytes for module, weight in self.weights.items() if module not in self.idle)


def plan_lora(
    source: DeltaSource,
    *,
    base: Checkpoint,
    dtype: Dtype = "float32",
    mixed_ranks: bool = False,
    layout: LayoutChoice = "auto",
) -> LoraPlan:
    """Find every target and its rank, and lay the weights file out.

    Args:
        source: what changes the weights.
        base: whose weights the factors are computed from.
        dtype: of the factors.
        mixed_ranks: every target in its own rank, idle ones left out. Otherwise the largest is everybody's.
        layout: `auto` is diffusers' for a denoiser of diffusers, PEFT's for everything else.

    Raises:
        MismatchError: targets that the base does not have, or of another shape; all of them.
        UnsupportedModelError: a quantized base, or a weight that no LoRA stands for.
        ConversionError: the layout has no place for something that was trained; all of it.
        NumericalError: a chain has no direction.
    """
    component = _component(base, layout)
    weights = locate(source, base)
    parameters = _carried(source, weights)
    if component is not None:
        _refuse_beside_factors(source, parameters)
    own = for_every_chain(source.modules, source.rank)
    ranks = _written_ranks(own, mixed_ranks=mixed_ranks)
    written = {module: weights[module] for module in own if ranks[module]}
    arguments = lora_layout.lora_arguments(
        {module: ranks[module] for module in written},
        fan_in_fan_out=all(weight.kind == "conv1d" for weight in written.values()),
        known=[name.rpartition(".")[0] for name in base.tensors],
    )
    stored = {names.parameter_key(name, written): value for name, value in parameters.items()}
    notes = [*source.notes, *_rank_notes(own, ranks), *_tie_notes(source, base, weights)]
    notes += [] if component is not None else _server_notes(source, base, parameters)
    file = _lay_out(written, ranks, stored, _metadata(arguments, component), component, dtype)
    idle = frozenset(module for module in written if not own[module])
    return LoraPlan(source, base, component, dtype, written, idle, ranks, stored, arguments, file, tuple(notes))


def _component(base: Checkpoint, layout: LayoutChoice) -> str | None:
    if layout == "peft":
        return None
    found = lora_layout.diffusers_component(base.component, base.config.get("_class_name"))
    if found is None and layout == "diffusers":
        raise ConversionError(
            f"base `{base.root}` is no denoiser of a diffusers pipeline, and diffusers loads LoRA into nothing else",
            hint="`--library peft` writes what PEFT loads",
        )
    return found


def _carried(source: DeltaSource, weights: Mapping[str, TargetWeight]) -> dict[str, Tensor]:
    carried, retrained = kept_parameters(source, weights)
    if retrained:
        raise ConversionError(
            f"{source.label} brings its own weight for {len(retrained)} targets, and a LoRA has no place for both",
            findings=[f"{name}: differs from the base's, for which the factors would hold" for name in retrained],
            hint="`hra-export merge` takes such adapters",
        )
    return carried


def _refuse_beside_factors(source: DeltaSource, parameters: Mapping[str, Tensor]) -> None:
    if parameters:
        raise ConversionError(
            f"{source.label} carries {len(parameters)} trained parameters, and diffusers loads factors alone",
            findings=[f"{name}: no place in diffusers' layout" for name in parameters],
            hint="`--library peft` carries them for PEFT; `hra-export merge` takes them all",
        )


def _written_ranks(own: Mapping[str, int], *, mixed_ranks: bool) -> dict[str, int]:
    """The rank of each target in the file.

    Where one rank is everybody's, idle targets are zeros and not left out: TGI drops a kind of layer when one of them
    lacks it, and says nothing.
    """
    largest = max(own.values())
    if mixed_ranks and largest:
        return dict(own)
    return dict.fromkeys(own, max(largest, 1))  # an adapter that does nothing is one, too


def _lay_out(
    weights: Mapping[str, TargetWeight],
    ranks: Mapping[str, int],
    parameters: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    component: str | None,
    dtype: Dtype,
) -> tensorfile.TensorLayout:
    tensors = [(key, tensorfile.dtype_name(value.dtype), tuple(value.shape)) for key, value in parameters.items()]
    for module, weight in weights.items():
        keys = lora_layout.factor_keys(weight, component)
        shapes = lora_layout.factor_shapes(weight, ranks[module])
        tensors += [(key, STORED_DTYPES[dtype], shape) for key, shape in zip(keys, shapes, strict=True)]
    return tensorfile.lay_out(sorted(tensors), metadata)


def _metadata(arguments: Mapping[str, object], component: str | None) -> dict[str, str]:
    if component is None:
        return {"format": "pt"}
    described = lora_layout.diffusers_metadata(arguments, component)
    return {"format": "pt", lora_layout.DIFFUSERS_METADATA_KEY: json.dumps(described, indent=2)}


def _rank_notes(own: Mapping[str, int], ranks: Mapping[str, int]) -> list[str]:
    notes = []
    idle = sum(rank == 0 for rank in own.values())
    if idle:
        how = "zeros" if all(ranks.values()) else "left out"
        notes.append(f"{idle} of {len(own)} targets change nothing: their factors are {how}")
    if len(set(ranks.values()) - {0}) > 1:
        notes.append("targets differ in rank: vLLM, SGLang and TGI take one rank for all")
    largest = max(ranks.values())
    if largest > VLLM_DEFAULT_RANK:
        room = 1 << (largest - 1).bit_length()
        notes.append(f"rank {largest}: vLLM needs `--max-lora-rank {room}`; it makes room for {VLLM_DEFAULT_RANK}")
    return notes


def _tie_notes(source: DeltaSource, base: Checkpoint, weights: Mapping[str, TargetWeight]) -> list[str]:
    """Heads whose weight is the embedding's."""
    locator = Locator(base, source.task, source.model_class)
    heads = [weight for weight in weights.values() if any(map(locator.may_be_tied, weight.names))]
    tied = [w.module for w in heads if locator.find(w.module, names.weight_name(w.module)).tied_to is not None]
    return [
        f"`{module}` shares its weight in the base: the factors change this module alone, and nothing is untied"
        for module in tied
    ]


def _server_notes(source: DeltaSource, base: Checkpoint, parameters: Mapping[str, Tensor]) -> list[str]:
    """What servers of language models drop or refuse."""
    notes = []
    if parameters:
        notes.append(
            f"{len(parameters)} trained biases and saved tensors are carried for PEFT: vLLM refuses such adapters, "
            "SGLang and TGI serve the factors alone; `hra-export merge` keeps everything"
        )
    partial = _partial_kinds(source.modules, base.config)
    if partial:
        notes.append(f"{', '.join(partial)}: not a target in every layer, and TGI then drops it in all of them")
    return notes


def _partial_kinds(modules: Sequence[str], config: Mapping[str, object]) -> list[str]:
    """Kinds of layer, as `self_attn.q_proj`, that are targets in some layers only of a model that generates text."""
    layers, classes = config.get("num_hidden_layers"), config.get("architectures")
    generates = isinstance(classes, list) and any(str(name).endswith(("CausalLM", "LMHeadModel")) for name in classes)
    if not generates or not isinstance(layers, int):
        return []
    kinds = Counter(module[found.end() :] for module in modules if (found := LAYER_NUMBER.search(module)) is not None)
    return [f"`{kind}`" for kind, count in kinds.items() if count < layers]
