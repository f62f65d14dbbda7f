"""Where a parameter lives: in a checkpoint on disk (`Layout`), in a model in memory (`runtime_location`).

transformers loads many models under other names than it stores, stacks experts, splits fused projections. Mostly a
parameter is a tensor of the same name and none of this is needed; when it is not, the answer comes from transformers'
own conversion rules, run on a model without memory (meta device). No weight is read, no custom code is executed.

Limits: 3-D experts whose orientation cannot be told can be replaced, not folded into; rows of two layers that
alternate inside one tensor, and input columns spread over several, are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hra_export import architecture
from hra_export.architecture import CONV1D_MODEL_TYPES, SCALED_HEAD_MODEL_TYPES, load_class, may_have_conv1d
from hra_export.conversions import ModelNames, assemble, read_names
from hra_export.errors import UnsupportedModelError
from hra_export.pieces import Block, Region, known_axis, regions_of, substitute

__all__ = [
    "CONV1D_MODEL_TYPES",
    "Layout",
    "Location",
    "Region",
    "load_class",
    "may_have_conv1d",
    "read_layout",
    "runtime_location",
    "runtime_locations",
]


@dataclass(frozen=True)
class Location:
    """The part of one parameter of a loaded model that a module of an adapter stands for.

    Attributes:
        parameter: its name in the model.
        index: slices into it, one per axis.
        features: the axis of the parameter that carries the input features; None where it cannot be told.
        is_whole: whether that is the whole parameter.
    """

    parameter: str
    index: tuple[slice, ...]
    features: int | None
    is_whole: bool

    @property
    def input_axis(self) -> int:
        """The axis of the parameter on which a chain acts.

        Raises:
            UnsupportedModelError: there is none, or it cannot be told.
        """
        return known_axis(self.features, self.parameter)


def read_layout(
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    task: str | None = None,
    model_class: str | None = None,
) -> "Layout":
    """Prepare to look parameters up in a transformers checkpoint; the work is done on the first question.

    Args:
        config: the parsed `config.json`.
        shapes: of the tensors on disk, by name.
        task: PEFT's `task_type`, which says on which class of model the adapter was trained.
        model_class: PEFT's `auto_mapping["base_model_class"]`, which says it outright.
    """
    return Layout(config, shapes, architecture.class_names(config, task, model_class))


class Layout:
    """Where the parameters of a model lie among the tensors of a checkpoint.

    The model is the one the adapter was trained on, or, for names it does not have, the checkpoint's own class or
    its headless form. Every question may raise UnsupportedModelError: transformers does not know the model, or
    needs custom code for it. A config without a `model_type`, as diffusers', has no names but those on disk, and every
    answer is then the empty one.
    """

    def __init__(
        self, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], classes: Sequence[str]
    ) -> None:
        self._config = config
        self._shapes = shapes
        self._pending = list(classes)
        self._views: list[_View] = []
        self._reasons: list[str] = []

    def regions(self, parameter: str) -> tuple[Region, ...]:
        """The disk regions that hold a parameter, in its own order; empty when it is not on disk.

        Args:
            parameter: by any name transformers has had for it, as `model.layers.0.mlp.experts.3.w1.weight`.

        Raises:
            UnsupportedModelError: stored in a way that no chain can be folded into.
            CheckpointError: tensors that it is made of are missing.
        """
        return next((found for view in self._all_views() if (found := view.regions(parameter))), ())

    def tied_source(self, parameter: str) -> str | None:
        """The disk tensor with the values of a parameter that is tied to another; None when it is not tied."""
        view, name = self._find(parameter)
        return None if view is None else view.tied_source(name)

    def tied_partners(self, parameter: str) -> dict[str, str]:
        """What untying a parameter leaves without values: names to write on disk → disk tensors to copy them from.

        Clearing `tie_word_embeddings` ends every tie of a model: BERT's decoder bias along with its weight.
        """
        view, name = self._find(parameter)
        if view is None:
            return {}
        tied = architecture.ties(view.names.model)
        config = {**self._config, **self.untied_config_changes()}
        still_tied = architecture.ties(architecture.build_on_meta(type(view.names.model), config))
        partners = {}
        for partner in dict.fromkeys([*tied, *tied.values()]):
            source, shared = view.tied_source(partner), still_tied.get(partner)
            if partner == name or source is None or view.stored_whole(partner) is not None:
                continue
            if shared is None or shared == name or view.stored_whole(shared) is None:
                partners[view.new_name(partner)] = source
        return partners

    def untied_config_changes(self) -> dict[str, object]:
        """Keys of `config.json` to change, nested ones as nested dicts, so that tied parameters may differ.

        Empty for the T5 family, where clearing the flag changes the forward pass and transformers 5 ignores it:
        it unties by itself when the file has both tensors and they differ.
        """
        if self._config.get("model_type") in SCALED_HEAD_MODEL_TYPES:
            return {}
        changes: dict[str, object] = {"tie_word_embeddings": False}
        for key, value in self._config.items():
            if isinstance(value, Mapping) and value.get("tie_word_embeddings"):
                changes[key] = {**value, "tie_word_embeddings": False}
        return changes

    def new_name(self, parameter: str) -> str:
        """The disk name for a parameter that the checkpoint lacks, in the style of the names it has."""
        view, name = self._find(parameter)
        return parameter if view is None else view.new_name(name)

    def head_config_changes(self, parameter: str, shape: tuple[int, ...]) -> dict[str, object]:
        """Keys of `config.json` to change when a parameter is added: the class that has it, the number of labels."""
        view, name = self._find(parameter)
        if view is None or name not in view.names.shapes:
            return {}
        changes: dict[str, object] = {"architectures": [type(view.names.model).__name__]}
        old, labels = view.names.shapes[name], getattr(view.names.model.config, "num_labels", None)
        if shape != old and shape[1:] == old[1:] and old[0] == labels:
            changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(shape[0])}
            changes["label2id"] = {f"LABEL_{i}": i for i in range(shape[0])}
        return changes

    def is_transposed(self, module: str) -> bool:
        """Whether a module is transformers' Conv1D, which stores its weight (in, out)."""
        found = self._module(module)
        return architecture.is_conv1d(found)

    def is_embedding(self, module: str) -> bool:
        """Whether a module looks rows up instead of multiplying."""
        return architecture.is_embedding(self._module(module))

    def is_output_head(self, module: str) -> bool:
        """Whether a module is what the model calls its output embeddings."""
        view, _ = self._find(f"{module}.weight")
        head = None if view is None else view.names.model.get_output_embeddings()
        return head is not None and head is self._module(module)

    def own_name(self, parameter: str) -> str:
        """What the model itself calls a parameter; the name as given where the model does not hold it whole."""
        view, name = self._find(parameter)
        block = None if view is None else view.names.locate(parameter)
        is_whole = view is not None and block is not None and block.shape == view.names.shapes.get(name)
        return name if is_whole else parameter

    def conv_groups(self, module: str) -> int:
        """The groups of a convolution; 1 for everything else."""
        return int(getattr(self._module(module), "groups", 1))

    def _module(self, module: str) -> Any:
        view, name = self._find(f"{module}.weight")
        return None if view is None else view.names.model.get_submodule(name.rpartition(".")[0])

    def _find(self, parameter: str) -> "tuple[_View | None, str]":
        """The first view that has a parameter, and its name there."""
        for view in self._all_views():
            block = view.names.locate(parameter)
            if block is not None:
                return view, block.pieces[0].tensor
        return None, parameter

    def _all_views(self) -> "Iterator[_View]":
        yield from self._views
        while self._pending:
            name = self._pending.pop(0)
            # Model classes fail in every way on a config they were not written for; each failure is reported below.
            try:
                model = architecture.build_on_meta(architecture.find_class(name), self._config)
            except Exception as error:
                self._reasons.append(f"{name}: {error}".splitlines()[0])
                continue
            if type(model) not in [type(view.names.model) for view in self._views]:
                self._views.append(_View(model, self._shapes))
                yield self._views[-1]
        kind = self._config.get("model_type")
        if not self._views and kind is not None:
            raise UnsupportedModelError(
                f"transformers cannot build a model of type `{kind}`: its tensors cannot be matched with the adapter's",
                findings=self._reasons,
                hint="models that bring their own code are not executed; upgrade transformers if the model is new",
            )


