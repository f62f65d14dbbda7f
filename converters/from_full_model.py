"""A fine-tuned model → the nearest HRA adapter of its base.

Every matrix that changed becomes a chain of R reflections; what changed beside them (norms, embeddings, the output
head, new heads, whatever has no more rows than a chain has reflections) is kept whole in the adapter, as PEFT's
`modules_to_save`, and trained biases as its `bias`. Nothing that changed is left behind.

Limits: those of `model_difference.py`; a bare parameter at the top of a model belongs to no module and is refused.
Modules are called as the loaded model calls them. Experts that it stacks have no modules of their own there: they are
called as they are stored, which `hra-export` reads and stock PEFT does not.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hra_export import names
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.companions import tokenizer_files
from hra_export.converted import ConvertReport
from hra_export.errors import CheckpointError, ConversionError, UnsupportedModelError
from hra_export.filesystem import as_output_error
from hra_export.layout import Layout
from hra_export.locator import Locator
from hra_export.nearest import chains as nearest
from hra_export.nearest.chains import NearestPlan
from hra_export.nearest.model_difference import ModelDifference, class_name, compare_models
from hra_export.nearest.weight_change import Change, Dense, Difference, dense_change
from hra_export.peft_directory import CONFIG_NAME
from hra_export.target_weights import TargetWeight, find_targets, refuse_quantized

# Directions of ΔW that the search starts from: twice those a chain can turn.
DIRECTIONS_PER_REFLECTION = 2
FEWEST_DIRECTIONS = 32
# How many names a note spells out.
NAMES_SHOWN = 3


def convert(
    source: Path,
    output: Path,
    *,
    base: Checkpoint,
    rank: int,
    targets: Collection[str] | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write the HRA adapter of rank `rank` that is nearest to a fine-tuned model.

    Args:
        source: a model directory of the base's architecture.
        output: directory to be made; PEFT loads it as HRA.
        base: what the model was fine-tuned from.
        rank: reflections of each target; even, as a rule.
        targets: module names, or the ends of them, that get chains; by default every Linear and Conv2d that changed
            but the output head.
        base_name: what the adapter calls its base; `base`'s directory by default.
        overwrite: replace an earlier output of ours.
        progress: called with the bytes of each target's weight that was done.

    Returns:
        The report; `error` is ‖W R − W'‖ / ‖ΔW‖ over all targets.

    Raises:
        CheckpointError, MismatchError, UnsupportedModelError, ConversionError: as for `plan`.
        OutputError: the output exists, the disk is full or cannot be written.
    """
    prepared = plan(source, base=base, rank=rank, targets=targets, base_name=base_name)
    return nearest.write_nearest(prepared, output, overwrite=overwrite, progress=progress)


