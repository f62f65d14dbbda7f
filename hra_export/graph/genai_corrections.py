"""Where the builder of ONNX Runtime GenAI computes something else than transformers, and what is right.

- ε of LayerNorm: the builder reads `rms_norm_eps` and takes 1e-6 when there is none. Phi, Nemotron and others have
  another field, with 1e-5 in it, which the first layers notice.
- sliding windows: the builder believes `layer_types`. Mistral and Phi-3 have none, and slide in every layer; without
  the window they differ from the first token that is farther back. A node's window of w counts the token itself, as
  transformers' does.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hra_export.errors import CheckpointError

# Names of LayerNorm's ε in a configuration; a model without any has torch's default.
EPSILON_FIELDS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
TORCH_EPSILON = 1e-5
LAYER_NORMS = frozenset({"LayerNormalization", "SkipLayerNormalization"})
ATTENTION = re.compile(r"/model/layers\.(\d+)/attn/GroupQueryAttention")
SLIDING = "sliding_attention"


def resolved_config(directory: Path) -> dict[str, Any]:
    """The configuration of a model directory with transformers' own defaults filled in.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read the configuration of `{directory}`: {error}") from error
    resolved: dict[str, Any] = config.to_dict()
    return resolved


def correct_(model: ir.Model, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Make a graph of the builder compute what transformers computes, in place.

    Args:
        model: as the builder made it.
        config: from `resolved_config`.

    Returns:
        What was changed, one sentence each.
    """
    return (*_correct_epsilons_(model, config), *_correct_windows_(model, config))


def _correct_epsilons_(model: ir.Model, config: Mapping[str, Any]) -> tuple[str, ...]:
    if "rms_norm_eps" in config:
        return ()
    epsilon = next((float(config[name]) for name in EPSILON_FIELDS if name in config), TORCH_EPSILON)
    wrong = [node for node in model.graph if node.op_type in LAYER_NORMS and _differs(node, epsilon)]
    for node in wrong:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
    return (f"{len(wrong)} LayerNorms have the model's epsilon, {epsilon:g}, and not the builder's",) if wrong else ()


def _differs(node: ir.Node, epsilon: float) -> bool:
    own = node.attributes.get("epsilon")
    return own is None or abs(own.as_float() - epsilon) > epsilon / 100


def _correct_windows_(model: ir.Model, config: Mapping[str, Any]) -> tuple[str, ...]:
    window = config.get("sliding_window")
    if not isinstance(window, int) or not config.get("use_sliding_window", True):
        return ()
    kinds = config.get("layer_types")
    changed = 0
    for node in model.graph:
        layer = ATTENTION.fullmatch(node.name or "")
        if layer is None or (kinds is not None and kinds[int(layer[1])] != SLIDING):
            continue
        own = node.attributes.get("local_window_size")
        if own is None or own.as_int() != window:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
            changed += 1
    return (f"{changed} attentions look back {window} tokens, as the model's do, and not farther",) if changed else ()
