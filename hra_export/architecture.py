"""transformers' model classes, built without memory: which class, which axis carries the input features, what is tied.

Only classes that transformers itself ships are built; code that a checkpoint brings along is never executed.
"""

from collections.abc import Mapping
from typing import Any

from hra_export.errors import UnsupportedModelError

# Model types whose layers are transformers' Conv1D, weight stored (in, out). A test compares it with transformers.
CONV1D_MODEL_TYPES = frozenset(
    {"clvp", "clvp_decoder", "decision_transformer", "gpt-sw3", "gpt2", "imagegpt", "openai-gpt"}
)

# T5 divides the head's input by √d only while embeddings are tied (directly, or through `scale_decoder_outputs`, read
# from the same flag), so clearing the flag would change the forward pass. A test compares it with transformers.
SCALED_HEAD_MODEL_TYPES = frozenset({"longt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"})

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def class_names(config: Mapping[str, object], task: str | None, model_class: str | None) -> list[str]:
    """Name the classes an adapter may have been trained on, the likeliest first.

    Args:
        config: the parsed `config.json`.
        task: PEFT's `task_type`.
        model_class: PEFT's `auto_mapping["base_model_class"]`.
    """
    architectures = config.get("architectures")
    own = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    names = [model_class, _AUTO_CLASSES.get(task or ""), *own[:1], "AutoModel"]
    return list(dict.fromkeys(name for name in names if name))


def find_class(name: str) -> Any:
    """Look a model class, or an Auto class of the table above, up in transformers.

    Raises:
        UnsupportedModelError: transformers has none of this name.
    """
    import transformers

    cls = getattr(transformers, name, None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model and name not in _AUTO_CLASSES.values():
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no model class `{name}`")
    return cls


def load_class(config: Mapping[str, object]) -> Any:
    """Find the class whose `from_pretrained` reads a checkpoint: transformers' by `architectures`, or diffusers'.

    Raises:
        UnsupportedModelError: neither library has a class for it.
    """
    import transformers

    own = config.get("_class_name")
    if isinstance(own, str):
        try:
            import diffusers
        except ImportError as error:
            raise UnsupportedModelError(f"`{own}` is a class of diffusers, which is not installed") from error
        cls = getattr(diffusers, own, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
            return cls
        raise UnsupportedModelError(f"diffusers {diffusers.__version__} has no model class `{own}`")
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no `{config.get('model_type')}` model"
        )
    return find_class(class_names(config, None, None)[0])


def build_on_meta(cls: Any, config: Mapping[str, object]) -> Any:
    """Make a model without memory for its weights.

    Args:
        cls: from `find_class`, or the type of a model built earlier.
        config: the parsed `config.json`. Not changed.

    Raises:
        UnsupportedModelError: the model type is not one of transformers'.
    """
    from copy import deepcopy

    import torch
    import transformers
    from transformers.initialization import no_init_weights

    kind = str(config.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no model type `{kind}`")
    # Without `auto_map` no custom code is looked for; without a dtype, torch's default is left alone.
    dropped = {"auto_map", "quantization_config", "dtype", "torch_dtype"}
    values = deepcopy({key: value for key, value in config.items() if key not in dropped})
    settings = transformers.CONFIG_MAPPING[kind].from_dict(values)
    with torch.device("meta"), no_init_weights():
        is_model = issubclass(cls, transformers.PreTrainedModel)
        return cls._from_config(settings) if is_model else cls.from_config(settings)


def may_have_conv1d(config: Mapping[str, object]) -> bool:
    """Whether any part of a model could store weights (in, out); read from the config alone."""
    pending = [config]  # a loop: the config may be nested deeper than calls can be
    while pending:
        part = pending.pop()
        kind = part.get("model_type")
        if isinstance(kind, str) and kind in CONV1D_MODEL_TYPES:
            return True
        pending.extend(value for value in part.values() if isinstance(value, Mapping))
    return False


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' Conv1D, which stores its weight (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_embedding(module: object) -> bool:
    """Whether a module looks rows up: torch's Embedding, or a class of a model's own that is one."""
    return any(kind.__name__ == "Embedding" for kind in type(module).__mro__)


def ties(model: Any) -> dict[str, str]:
    """The tied parameters of a model → the parameter each shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tied_group(name: str, tied: Mapping[str, str]) -> list[str]:
    """List a parameter, the source of its tie, and all others tied to that; itself alone when there is no tie."""
    source = tied.get(name, name)
    return list(dict.fromkeys([name, source, *(other for other, shared in tied.items() if shared == source)]))


def input_axis(model: Any, name: str, shape: tuple[int, ...]) -> int | None:
    """Find the axis of a parameter that carries its input features, the first of them for a convolution.

    Returns:
        None for a vector, and where nothing tells the axes apart.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    kind = type(owner).__name__
    if len(shape) < 2 or "ConvTranspose" in kind:
        return None
    if len(shape) == 2:
        return 0 if is_conv1d(owner) else 1 if leaf.endswith("weight") else None
    if kind.startswith("Conv"):
        return 1
    return _experts_input_axis(owner, leaf, shape) if len(shape) == 3 else None


def _experts_input_axis(experts: Any, leaf: str, shape: tuple[int, ...]) -> int | None:
    """1 for (experts, in, out), 2 for (experts, out, in), None when nothing tells them apart."""
    flag = getattr(experts, "is_transposed", None)  # set by transformers' `use_experts_implementation`
    if isinstance(flag, bool):
        return 1 if flag else 2
    sizes = (getattr(experts, "output_size", None), getattr(experts, "input_size", None))
    if shape[1:] == sizes:
        return 2
    up: tuple[int, ...] = tuple(getattr(getattr(experts, "gate_up_proj", None), "shape", ()))
    down: tuple[int, ...] = tuple(getattr(getattr(experts, "down_proj", None), "shape", ()))
    if leaf in ("gate_up_proj", "down_proj") and len(up) == len(down) == 3:
        # Gate and up together have twice as many outputs as down has inputs.
        straight, transposed = up[1] == 2 * down[2], up[2] == 2 * down[1]
        return None if straight == transposed else 2 if straight else 1
    return None
