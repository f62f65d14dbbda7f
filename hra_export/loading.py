"""A checkpoint as a model in memory, loaded by its own library from local files only."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hra_export.checkpoint import Checkpoint
from hra_export.errors import CheckpointError
from hra_export.layout import load_class


def load_model(
    checkpoint: Checkpoint, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, set[str]]:
    """The model in evaluation mode.

    Args:
        checkpoint: the weights.
        config: says the class and its labels: a merged model's configuration, where the base is without a head.
        dtype: of the floating-point parameters.

    Returns:
        The model, and the parameters that the checkpoint lacks.

    Raises:
        CheckpointError: its library cannot load it.
        UnsupportedModelError: no class is known for it.
    """
    model_class = load_class(config)
    labels = {key: config[key] for key in ("id2label", "label2id") if key in config}
    options = {"torch_dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = model_class.from_pretrained(checkpoint.directory, **options, **labels)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{model_class.__name__} cannot load `{checkpoint.directory}`: {error}") from error
    return model.eval(), set(info["missing_keys"])
