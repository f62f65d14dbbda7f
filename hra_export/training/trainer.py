"""What training HRA adds to transformers' `Trainer`, whichever kind of `Trainer` it is.

- the orthogonality penalty, once an optimizer step, whatever the number of batches in it;
- no weight decay on reflection vectors, which have no length;
- a loss that is not finite ends the run;
- the angle of a step, and the penalty, beside the loss;
- checkpoints that hold the adapter, whole, also when its tensors are sharded over processes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hra_export.errors import NumericalError, UnsupportedModelError
from hra_export.training.angles import mean_angle_degrees, vectors_of
from hra_export.training.regularizer import orthogonality_penalty
from hra_export.training.settings import Settings

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # importing transformers is slow; the kind of `Trainer` comes with it

# What wrappers put into the names of parameters.
WRAPPINGS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")


def hra_trainer(kind: type[Any], settings: Settings) -> type[Any]:
    """A subclass of `kind` that trains HRA.

    Args:
        kind: transformers' `Trainer`, or a subclass of it such as TRL's `SFTTrainer`.
        settings: of the run.
    """

    class HraTrainer(HraTraining, kind):
        hra_settings = settings

    return HraTrainer


class HraTraining(Trainer):
    """In front of a kind of `Trainer`; see the module. `hra_trainer` gives it the settings."""

    hra_settings: Settings

    def __init__(self, **arguments: Any) -> None:
        self._before: dict[str, Tensor] = {}
        self._angle: float | None = None
        self._penalties: list[float] = []
        trained = {name: p.data for name, p in arguments["model"].named_parameters() if p.requires_grad}
        super().__init__(**arguments)
        for name, parameter in self.model.named_parameters():
            if name in trained:  # SFTTrainer rounds them to bfloat16 on a quantized base
                parameter.data = trained[name].to(parameter.device)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise UnsupportedModelError("FSDP 1 is not supported", hint="`accelerate launch --fsdp_version 2`")
        if self._penalty_weight and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UnsupportedModelError(
                "the orthogonality penalty needs whole reflection vectors, and FSDP and DeepSpeed shard them",
                hint="train with `--regularization 0`, or with plain data parallelism",
            )

    @property
    def _penalty_weight(self) -> float:
        return 0.0 if self.hra_settings.is_gram_schmidt else self.hra_settings.regularization

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not any(parameter.is_meta for parameter in model.parameters()):  # a plan has no weights
            super()._move_model_to_device(model, device)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """The adapter gets a card of ours when it is published."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """All but reflection vectors."""
        return [name for name in super().get_decay_parameter_names(model) if ".hra_u." not in name]

    def create_optimizer(self, model: Any = None) -> Any:
        """One whose groups all have parameters."""
        optimizer = super().create_optimizer(model)
        # A group without parameters comes back from a sharded checkpoint without its settings.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """With the orthogonality penalty, if there is one."""
        result = super().compute_loss(model, inputs, *arguments, **options)
        # Once a step, with the last batch: the only one for which gradients are exchanged between processes.
        if not (self._penalty_weight and model.training and self.accelerator.sync_gradients):
            return result
        form = self.hra_settings.regularization_form
        penalty = self._penalty_weight * orthogonality_penalty(self.model, form=form)
        self._penalties.append(penalty.item())
        if not self._is_scaled(options.get("num_items_in_batch")):
            penalty = penalty * self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if isinstance(result, tuple) else result + penalty

    def _is_scaled(self, items: Any) -> bool:
        """Whether `training_step` takes the loss as it is, and does not divide it by the number of batches."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        """Forward and backward of one batch; refuses a loss that is not finite."""
        loss = super().training_step(*arguments, **options)
        if not torch.isfinite(loss):
            raise NumericalError(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def remember_vectors(self) -> None:
        """Before an optimizer step that will be logged."""
        self._before = vectors_of(self.model)

    def measure_angle(self) -> None:
        """After it."""
        if self._before:
            self._angle = mean_angle_degrees(self._before, vectors_of(self.model))
            self._before = {}

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """With the angle, and the penalty apart from the loss."""
        if "loss" in logs:
            if self._angle is not None:
                logs["angle"] = self._angle
            if self._penalties:
                logs["penalty"] = sum(self._penalties) / len(self._penalties)
                logs["loss"] -= logs["penalty"]
            self._angle, self._penalties = None, []
        super().log(logs, *arguments, **options)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """The adapter in PEFT's layout and the tokenizer; no pickle, and no look-up of the base on the Hub."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        self.processing_class.save_pretrained(folder)

    def save_model(self, output_dir: str | None = None, *arguments: Any, **options: Any) -> None:
        """The adapter, whole."""
        if self.is_fsdp_enabled:  # whatever the type of its own checkpoints
            self._save(output_dir, whole_tensors(self.model))
        else:
            super().save_model(output_dir, *arguments, **options)


def whole_tensors(model: Any) -> dict[str, Tensor]:
    """What is trained of a model that FSDP shards, and its buffers, whole, on the CPU; every process must call this."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = {}
    for name, tensor in [*trained, *model.named_buffers()]:
        value = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        # A clone, for what a gathering returns may still be on its way, and have no storage.
        whole[WRAPPINGS.sub("", name)] = value.detach().clone().cpu()
    return whole