class _View:
    """One class of model over the tensors of a checkpoint."""

    def __init__(self, model: Any, stored: Mapping[str, tuple[int, ...]]) -> None:
        self.names = read_names(model)
        self._blocks, self._errors = assemble(self.names, stored)
        self._used = [rule for rule in self.names.renamings if rule.was_used()]

    def regions(self, parameter: str) -> tuple[Region, ...]:
        block = self.names.locate(parameter)
        if block is None:
            return ()
        parents = [piece.tensor for piece in block.pieces]
        for parent in parents:
            if parent in self._errors:
                raise self._errors[parent]
            if parent not in self._blocks:
                return ()
        if len(parents) == 1 and block.shape == self.names.shapes[parents[0]] and _is_identity(block):
            found = self._blocks[parents[0]]  # its own shape: a vocabulary may have been resized
        else:
            found = substitute(block, self._blocks.__getitem__)
        return regions_of(parameter, found, _input_axis(self.names, block))

    def stored_whole(self, name: str) -> str | None:
        """The disk tensor that is exactly this parameter, if there is one."""
        block = self._blocks.get(name)
        return block.pieces[0].tensor if block is not None and len(block.pieces) == 1 else None

    def tied_source(self, name: str) -> str | None:
        """The disk tensor with the values of a tied parameter, its own if there is one."""
        tied = architecture.ties(self.names.model)
        if name not in {*tied, *tied.values()}:
            return None
        return next(filter(None, map(self.stored_whole, architecture.tied_group(name, tied))), None)

    def new_name(self, name: str) -> str:
        stored = name
        for rule in reversed(self._used):
            stored = rule.reverse_transform().rename_source_key(stored)[0]
        return stored if self.names.rename(stored)[0] == name else name


