"""Which layout a file has, where the names of its tensors leave a choice.

Chains before and after a layer, and the two orders of lora-lite, look the same and stand for different weights. What
lies beside the tensors tells, or the base does, or the caller must.
"""

from collections.abc import Mapping

from hra_export.checkpoint import Checkpoint
from hra_export.errors import ConversionError
from hra_export.official.layouts import LAYOUTS, ForeignLayout, chain_vectors, recognize
from hra_export.official.state_file import StateFile
from hra_export.peft_directory import CONFIG_NAME
from hra_export.target_weights import find_targets


def check_layout(layout: str | None) -> None:
    """Refuse a name that is none.

    Raises:
        ValueError: neither None nor one of `layouts.LAYOUTS`.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def choose_layout(state: StateFile, layout: str | None, base: Checkpoint | None) -> tuple[ForeignLayout, str]:
    """The layout of a file, and what told it.

    Args:
        state: the file.
        layout: the caller's choice, which holds whatever the tensors say.
        base: the model that was adapted, if the caller has it.

    Raises:
        ConversionError: no layout of HRA, or several that nothing tells apart, with their names.
        AdapterError: malformed chains.
        MismatchError: the base lacks a layer that carries a chain.
    """
    if layout is not None:
        return LAYOUTS[layout], "as asked for"
    candidates = recognize(state.tensors)
    if len(candidates) == 1:
        return LAYOUTS[candidates[0]], "told by its tensors"
    told, reason = _by_configuration(state, candidates), "told by its configuration"
    may_ask_base = "peft-draft" in candidates
    if told is None and may_ask_base and base is not None:
        told, reason = _by_shapes(state, candidates, base), "told by the shapes of the base"
    if told is None:
        other_way = ", or pass the base: layers that are not square tell" if may_ask_base and base is None else ""
        raise ConversionError(
            f"`{state.path}` can be of {len(candidates)} layouts, which stand for different weights",
            findings=[f"`{name}`: {LAYOUTS[name].what}" for name in candidates],
            hint=f"choose with `--layout`{other_way}",
        )
    return LAYOUTS[told], reason


def _by_configuration(state: StateFile, candidates: tuple[str, ...]) -> str | None:
    """The layout that the settings beside the tensors tell.

    No draft of PEFT's was ever released, and releases write their version since 0.18. lora-lite turned its order round
    before it changed its configuration.
    """
    if "lora-lite" not in candidates:
        return "peft" if "peft" in candidates and state.configs.get(CONFIG_NAME, {}).get("peft_version") else None
    config = state.saved_with.get("cfg")
    if not isinstance(config, Mapping):
        return None
    if config.get("variant") != "hra":
        raise ConversionError(f"`{state.path}` is not HRA: its variant is {config.get('variant')!r}")
    return None if "variant_kwargs" in config else "lora-lite"


def _by_shapes(state: StateFile, candidates: tuple[str, ...], base: Checkpoint) -> str | None:
    """On which side the chains act, from layers that are not square; None when there is none, or they disagree."""
    chains = chain_vectors(LAYOUTS[candidates[0]], state.tensors)
    votes = {
        candidates[0] if chains[module].shape[0] == weight.shape[1] else "peft-draft"
        for module, weight in find_targets(base, chains).items()
        if weight.shape[0] != weight.shape[1] and chains[module].shape[0] in weight.shape
    }
    return votes.pop() if len(votes) == 1 else None
