"""`--device`: from a word to a torch device."""

import torch

from hra_export.errors import DeviceError


def resolve_device(word: str) -> torch.device:
    """`auto` is the CPU: a merge is memory traffic, which a trip to the GPU and back only adds to.

    Raises:
        DeviceError: torch does not know the device, or it is not there.
    """
    if word == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise DeviceError(f"`{word}` is not a device", hint="use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"`{word}` is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
            hint="`hra-export doctor` shows what is missing; `--device cpu` always works",
        )
    return device