def plan(
    source: Path,
    *,
    base: Checkpoint,
    rank: int,
    targets: Collection[str] | None = None,
    base_name: str | None = None,
) -> NearestPlan:
    """Compare the two models, and decide what gets a chain and what is kept whole; reads both once.

    Raises:
        CheckpointError: not a model, or damaged.
        MismatchError: another architecture, or other shapes; all of them.
        UnsupportedModelError: a quantized model, a weight that has no matrix, a change that no module carries; named.
        ConversionError: nothing changed, or `targets` names nothing that did.
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    tuned = _open(source)
    for model in (base, tuned):
        refuse_quantized(model)
    with as_output_error(f"read `{source}`"):
        difference = compare_models(base, tuned)
        digest = tuned.fingerprint()
    sorted_out = _sort_out(difference, tuned, rank, targets)
    model_class = class_name(tuned)
    before = find_targets(base, sorted_out.targets, model_class=model_class)
    after = find_targets(tuned, sorted_out.targets, model_class=model_class)
    nearest.check_ranks(rank, before, frozenset())

    def change(weight: TargetWeight) -> Change:
        return _change(weight, after[weight.module], rank)

    return NearestPlan(
        conversion="from_full_model",
        base=base,
        rank=rank,
        weights=before,
        idle=frozenset(),
        change=change,
        entries=[{"name": tuned.root.name, "fingerprint": digest, "targets": len(before)}],
        paths=(source,),
        companions=tokenizer_files(source),
        parameters=sorted_out.parameters,
        bias=sorted_out.bias,
        modules_to_save=sorted_out.modules_to_save,
        base_name=base_name or str(base.root),
        model_class=model_class,
        model_library=None if model_class is None else "transformers" if "model_type" in tuned.config else "diffusers",
        notes=_notes(difference, sorted_out),
    )


@dataclass(frozen=True)
class _SortedOut:
    """Where everything goes that changed."""

    targets: tuple[str, ...]
    parameters: Mapping[str, Tensor]
    bias: str
    modules_to_save: tuple[str, ...]


def _open(source: Path) -> Checkpoint:
    if (source / CONFIG_NAME).is_file() and not (source / "config.json").is_file():
        raise CheckpointError(
            f"`{source}` is an adapter, not a whole model", hint="`--from lora` or `--from hra` takes it"
        )
    return open_checkpoint(source)


def _sort_out(difference: ModelDifference, tuned: Checkpoint, rank: int, wanted: Collection[str] | None) -> _SortedOut:
    """Chains for matrices, PEFT's `bias` for biases of what is not kept whole, and whole modules for the rest."""
    model = _Model.of(tuned)
    changed = [model.called[name] for name in difference.changed]
    chosen = [
        name.removesuffix(".weight")
        for name in changed
        if name.endswith(".weight") and _is_target(name.removesuffix(".weight"), model, rank, wanted)
    ]
    _check_wanted(wanted, chosen)
    layers = {name.removesuffix(".weight") for name, shape in model.shapes.items() if len(shape) in (2, 4)}
    biases = [name for name in changed if name.endswith(".bias") and name.removesuffix(".bias") in layers]
    moved = [*changed, *(model.called[name] for name in difference.added)]
    rest = [name for name in moved if name not in biases and name.removesuffix(".weight") not in chosen]
    whole = _whole_modules(rest, model)
    targets = tuple(module for module in chosen if not names.is_under(module, whole))
    if not targets:
        raise ConversionError(
            f"no matrix of `{tuned.root}` differs from the base's in a way that a chain could follow",
            findings=[f"{module}: changed, and would be kept whole" for module in whole],
            hint=None if whole else "is this the base itself?",
        )
    biases = [name for name in biases if not names.is_under(name, whole)]
    kept = {name: model.value(name) for name in model.shapes if name in biases or names.is_under(name, whole)}
    partners = {name: value for module in whole for name, value in model.tied_values(module).items()}
    saved = dict.fromkeys([*whole, *(name.rpartition(".")[0] for name in partners)])
    return _SortedOut(targets, kept | partners, _bias_setting(biases, targets), tuple(saved))


def _bias_setting(biases: Sequence[str], targets: Sequence[str]) -> str:
    """The narrowest of PEFT's settings that trains these biases."""
    if not biases:
        return "none"
    return "hra_only" if {name.removesuffix(".bias") for name in biases} <= {*targets} else "all"


