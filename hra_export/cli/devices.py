"""`--device`: from a word to a torch device."""

import torch

from hra_export.errors import DeviceError


def resolve_device(word: str) -> torch.device:
    """`auto` is the CPU: a merge is memory traffic, which a trip to the GPU and back only adds to.

    Args:
        word: as `options.DeviceWord` lets it through.

    Raises:
        DeviceError: the device is not there.
    """
    if word == "auto":
        return torch.device("cpu")
    kind, _, number = word.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"`{word}` is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
            hint="`hra-export doctor` shows what is missing; `--device cpu` always works",
        )
    return torch.device(word)
