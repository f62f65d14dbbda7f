"""Where a parameter lies in a checkpoint: under its own name, by transformers' mapping, or through a tie. Headers only.

The layout of `layout.py` costs a model on the meta device, so it is asked only where a name does not match directly.
"""

from dataclasses import dataclass
from functools import cached_property

from hra_export.checkpoint import Checkpoint
from hra_export.layout import Layout, Region, may_have_conv1d, read_layout


@dataclass(frozen=True)
class Found:
    """The disk regions of a parameter, in its own order; none when the checkpoint does not have it.

    Attributes:
        tied_to: the disk tensor whose values it shares, when it has no tensor of its own or may not keep it.
    """

    regions: tuple[Region, ...]
    tied_to: str | None = None


@dataclass(frozen=True)
class Locator:
    """Looks parameters up in one checkpoint.

    Attributes:
        task: PEFT's `task_type`, which says on which class of model an adapter was trained.
        model_class: PEFT's `auto_mapping["base_model_class"]`, which says it outright.
    """

    base: Checkpoint
    task: str | None = None
    model_class: str | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor on disk."""
        return {name: info.shape for name, info in self.base.tensors.items()}

    @cached_property
    def layout(self) -> Layout:
        """transformers' own view of this checkpoint."""
        return read_layout(self.base.config, self.shapes, task=self.task, model_class=self.model_class)

    def find(self, module: str, parameter: str) -> Found:
        """The disk regions of a parameter of a module.

        Raises:
            UnsupportedModelError: it is stored in a way that no chain can be folded into, or transformers does not
                know the model.
            CheckpointError: tensors that it is made of are missing.
        """
        direct = next((name for name in (parameter, module) if name in self.shapes), None)
        if direct is not None and not self.may_be_tied(direct) and not self._is_stacked(direct):
            return Found((self._direct_region(module, direct),))
        has_layout = bool(self.base.config)
        source = self.layout.tied_source(parameter) if has_layout else None
        if source is not None:
            shape = self.shapes[source]
            return Found((Region(source, tuple((0, size) for size in shape), len(shape) - 1),), source)
        known = self.layout.regions(parameter) if has_layout and (direct is None or self._is_stacked(direct)) else ()
        return Found(known or (() if direct is None else (self._direct_region(module, direct),)))

    def may_be_tied(self, name: str) -> bool:
        """Whether a tensor could share its values with another: only those with one row per token are tied."""
        shape = self.shapes[name]
        text = self.base.config.get("text_config")
        sizes = (self.base.config.get("vocab_size"), text.get("vocab_size") if isinstance(text, dict) else None)
        return len(shape) == 2 and shape[0] in sizes

    def _direct_region(self, module: str, name: str) -> Region:
        shape = self.shapes[name]
        axis = 1 if len(shape) in (2, 4) else len(shape) - 1
        if len(shape) == 2 and may_have_conv1d(self.base.config) and self.layout.is_transposed(module):
            axis = 0
        return Region(name, tuple((0, size) for size in shape), axis)

    def _is_stacked(self, name: str) -> bool:
        """Whether a tensor holds several matrices, experts for example, whose orientation only the model tells."""
        return len(self.shapes[name]) == 3
