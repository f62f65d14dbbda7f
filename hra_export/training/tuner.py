"""PEFT's HRA tuner with fast layers; the files, names and configuration stay PEFT's.

    get_hra_model(model, HRAConfig(...))     a `PeftModel`, as `peft.get_peft_model` makes it
    load_hra_model(model, directory)         the same with a saved adapter, as `PeftModel.from_pretrained`
    accelerate_peft(model)                   swap the layers of an existing `PeftModel`, in place

PEFT chooses the tuner's class from a table of its own. While a model is built here, that table names ours; building
models in several threads at once is not safe.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import HRAConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.hra.layer import HRAConv2d, HRALayer, HRALinear
from peft.tuners.hra.model import HRAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hra_export.errors import HraExportError, MismatchError, UnsupportedModelError
from hra_export.training.layers import (
    BASE,
    ReflectionConv2d,
    ReflectionLayer,
    ReflectionLinear,
    chain_features,
)
from hra_export.training.workspace import Workspace

logger = logging.getLogger(__name__)


class ReflectionModel(HRAModel):
    """PEFT's `HRAModel` that carries our layers, in front of any Linear-like module or Conv2d.

    Beyond PEFT's: GPT-2's Conv1D and quantized layers as targets, and `adapter_names` in a forward pass.
    """

    workspace: Workspace

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's layers in; a refusal names every target that does not fit, and takes the layers out again.

        Raises:
            MismatchError: no target matches, or the rank exceeds a target's input features.
            UnsupportedModelError: a target is of a kind that HRA defines no chain for.
        """
        self._refused: list[HraExportError] = []
        before = {id(module) for module in model.modules()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            raise MismatchError(f"no target: {error}", hint="`target_modules` takes names, or a pattern") from error
        if self._refused:
            _take_out(model, adapter_name, before)
            kind = type(max(self._refused, key=lambda error: isinstance(error, UnsupportedModelError)))
            raise kind(
                f"{len(self._refused)} targets do not fit",
                findings=[error.message for error in self._refused],
                hint="choose a smaller rank, or leave these modules out of `target_modules`",
            )

    def _prepare_model(self, peft_config: HRAConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if "workspace" not in self.__dict__:
            self.workspace = Workspace()
            self.workspace.watch(model)

    def _create_and_replace(
        self,
        hra_config: HRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: object,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        try:
            features = chain_features(base)
        except UnsupportedModelError as error:
            self._refused.append(UnsupportedModelError(f"{current_key}: {error.message}"))
            return
        if not 1 <= hra_config.r <= features:
            expected = f"{current_key}: expected a rank of 1 to {features}, its input features, got {hra_config.r}"
            self._refused.append(MismatchError(expected))
        elif isinstance(target, HRALayer):
            target.update_layer(adapter_name, r=hra_config.r, config=hra_config)
        else:
            kind = ReflectionConv2d if isinstance(base, nn.Conv2d) else ReflectionLinear
            layer = kind(target, adapter_name, config=hra_config, r=hra_config.r, workspace=self.workspace)
            self.workspace.add([layer])
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained until it is made active
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names` of a forward pass, handed to every layer: PEFT calls this around each pass.

        Raises:
            ValueError: in training mode, a name that no layer has, or beam search.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names, num_beams=kwargs.get("num_beams"))
        handles = [
            module.register_forward_pre_hook(partial(_with_adapter_names, adapter_names=names), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, HRALayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: list[str], *, num_beams: int | None) -> None:
        if self.training:
            raise ValueError("adapter_names: not in training mode; call `model.eval()` first")
        if num_beams is not None and num_beams > 1:
            raise ValueError("adapter_names: not with beam search, which mixes rows")
        known = {BASE}.union(*(layer.hra_u for layer in self.modules() if isinstance(layer, HRALayer)))
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names: no layer has {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def get_hra_model(model: nn.Module, config: HRAConfig, *, adapter_name: str = "default") -> PeftModel:
    """Put live, trainable HRA layers into a model, which is changed in place and frozen otherwise.

    At an even rank the adapted model starts as the base itself. At an odd rank it starts at the base but for one
    explicit reflection a target, which a warning says.

    Args:
        model: transformers, diffusers, or any module tree.
        config: PEFT's. `apply_GS` takes `init_weights=False`.
        adapter_name: as in PEFT.

    Returns:
        PEFT's wrapper for `config.task_type`; it saves, loads and switches adapters as ever.

    Raises:
        MismatchError: no target matches, or the rank exceeds a target's input features; the model is as it was.
        UnsupportedModelError: a target is of a kind that HRA defines no chain for; the model is as it was.
        ValueError: `apply_GS` with paired vectors.
    """
    if config.apply_GS and config.init_weights:
        raise ValueError(
            "apply_GS: set init_weights=False with it. Paired vectors are equal, so that Gram-Schmidt would subtract "
            "each from itself and normalize the rounding noise that is left, different on every device"
        )
    if config.init_weights and config.r % 2:
        logger.warning(
            "rank %d is odd: an odd number of reflections is never the identity. Training starts from the base with "
            "one random direction of each target's input reflected; an even rank starts from the base itself",
            config.r,
        )
    with _reflection_tuner():
        return get_peft_model(model, config, adapter_name=adapter_name)


def load_hra_model(
    model: nn.Module, directory: Path, *, is_trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """Load a saved adapter into a model, as `PeftModel.from_pretrained` does, with fast layers.

    Args:
        model: the base; changed in place.
        directory: a PEFT directory.
        is_trainable: whether training will go on.
        adapter_name: as in PEFT.
    """
    with _reflection_tuner():
        return PeftModel.from_pretrained(model, directory, adapter_name=adapter_name, is_trainable=is_trainable)


def accelerate_peft(model: Any) -> Any:
    """Swap the HRA layers of a PEFT model for fast ones, in place; parameters, hooks and state dict stay as they are.

    Args:
        model: a `PeftModel`, an `HRAModel`, or a module tree with PEFT's HRA layers in it (diffusers' `add_adapter`).

    Returns:
        The same object.

    Raises:
        ValueError: adapters are merged, or there is no HRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, HRALayer)]
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no HRA layer to accelerate")
    if any(layer.merged for layer in layers):
        raise ValueError("adapters are merged; call `unmerge_adapter` first")
    tuners = [module for module in model.modules() if type(module) is HRAModel]
    workspace = Workspace()
    for layer in layers:
        if type(layer) in FAST:
            layer.__class__ = FAST[type(layer)]
            layer.workspace = workspace
            workspace.add([layer])
    for tuner in tuners:
        tuner.__class__ = ReflectionModel
        tuner.workspace = workspace
    for root in [tuner.model for tuner in tuners] or [model]:
        workspace.watch(root)
    return model


FAST: dict[type[HRALayer], type[ReflectionLayer]] = {HRALinear: ReflectionLinear, HRAConv2d: ReflectionConv2d}


@contextmanager
def _reflection_tuner() -> Iterator[None]:
    """Let PEFT build our tuner for `peft_type` HRA, inside the block."""
    stock = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HRA]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HRA] = ReflectionModel
    try:
        yield
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HRA] = stock


def _take_out(model: nn.Module, adapter_name: str, before: set[int]) -> None:
    """Remove an adapter whose injection was refused half-way: whole layers where they are new."""
    for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, HRALayer)]:
        if id(layer) in before:
            layer.delete_adapter(adapter_name)
        else:
            model.set_submodule(path, layer.base_layer)


def _with_adapter_names(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], adapter_names: list[str]
) -> tuple[tuple[object, ...], dict[str, object]]:
    return args, {**kwargs, "adapter_names": adapter_names}
