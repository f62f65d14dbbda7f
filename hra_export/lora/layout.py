"""The files of a LoRA adapter: tensor keys and shapes, PEFT's configuration, diffusers' metadata. Values only.

PEFT keeps factors under `base_model.model.<module>`, diffusers under the name of the component of a pipeline; both
take ΔW = (alpha / r) B A, here with alpha = r.

Limits: PEFT builds the factors of a convolution without its dilation and padding mode. It fails on a dilated one, and
pads the input of A with zeros where the base wraps or mirrors it.

Source: PEFT `tuners/lora/layer.py`, `tuners/tuners_utils.py`, `utils/other.py`; diffusers `loaders/peft.py`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from hra_export.modelcard import adapter_front_matter
from hra_export.names import PEFT_PREFIX
from hra_export.peft_directory import WEIGHTS_NAME
from hra_export.target_weights import TargetWeight

FileLayout = Literal["peft", "diffusers"]

WEIGHTS_NAMES: dict[FileLayout, str] = {
    "peft": WEIGHTS_NAME,
    "diffusers": "pytorch_lora_weights.safetensors",
}
# The key of `__metadata__` in which diffusers looks for the arguments of PEFT's LoraConfig, as JSON.
DIFFUSERS_METADATA_KEY = "lora_adapter_metadata"
# What PEFT calls HRA's words for the biases that were trained.
BIASES = {"none": "none", "hra_only": "lora_only", "all": "all"}


class FactorKeys(NamedTuple):
    """The keys of a target's two factors."""

    a: str
    b: str


def diffusers_component(component: str, class_name: object) -> str | None:
    """The name under which a diffusers pipeline keeps a denoiser; None when diffusers loads no LoRA into this base.

    Args:
        component: the folder of a pipeline that holds the weights, if any.
        class_name: `_class_name` of its configuration.
    """
    if component:
        return component
    if not isinstance(class_name, str):
        return None
    return next((name for name in ("unet", "transformer") if name in class_name.lower()), None)


def factor_keys(weight: TargetWeight, component: str | None) -> FactorKeys:
    """The keys of A and B.

    Args:
        weight: of the target.
        component: of a diffusers pipeline; None for PEFT's layout.
    """
    stem = f"{PEFT_PREFIX if component is None else component + '.'}{weight.module}"
    if weight.kind == "embedding":  # parameters of the layer itself, where others are layers with a weight
        return FactorKeys(f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B")
    return FactorKeys(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")


def factor_shapes(weight: TargetWeight, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B as they are stored; see `as_stored`."""
    o, d = weight.shape
    if weight.kind == "embedding":
        return (rank, o), (d, rank)
    if weight.kernel is not None:
        return (rank, *weight.kernel), (o, rank, 1, 1)
    return (rank, d), (o, rank)


def as_stored(weight: TargetWeight, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW = B A as PEFT's layers take it.

    A convolution's A carries the kernel, and its B is 1×1. An embedding looks rows of Aᵀ up, so its ΔW is Aᵀ Bᵀ and
    the factors change places.

    Args:
        weight: of the target.
        left: B (o, r).
        right: A (r, d).

    Returns:
        A and B in the shapes of `factor_shapes`, contiguous.
    """
    a_shape, b_shape = factor_shapes(weight, right.shape[0])
    a, b = (left.T, right.T) if weight.kind == "embedding" else (right, left)
    return a.reshape(a_shape).contiguous(), b.reshape(b_shape).contiguous()


def lora_arguments(ranks: Mapping[str, int], *, fan_in_fan_out: bool, known: Iterable[str]) -> dict[str, object]:
    """The arguments of LoraConfig that say which modules have factors, and of which rank.

    Args:
        ranks: module path → r, at least one. Ranks that differ go into patterns, with alpha = r for each.
        fan_in_fan_out: every target is a Conv1D of transformers.
        known: paths of other modules of the model, as far as they are known.
    """
    rank = max(ranks.values())
    pattern = rank_pattern(ranks) if len(set(ranks.values())) > 1 else {}
    return {
        "alpha_pattern": pattern,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_alpha": rank,
        "r": rank,
        "rank_pattern": pattern,
        "target_modules": target_modules(ranks, known),
    }


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Every module's own rank, so that PEFT finds it under the whole path.

    Since 0.15 PEFT takes the first key that matches the end of a path as a regular expression. Longer paths stand
    first, so that no key is met that is only the end of the path.
    """
    return {module: ranks[module] for module in sorted(ranks, key=lambda module: (-len(module), module))}


def target_modules(modules: Collection[str], known: Iterable[str]) -> list[str] | str:
    """Exactly these modules, in PEFT's terms.

    A name in PEFT's list is also the end of longer names: `conv` would adapt `block.conv`. Where that would happen the
    answer is a pattern for the whole name, which some servers do not read.
    """
    chosen = set(modules)
    ends = (path.split(".", i)[-1] for path in known if path not in chosen for i in range(1, path.count(".") + 1))
    ordered = sorted(chosen)
    return ordered if chosen.isdisjoint(ends) else "|".join(re.escape(module) for module in ordered)


def peft_config(
    arguments: Mapping[str, object],
    *,
    bias: str,
    modules_to_save: Collection[str],
    base: str | None,
    task: str | None,
    model_class: str | None,
    model_library: str | None,
) -> dict[str, object]:
    """`adapter_config.json`: the fields that PEFT has had since 0.12, which refuses those it does not know.

    Args:
        arguments: of `lora_arguments`.
        bias: HRA's word for the biases that were trained.
        modules_to_save: modules that were trained whole.
        base: `base_model_name_or_path`.
        task: PEFT's `task_type`.
        model_class: the class of a model without a task.
        model_library: the module that has this class.
    """
    mapping = {"base_model_class": model_class, "parent_library": model_library}
    fields = {
        "auto_mapping": mapping if all(mapping.values()) else None,
        "base_model_name_or_path": base,
        "bias": BIASES[bias],
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
        **arguments,
    }
    return dict(sorted(fields.items()))


def diffusers_metadata(arguments: Mapping[str, object], component: str) -> dict[str, object]:
    """What diffusers passes to LoraConfig, each name under the component's: it need not guess rank and alpha."""
    return {f"{component}.{name}": value for name, value in arguments.items()}


def model_card(title: str, base: str | None, entries: Iterable[Mapping[str, object]], *, library: str) -> str:
    """README.md with `base_model`, which the Hub shows, and a line on each adapter.

    Args:
        title: the base's name.
        base: what the adapters call it.
        entries: of a manifest, one for each adapter.
        library: `peft` or `diffusers`.
    """
    front = adapter_front_matter(base, {"library_name": library, "tags": ["lora", "hra"]})
    lines = [", ".join(f"{key} {value}" for key, value in entry.items() if value is not None) for entry in entries]
    listed = "\n".join(f"- {line}" for line in lines)
    return (
        f"{front}# {title}, with HRA adapters as LoRA\n\n"
        "The Householder reflections of these adapters as low-rank factors. They hold for the weights they were "
        f"computed from, and for no other base:\n\n{listed}\n\n"
        "`hra_export_manifest.json` says what rounding cost each target. Made with `hra-export convert --to lora`.\n"
    )
