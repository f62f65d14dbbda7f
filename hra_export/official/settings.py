"""What the training code knew and its files may not say: whether Gram-Schmidt was on, and ε.

Both change the weights. They are read from a configuration where one lies beside the tensors, taken from the caller
otherwise, and never guessed where it matters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_export.errors import ConversionError
from hra_export.householder import unit_columns
from hra_export.official.layouts import ForeignLayout
from hra_export.official.state_file import MODEL_CONFIG_NAME, StateFile
from hra_export.peft_directory import CONFIG_NAME

# Columns whose cosines are below this are orthogonal to the rounding of float32: Gram-Schmidt leaves them as they are.
ORTHOGONAL = 1e-6


@dataclass(frozen=True)
class Settings:
    """What the training code knew and a bare state dict does not say; None where the caller does not say it either.

    Attributes:
        orthogonalize: Gram-Schmidt was on (`apply_GS`).
        epsilon: ε in √(‖u‖² + ε).
    """

    orthogonalize: bool | None = None
    epsilon: float | None = None


UNSAID = Settings()


def gram_schmidt_of(
    layout: ForeignLayout, state: StateFile, chains: Mapping[str, Tensor], settings: Settings
) -> tuple[bool, list[str]]:
    """Whether Gram-Schmidt was on, and what to say of it: from the configuration, the caller, or since it is no matter.

    Raises:
        ConversionError: nobody says it and it matters, or the file and the caller say different things.
    """
    if not layout.has_gram_schmidt:
        if settings.orthogonalize:
            raise ConversionError(f"the layout `{layout.name}` has no Gram-Schmidt variant")
        return False, []
    written = _written_gram_schmidt(state)
    if written is not None and settings.orthogonalize not in (None, written):
        raise ConversionError(
            f"`{state.path}`: its configuration says that Gram-Schmidt was {'on' if written else 'off'}"
        )
    told = settings.orthogonalize if written is None else written
    if told is not None:
        return told, ["its vectors are orthogonalized first (Gram-Schmidt)"] if told else []
    if layout.name == "llama":
        return False, ["taken to be without Gram-Schmidt, which that code has in a file of its own, not in use"]
    if all(_are_orthogonal(vectors) for vectors in chains.values()):
        return False, []
    raise ConversionError(
        f"`{state.path}` does not say whether Gram-Schmidt was on (`apply_GS`), which makes another rotation",
        hint="`--no-gram-schmidt` is that code's default, `--gram-schmidt` the other; its own "
        f"`{MODEL_CONFIG_NAME}` beside the file says it too",
    )


def epsilon_of(state: StateFile, settings: Settings) -> tuple[float, list[str]]:
    """ε, and what to say of it: from the configuration or the caller.

    Raises:
        ConversionError: nobody says it, the file and the caller say different things, or the file says nonsense.
        ValueError: the caller says nonsense.
    """
    if settings.epsilon is not None and not 0 <= settings.epsilon < math.inf:
        raise ValueError(f"epsilon: expected a finite number of at least 0, got {settings.epsilon}")
    written = state.configs.get(CONFIG_NAME, {}).get("eps")
    if written is not None:
        if isinstance(written, bool) or not isinstance(written, int | float) or not 0 <= written < math.inf:
            raise ConversionError(f"`{state.path}`: its configuration says eps = {written!r}, expected a number")
        if settings.epsilon not in (None, written):
            raise ConversionError(f"`{state.path}`: its configuration says eps = {written}, not {settings.epsilon}")
        return float(written), [f"softened by eps = {written:g}, as its configuration says"]
    if settings.epsilon is None:
        raise ConversionError(
            f"`{state.path}` does not say by which ε its reflections are softened, which changes the weights",
            hint="pass `--epsilon`: what the training command had as `--eps`",
        )
    return settings.epsilon, [f"softened by eps = {settings.epsilon:g}, as asked for"]


def _written_gram_schmidt(state: StateFile) -> bool | None:
    config, model = state.configs.get(CONFIG_NAME, {}), state.configs.get(MODEL_CONFIG_NAME, {})
    current, older = model.get("hra"), model.get("householder")
    if isinstance(config.get("apply_GS"), bool):
        return config["apply_GS"] is True
    if isinstance(current, Mapping) and isinstance(current.get("apply_GS"), bool):
        return current["apply_GS"] is True
    return older.get("add_orth") == "gramschmidt" if isinstance(older, Mapping) and "add_orth" in older else None


def _are_orthogonal(vectors: Tensor) -> bool:
    units = unit_columns(vectors)
    gram = units.T @ units - torch.eye(units.shape[1], dtype=units.dtype)
    return float(gram.abs().max()) < ORTHOGONAL