@dataclass(frozen=True)
class _Model:
    """The fine-tuned checkpoint under the names of the loaded model.

    Attributes:
        called: name on disk → the model's name.
        shapes: by the model's names.
        layout: None where nothing is known of the model but its tensors.
    """

    called: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    locator: Locator
    layout: Layout | None

    @classmethod
    def of(cls, tuned: Checkpoint) -> "_Model":
        locator = Locator(tuned, model_class=class_name(tuned))
        layout = locator.layout if tuned.config.get("model_type") else None
        called = {name: name if layout is None else layout.own_name(name) for name in locator.shapes}
        return cls(called, {called[name]: shape for name, shape in locator.shapes.items()}, locator, layout)

    def value(self, name: str) -> Tensor:
        """A tensor, paged lazily."""
        stored = next(each for each, called in self.called.items() if called == name)
        return next(file.map(stored) for file in self.locator.base.files if stored in file.tensors)

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """(o, d) of a layer."""
        first, *others = self.shapes[f"{module}.weight"]
        is_transposed = len(others) == 1 and self.layout is not None and self.layout.is_transposed(module)
        return (others[0], first) if is_transposed else (first, math.prod(others))

    def tied_values(self, module: str) -> dict[str, Tensor]:
        """Parameters that share the values of this module's and have no tensor of their own."""
        name = names.weight_name(module)
        if self.layout is None or name not in self.shapes:
            return {}
        partners = self.layout.tied_partners(name)
        return {self.layout.own_name(partner): self.value(self.called[origin]) for partner, origin in partners.items()}


def _is_target(module: str, model: _Model, rank: int, wanted: Collection[str] | None) -> bool:
    """Whether a changed weight gets a chain. With no more rows than reflections it is smaller whole, and exact."""
    if len(model.shapes[f"{module}.weight"]) not in (2, 4):
        return False
    if wanted is not None:
        return any(module == each or module.endswith(f".{each}") for each in wanted)
    if model.layout is not None and (model.layout.is_embedding(module) or model.layout.is_output_head(module)):
        return False
    rows, columns = model.matrix_shape(module)
    return rows > rank and columns >= rank


def _check_wanted(wanted: Collection[str] | None, chosen: Sequence[str]) -> None:
    missed = [each for each in wanted or () if not any(f".{module}".endswith(f".{each}") for module in chosen)]
    if missed:
        raise ConversionError(
            f"{len(missed)} targets name no matrix that changed",
            findings=[f"{each}: no such module" for each in missed],
        )


def _whole_modules(tensors: Sequence[str], model: _Model) -> list[str]:
    """The modules that these tensors belong to, outermost ones alone.

    Raises:
        UnsupportedModelError: a tensor at the top of the model.
    """
    bare = [name for name in tensors if "." not in name]
    if bare:
        raise UnsupportedModelError(
            "parameters that belong to no module changed, and an adapter keeps modules whole",
            findings=[f"{name}: {model.shapes[name]}" for name in bare],
        )
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return [module for module in modules if not any(module.startswith(f"{other}.") for other in modules)]


def _change(before: TargetWeight, after: TargetWeight, rank: int) -> Change:
    squared = 0.0
    for (_, first), (_, second) in zip(before.blocks(), after.blocks(), strict=True):
        squared += float((second - first).square().sum())
    directions = max(DIRECTIONS_PER_REFLECTION * rank, FEWEST_DIRECTIONS)
    weight, moved = nearest.held(before), nearest.held(after)
    if isinstance(weight, Dense) and isinstance(moved, Dense):
        return dense_change(weight, Dense(moved.matrix - weight.matrix), squared**0.5, directions)
    return dense_change(weight, Difference(moved, weight), squared**0.5, directions)


def _notes(difference: ModelDifference, sorted_out: _SortedOut) -> tuple[str, ...]:
    notes = []
    if sorted_out.modules_to_save:
        size = sum(value.numel() * value.element_size() for value in sorted_out.parameters.values())
        notes.append(
            f"{len(sorted_out.modules_to_save)} modules changed that get no chain, and are kept whole, "
            f"{size / 1e6:.2g} MB: {_listed(sorted_out.modules_to_save)}"
        )
    if sorted_out.bias != "none":
        notes.append("biases changed, and are kept")
    if difference.missing:
        notes.append(
            f"{len(difference.missing)} tensors of the base are not in the fine-tuned model, and stay as they are: "
            f"{_listed(difference.missing)}"
        )
    return tuple(notes)


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - NAMES_SHOWN} more" if len(words) > NAMES_SHOWN else ""
    return ", ".join(f"`{word}`" for word in words[:NAMES_SHOWN]) + more
