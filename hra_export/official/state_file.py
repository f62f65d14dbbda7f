"""A state dict as other people's code saves it: safetensors, or a pickle read without running what is in it.

Pickles are read only when the caller says so, and then by torch's restricted loader, which takes tensors and plain
values and refuses everything else: a checkpoint of Lightning that holds its callbacks, and hostile ones.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hra_export.errors import ConversionError, FormatError, OutputError
from hra_export.peft_directory import CONFIG_NAME, MAX_CONFIG_BYTES, PICKLE_NAME, WEIGHTS_NAME
from hra_export.tensorfile import read_header, strict_json

# In a directory, the first of these that is there; otherwise its only file with one of the suffixes below.
KNOWN_NAMES = (WEIGHTS_NAME, PICKLE_NAME, "model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Where the settings of a run may lie, beside the weights.
MODEL_CONFIG_NAME = "model_config.json"  # of the authors' DeBERTa code
CONFIG_NAMES = (CONFIG_NAME, MODEL_CONFIG_NAME)
# Keys under which the tensors lie when something else is saved with them.
NESTED = ("state_dict", "state")
DISTRIBUTED_PREFIX = "module."


@dataclass(frozen=True)
class StateFile:
    """Tensors by name, and what was saved beside them.

    Attributes:
        path: the file.
        tensors: on the CPU, paged lazily where the format allows it.
        configs: the JSON files beside it, by name, parsed.
        saved_with: entries of the same file that are no tensors and that JSON can hold: `cfg`, say.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    configs: Mapping[str, Mapping[str, object]]
    saved_with: Mapping[str, object]


def read_state(source: Path, *, allow_pickle: bool = False) -> StateFile:
    """Read a state dict from a file, or from the one in a directory.

    Raises:
        ConversionError: none or several in the directory; a pickle without `allow_pickle`, or one that holds code.
        FormatError: damaged, or no state dict; all findings.
        OutputError: the file system does not let us read it.
    """
    try:
        path = _weights(source)
        configs = {name: _config(path.with_name(name)) for name in CONFIG_NAMES if path.with_name(name).is_file()}
        if path.suffix == ".safetensors":
            file = read_header(path)
            metadata = {key: _parsed(value) for key, value in file.metadata.items() if key != "format"}
            mapped = {name: file.map(name) for name in file.tensors}
            return StateFile(path, _without_prefix(mapped), configs, metadata)
        tensors, saved_with = _unpacked(path, _load(path, allow_pickle))
    except OSError as error:
        raise OutputError(f"cannot read `{source}`: {error}") from error
    return StateFile(path, tensors, configs, saved_with)


def _weights(source: Path) -> Path:
    if not source.is_dir():
        if source.is_file():  # a FIFO would be waited for without end
            return source
        raise ConversionError(f"`{source}` {'is no regular file' if source.exists() else 'does not exist'}")
    known = [source / name for name in KNOWN_NAMES if (source / name).is_file()]
    found = known[:1] or sorted(path for path in source.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConversionError(f"`{source}` holds no weights: expected a file ending in {', '.join(SUFFIXES)}")
    raise ConversionError(
        f"`{source}` holds {len(found)} weight files", findings=[path.name for path in found], hint="name one of them"
    )


def _config(path: Path) -> Mapping[str, object]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise FormatError(f"`{path}` has {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
    parsed = strict_json(path, path.read_bytes())
    if not isinstance(parsed, dict):
        raise FormatError(f"`{path}`: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _parsed(text: str) -> object:
    """A value of safetensors' metadata, all of which are text; some is JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _load(path: Path, allow_pickle: bool) -> object:
    if not allow_pickle:
        raise ConversionError(
            f"`{path}` is a pickle, which can run code when it is read",
            hint="`--allow-pickle` reads it with torch's restricted loader, which takes tensors and refuses code",
        )
    try:
        # What is no zip file is torch's older format, which cannot be mapped.
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle fails in every way there is
        raise ConversionError(
            f"`{path}` holds more than tensors, or is damaged: {_first_line(error)}",
            hint="where you trust it, save its tensors alone: "
            "`torch.save(torch.load(PATH, weights_only=False)['state_dict'], 'weights.pt')`",
        ) from error
    return loaded


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return told or type(error).__name__


def _unpacked(path: Path, loaded: object) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a loaded file, and what was saved with them."""
    if not isinstance(loaded, Mapping):
        raise FormatError(f"`{path}` holds no state dict but a {type(loaded).__name__}")
    inner = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping)), None)
    entries = loaded if inner is None else inner
    saved_with = {} if inner is None else {str(key): value for key, value in loaded.items() if value is not inner}
    problems = [
        f"{name!r}: expected a dense tensor, got {_kind(value)}"
        for name, value in entries.items()
        if not (isinstance(name, str) and isinstance(value, Tensor) and _is_dense(value))
    ]
    if problems:
        raise FormatError(f"`{path}`: {len(problems)} entries are no tensors", findings=problems)
    return _without_prefix({name: value.detach() for name, value in entries.items()}), saved_with


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model itself has them, where all were saved inside torch's wrapper for several devices."""
    if not all(name.startswith(DISTRIBUTED_PREFIX) for name in tensors):
        return tensors
    return {name.removeprefix(DISTRIBUTED_PREFIX): value for name, value in tensors.items()}


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"


def _kind(value: object) -> str:
    return f"a tensor that is {value.layout}" if isinstance(value, Tensor) else type(value).__name__
