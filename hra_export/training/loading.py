"""The base model, its tokenizer, and the adapter that is to be trained in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import HRAConfig, PeftModel
from peft.tuners.hra.layer import HRALayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hra_export.checkpoint import Checkpoint
from hra_export.errors import CheckpointError, DeviceError, MismatchError, UnsupportedModelError
from hra_export.training.options import is_pattern
from hra_export.training.settings import ALL_LINEAR, Settings
from hra_export.training.tuner import get_hra_model

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
HEADS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}
# PEFT saves these of a classifier whether it is told to or not.
PEFT_SAVES = ("classifier", "score")


@dataclass(frozen=True)
class AdaptedBase:
    """A base with live, trainable chains.

    Attributes:
        model: PEFT's wrapper.
        targets: module paths that carry a chain.
        trainable: number of parameters that are trained.
        saved_modules: modules that are trained whole.
        autocast: the half precision to compute in, or None to compute as the tensors are.
        notes: what was decided and should be said.
    """

    model: PeftModel
    targets: tuple[str, ...]
    trainable: int
    saved_modules: tuple[str, ...]
    autocast: Literal["bfloat16", "float16"] | None
    notes: tuple[str, ...]


def load_tokenizer(directory: Path, settings: Settings) -> Any:
    """The base's tokenizer, with padding on the right and a token to pad with.

    Raises:
        CheckpointError: there is none, or it has no token that could pad or end a row.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"base `{settings.base}` has no tokenizer that transformers can load: {error}",
            hint="put its tokenizer files into the base directory",
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"the tokenizer of base `{settings.base}` has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def adapt_base(
    checkpoint: Checkpoint, settings: Settings, *, classes: tuple[str, ...], has_weights: bool
) -> AdaptedBase:
    """Load the base and put the adapter in.

    Args:
        checkpoint: the base, opened.
        settings: resolved as far as the task goes.
        classes: of a classifier.
        has_weights: False builds the model on the meta device, for a plan.

    Raises:
        CheckpointError: transformers cannot load it.
        DeviceError: bitsandbytes is missing.
        MismatchError: no target, a rank above a target's input features, weights missing.
        UnsupportedModelError: no model for this task, or a target that has no chain.
    """
    if checkpoint.component or "_class_name" in checkpoint.config:
        raise UnsupportedModelError(f"base `{settings.base}` is a diffusers model; here, language models are trained")
    model, missing = _load(checkpoint.directory, settings, classes, has_weights=has_weights)
    new = _owners(missing)
    if new and settings.task == "causal-lm":
        raise MismatchError(
            f"base `{settings.base}` is no whole causal language model: {len(missing)} weights are missing",
            findings=sorted(missing)[:10],
            hint="`--task sequence-classification` takes a base without its head",
        )
    saved = list(dict.fromkeys([*settings.modules_to_save, *new]))
    config = _config(model, settings, saved)
    adapted = get_hra_model(model, config)
    if settings.task == "causal-lm" and isinstance(adapted.get_output_embeddings(), HRALayer):
        # TRL multiplies by the head's weight itself, so that a chain in front of the head would not be trained.
        raise UnsupportedModelError(
            "a chain on the head of a causal language model is not trained here",
            hint="exclude it with `--exclude-modules`",
        )
    config.base_model_name_or_path = base_reference(settings.base)
    others = _widen_(adapted)
    notes = [f"`{name}` is new and trained whole" for name in new]
    return AdaptedBase(
        model=adapted,
        targets=tuple(path for path, module in model.named_modules() if isinstance(module, HRALayer)),
        trainable=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        saved_modules=tuple(path for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)),
        autocast=_autocast(settings, _dtype_of(model), has_others=others),
        notes=tuple(notes),
    )


