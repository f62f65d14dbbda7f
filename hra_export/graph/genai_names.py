"""What the builder of ONNX Runtime GenAI calls a module, where that is neither its path nor easily guessed.

self_attn.dense, .out_proj           attn.o_proj
self_attention.query_key_value       attn.qkv_proj
mlp.dense_h_to_4h                    mlp.gate_up_proj
…experts.3.up_proj                   nothing: all experts are one operator
"""

import re
from collections.abc import Iterable, Mapping

from hra_export.errors import UnsupportedModelError

LAYER = re.compile(r".*?layers\.(?P<number>\d+)\.(?P<block>\w+)\.(?P<name>\w+)")
EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.")
ATTENTION = frozenset({"self_attn", "self_attention", "attention"})
ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj"})
NAMES = {
    ("attn", "dense"): "o_proj",
    ("attn", "out_proj"): "o_proj",
    ("attn", "query_key_value"): "qkv_proj",
    ("mlp", "dense_h_to_4h"): "gate_up_proj",
}
SHOWN = 5


def wants_separate_attention(targets: Iterable[str]) -> bool:
    """Whether some chain stands before one of q, k and v alone, so that the three cannot be one product."""
    return any(target.rpartition(".")[2] in ATTENTION_PARTS for target in targets)


def builder_names(targets: Iterable[str]) -> Mapping[str, str]:
    """Target → the module path that the builder's names tell, where the two differ in more than spelling.

    Raises:
        UnsupportedModelError: a target lies inside the operator that runs all experts.
    """
    targets = tuple(targets)
    if hidden := [target for target in targets if EXPERTS.search(target)]:
        raise UnsupportedModelError(
            f"{len(hidden)} targets are experts, which ONNX Runtime GenAI runs in one operator",
            findings=hidden[:SHOWN],
            hint="fold them: --mode merged",
        )
    found = {}
    for target in targets:
        inside = LAYER.fullmatch(target)
        if inside is None:
            continue
        block = "attn" if inside["block"] in ATTENTION else inside["block"]
        name = NAMES.get((block, inside["name"]))
        if name is not None:
            found[target] = f"model.layers.{inside['number']}.{block}.{name}"
    return found