def runtime_locations(model: Any, parameter: str) -> tuple[Location, ...]:
    """The parameters of a loaded model that a parameter of an adapter stands for; empty when it has none.

    Args:
        model: any module, on any device; not changed. Only a PreTrainedModel knows names other than its own.
        parameter: by any name transformers has had for it.
    """
    names = read_names(model)
    block = names.locate(parameter)
    if block is None:
        return ()
    return tuple(
        Location(
            region.tensor,
            tuple(slice(start, stop) for start, stop in region.index),
            region.features,
            tuple(stop - start for start, stop in region.index) == names.shapes[region.tensor],
        )
        for region in regions_of(parameter, block, _input_axis(names, block))
    )


def runtime_location(model: Any, parameter: str) -> Location | None:
    """The one place of `runtime_locations`; None when the model has no such parameter.

    Raises:
        UnsupportedModelError: the model has split it over several parameters.
    """
    locations = runtime_locations(model, parameter)
    if len(locations) > 1:
        places = ", ".join(f"`{location.parameter}`" for location in locations)
        raise UnsupportedModelError(f"`{parameter}` is spread over {places} in this {type(model).__name__}")
    return locations[0] if locations else None


def _is_identity(block: Block) -> bool:
    (piece,) = block.pieces
    return piece.index == piece.place and piece.axes == tuple(range(len(block.shape)))


def _input_axis(names: ModelNames, block: Block) -> int | None:
    """The axis of a block of model parameters along which the input features lie."""
    axes = set()
    for piece in block.pieces:
        inside = architecture.input_axis(names.model, piece.tensor, names.shapes[piece.tensor])
        axes.add(piece.axes.index(inside) if inside is not None and inside in piece.axes else None)
    return axes.pop() if len(axes) == 1 else None
