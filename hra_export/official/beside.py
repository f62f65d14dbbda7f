"""What a file of other code holds beside its chains: the base's own weights, heads that were added, the rest of a run.

Weights of the base are compared with the base, never taken from the file. Parameters that the base lacks are carried:
the authors' DeBERTa code trains beside a classifier that is random and in no other file.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hra_export import names
from hra_export.checkpoint import Checkpoint
from hra_export.locator import Locator
from hra_export.official.layouts import PROCESSOR_BUFFERS
from hra_export.official.ldm_names import LDM_PREFIX

# Everything of the authors' controllable generation that makes the hint: it was trained with the chains.
HINT_ENCODER = "control_model."
_PIPELINE = re.compile(r"(first_stage_model|cond_stage_model|model_ema|logvar)\b")
# What the layouts with adapters of PEFT's kind keep beside their chains is named as PEFT names it.
PEFT_LIKE = ("llama", "peft", "peft-draft")
WHOLE_MODELS = ("nlu", "subject", "v-list", "control")


@dataclass
class Beside:
    """The tensors beside the chains, sorted.

    Attributes:
        base_values: what should be equal to the base's own, by its names.
        parameters: what was trained or made beside the chains and belongs to the adapter.
        modules_to_save: the modules that carried parameters lie in, where the base lacks them.
        notes: what a user should know, one sentence each.
        unknown: tensors that the layout does not have.
    """

    base_values: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def sort_beside(layout: str, tensors: Mapping[str, Tensor], modules_to_save: tuple[str, ...] = ()) -> Beside:
    """Sort the tensors that are no chains, by their names.

    Args:
        layout: one of `layouts.LAYOUTS`.
        tensors: under the base's names where they repeat its weights.
        modules_to_save: as the configuration has it, for PEFT's layouts.
    """
    if layout in PEFT_LIKE:
        return _of_adapter(tensors, modules_to_save)
    if layout not in WHOLE_MODELS:
        return Beside(unknown=[f"{name}: {tuple(value.shape)}" for name, value in tensors.items()])
    beside = Beside()
    counters = []
    for name, value in tensors.items():
        if PROCESSOR_BUFFERS.fullmatch(name):
            continue
        if layout == "control" and _is_elsewhere(name):
            continue
        if value.is_floating_point():
            beside.base_values[name] = value
        else:
            counters.append(name)
    if counters:
        beside.notes.append(f"{len(counters)} tensors that are no floats were left out: {_listed(counters)}")
    if layout == "control":
        beside.notes += _of_pipeline(tensors)
    return beside


def use_base_(layout: str, beside: Beside, modules: Collection[str], base: Checkpoint | None) -> None:
    """Compare `beside.base_values` with the base, and carry what it lacks, in `beside` itself.

    Args:
        layout: one of `layouts.LAYOUTS`.
        beside: changed in place.
        modules: that carry chains.
        base: None when the caller has none; then what lies outside of the adapted part of the model is carried.
    """
    if not beside.base_values:
        return
    if base is None:
        roots = {module.partition(".")[0] for module in modules}
        known = {name for name in beside.base_values if name.partition(".")[0] in roots}
        beside.notes.append(f"{len(known)} weights of the base in the file were not compared with it: no base given")
    else:
        known = _known(base, beside.base_values)
        beside.notes += _differences(base, {name: beside.base_values[name] for name in sorted(known)})
    lacking = [name for name in beside.base_values if name not in known]
    if not lacking:
        return
    if layout != "nlu":  # only that code adds layers of its own
        beside.unknown += [f"{name}: neither a chain nor a weight of the base" for name in lacking]
        return
    saved = {
        name: _smallest_module(name, [*known, *(names.weight_name(module) for module in modules)]) for name in lacking
    }
    beside.unknown += [
        f"{name}: belongs to no module that the base lacks" for name, module in saved.items() if not module
    ]
    beside.parameters.update({name: beside.base_values[name] for name in lacking})
    beside.modules_to_save = tuple(dict.fromkeys(module for module in saved.values() if module))
    beside.notes.append(f"carried along, for the base lacks it: {_listed(beside.modules_to_save)}")


def _of_adapter(tensors: Mapping[str, Tensor], modules_to_save: tuple[str, ...]) -> Beside:
    beside = Beside(modules_to_save=modules_to_save)
    for name, value in tensors.items():
        key = names.parse_adapter_key(name, modules_to_save)
        if key is None or key.kind == "chain":
            beside.unknown.append(f"{name}: {tuple(value.shape)}")
        elif key.kind == "parameter":
            beside.parameters[key.path] = value
    return beside


def _is_elsewhere(name: str) -> bool:
    """Whether this belongs to another part of an LDM pipeline than the UNet, whose weights have diffusers' names."""
    return name.startswith((HINT_ENCODER, LDM_PREFIX)) or bool(_PIPELINE.match(name)) or "." not in name


def _of_pipeline(tensors: Mapping[str, Tensor]) -> list[str]:
    """Notes on what an LDM checkpoint holds besides its UNet."""
    hint = [name for name in tensors if name.startswith(HINT_ENCODER)]
    unmapped = [name for name in tensors if name.startswith(LDM_PREFIX)]
    others = [name for name in tensors if _is_elsewhere(name) and name not in {*hint, *unmapped}]
    notes = []
    if hint:
        notes.append(
            f"the hint encoder was trained with the chains and is no part of the adapter: {_listed(hint)}; diffusers "
            "has no such module, and without it the UNet follows no hint"
        )
    if unmapped:
        notes.append(f"{len(unmapped)} tensors have no place in diffusers' UNet: {_listed(unmapped)}")
    if others:
        parts = dict.fromkeys(name.partition(".")[0] for name in others)
        notes.append(f"{len(others)} tensors of other parts of the pipeline were left out: {_listed(parts)}")
    return notes


def _known(base: Checkpoint, values: Mapping[str, Tensor]) -> set[str]:
    """The parameters that a base has, under the same name or another."""
    locator = Locator(base)
    stored = base.tensors
    return {
        name
        for name in values
        if name in stored or (base.config and locator.find(name.rpartition(".")[0], name).regions)
    }


def _differences(base: Checkpoint, values: Mapping[str, Tensor]) -> list[str]:
    """A note on weights that are not the base's, if any; those stored under another name are not compared."""
    files = {name: file for file in base.files for name in file.tensors}
    compared = [name for name in values if name in files]
    differing = {}
    for name in compared:
        own, stored = values[name], files[name].map(name)
        if own.numel() != stored.numel():
            differing[name] = float("inf")
        elif not stored.reshape(own.shape).to(own.dtype).equal(own):  # rounded once, as the training code loaded it
            change = (own.double() - stored.reshape(own.shape).double()).norm()
            differing[name] = float(change / stored.double().norm().clamp_min(torch.finfo(torch.float64).tiny))
    if not differing:
        return [f"{len(compared)} weights in the file are those of the base"] if compared else []
    worst = max(differing, key=lambda name: differing[name])
    share = f"{len(differing)} of {len(compared)} weights in the file differ from base `{base.root}`"
    return [f"{share}, most `{worst}` by {differing[worst]:.1e}: the chains were trained on other weights than these"]


def _smallest_module(name: str, known: Iterable[str]) -> str:
    """The shortest part of a parameter's path under which nothing is known; empty when there is none."""
    parts = name.split(".")
    paths = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in paths if not any(other.startswith(f"{path}.") for other in known)), "")


def _listed(words: Iterable[str], most: int = 4) -> str:
    shown = [f"`{word}`" for word in words]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