def base_reference(name: str) -> str:
    """What the adapter says its base is: a Hub id as it is, a path so that it holds from any directory."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _load(directory: Path, settings: Settings, classes: tuple[str, ...], *, has_weights: bool) -> tuple[Any, set[str]]:
    """The model, and the names of parameters that the base has no values for."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"base `{settings.base}` is an encoder-decoder, which is not trained here yet")
        if classes:
            config.num_labels = len(classes)
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: number for number, name in enumerate(classes)}
            config.problem_type = "single_label_classification"
        kind = getattr(transformers, HEADS[settings.task])
        if not has_weights:
            with torch.device("meta"):
                return kind.from_config(config, **options), set()
        model, info = kind.from_pretrained(
            directory,
            config=config,
            dtype=settings.dtype,
            output_loading_info=True,
            local_files_only=True,
            **options,
            **_quantization(settings),
        )
    except (ValueError, KeyError, OSError) as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"base `{settings.base}` is a {type(config).__name__}, which has no model for {settings.task}"
            ) from error
        raise CheckpointError(f"base `{settings.base}` cannot be loaded: {error}") from error
    if wrong := sorted(map(str, info.get("mismatched_keys", ()))):
        raise CheckpointError(f"base `{settings.base}`: {len(wrong)} weights have other shapes", findings=wrong[:10])
    return model, set(info["missing_keys"])


def _quantization(settings: Settings) -> dict[str, Any]:
    if settings.quantize == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise DeviceError(f"--quantize {settings.quantize} needs bitsandbytes", hint="pip install bitsandbytes")
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    if settings.quantize == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = HALF.get(settings.dtype, torch.float32 if settings.dtype == "float32" else torch.bfloat16)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def _owners(parameters: Iterable[str]) -> list[str]:
    """The modules that hold these parameters; one that PEFT saves anyway stands for all inside it."""
    owners = set()
    for name in parameters:
        parts = name.split(".")[:-1]
        top = next((part for part in parts if part in PEFT_SAVES), None)
        owners.add(top or ".".join(parts))
    return sorted(owners)


def _config(model: nn.Module, settings: Settings, saved: list[str]) -> HRAConfig:
    def words(given: tuple[str, ...]) -> list[str] | str | None:
        return given[0] if len(given) == 1 and (is_pattern(given[0]) or given[0] == ALL_LINEAR) else list(given) or None

    config = HRAConfig(
        r=settings.rank,
        apply_GS=settings.is_gram_schmidt,
        init_weights=settings.chosen_init == "paired",
        target_modules=words(settings.target_modules),
        exclude_modules=words(settings.exclude_modules),
        bias=settings.bias,
        modules_to_save=saved or None,
        task_type=PEFT_TASKS[settings.task],
    )
    if settings.target_modules != (ALL_LINEAR,):
        config.layers_to_transform = list(settings.layers_to_transform) or None
    elif settings.layers_to_transform:
        # PEFT takes no numbers together with its word for all layers, and ignores them beside whole paths.
        paths = _maybe_include_all_linear_layers(config, model).target_modules
        config.target_modules = {path for path in paths if _layer_number(path) in settings.layers_to_transform}
        if not config.target_modules:
            raise MismatchError(f"base `{settings.base}` has no linear layer in a layer of these numbers")
    return config


def _layer_number(path: str) -> int | None:
    """The first number in a module path: of the layer, not of an expert in it."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _widen_(model: nn.Module) -> bool:
    """Keep everything that is trained in float32; whether more than reflection vectors is trained."""
    others = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            others |= ".hra_u." not in name
            if parameter.dtype in HALF.values():
                parameter.data = parameter.data.float()
    return others


def _dtype_of(model: nn.Module) -> str:
    return str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")


def _autocast(settings: Settings, dtype: str, *, has_others: bool) -> Literal["bfloat16", "float16"] | None:
    """Chains take activations of any dtype; saved modules in float32 inside a half base only under autocast."""
    if settings.bf16 or (has_others and dtype == "bfloat16"):
        return "bfloat16"
    return "float16" if dtype == "float16" else None
