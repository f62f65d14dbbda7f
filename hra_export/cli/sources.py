"""What ADAPTER and BASE may be: a directory, a Hub id, a .gguf file. The only place that may use the network.

A quantized base is dequantized once, into the user's cache, where the verb that asks for it can use that.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import platformdirs

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.cli.console import Console
from hra_export.errors import AdapterError, CheckpointError, OutputError
from hra_export.registry import load_converter

if TYPE_CHECKING:
    from hra_export.graph.kept_bits import Matrix
    from hra_export.lora.file import LoraAdapter

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADAPTER_PATTERNS = ["adapter_config.json", "adapter_model.safetensors", "token*", "*.jinja", "vocab*", "merges.txt"]
# Everything a model directory may need except weights in other formats.
BASE_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "README.md"]

FROM_GGUF, FROM_BITSANDBYTES = "from_gguf", "from_bitsandbytes"


class Based(Protocol):
    """What may name the base it is for: an adapter of any kind."""

    @property
    def base(self) -> str | None:
        """`base_model_name_or_path`."""
        ...


def resolve_adapter(name: str) -> HraAdapter:
    """Read an adapter from a directory or the Hub.

    Raises:
        AdapterError: there is none.
    """
    return read_adapter(_adapter_directory(name))


def resolve_lora(name: str) -> "LoraAdapter":
    """Read a LoRA adapter from a directory or the Hub.

    Raises:
        AdapterError: there is none.
    """
    from hra_export.lora.file import read_lora

    return read_lora(_adapter_directory(name))


def resolve_model(name: str) -> Path:
    """The directory of a whole model: as it is, or from the Hub.

    Raises:
        CheckpointError: it does not exist.
    """
    return _locate(name, [])


def resolve_base(name: str | None, adapters: Sequence[Based], console: Console, *, dequantize: bool = False) -> Path:
    """The directory of a base: as it is, from the Hub, or dequantized from a GGUF file into the user's cache.

    Args:
        name: as the user gave it; None for the one that an adapter names.
        adapters: in the order they compose.
        console: told what is dequantized.
        dequantize: also what bitsandbytes quantized, for graphs; without, such a directory is given as it is.

    Raises:
        CheckpointError: no base was named or it does not exist.
    """
    path = _locate(name, adapters)
    if path.is_file():
        return _dequantize(path, FROM_GGUF, console) if path.suffix == ".gguf" else path
    return _dequantize(path, FROM_BITSANDBYTES, console) if dequantize and _is_bitsandbytes(path) else path


def quantized_base(name: str | None, adapters: Sequence[Based]) -> Path | None:
    """A base that is quantized, `.gguf`, a graph or of bitsandbytes, and whose bits can be kept; None for any other.

    Raises:
        CheckpointError: no base was named or it does not exist.
    """
    path = _locate(name, adapters)
    is_quantized = path.suffix in (".gguf", ".onnx") if path.is_file() else _is_bitsandbytes(path)
    return path if is_quantized else None


def quantized_matrices(path: Path) -> dict[str, "Matrix"]:
    """What the weights of a quantized base are made of, by parameter name; empty for a graph, which has its bits.

    Raises:
        CheckpointError, FormatError, UnsupportedModelError: as its converter.
    """
    if path.suffix == ".onnx" and path.is_file():
        return {}
    return dict(load_converter(FROM_GGUF if path.is_file() else FROM_BITSANDBYTES).quantized_matrices(path))


def _locate(name: str | None, adapters: Sequence[Based]) -> Path:
    """The file or directory of a base on this machine, fetched if need be."""
    chosen = name or next((adapter.base for adapter in adapters if adapter.base), None)
    if chosen is None:
        raise CheckpointError("the adapter names no base", hint="pass it with `--base`")
    path = _existing(chosen)
    if path is not None:
        return path
    if not HUB_ID.fullmatch(chosen):
        raise CheckpointError(
            f"base `{chosen}` does not exist", hint="pass another with `--base`" if not name else None
        )
    return _download(chosen, BASE_PATTERNS, what="base")


def _adapter_directory(name: str) -> Path:
    path = _existing(name)
    if path is not None:
        return path
    if not HUB_ID.fullmatch(name):
        raise AdapterError(f"adapter `{name}` does not exist")
    return _download(name, ADAPTER_PATTERNS, what="adapter")


def _existing(name: str) -> Path | None:
    """What a name leads to on this machine, if anything: `~nobody/x` and names too long for any file system do not."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None


def _is_bitsandbytes(path: Path) -> bool:
    return bool(load_converter(FROM_BITSANDBYTES).recognizes(path))


def _dequantize(path: Path, converter_name: str, console: Console) -> Path:
    converter = load_converter(converter_name)
    folder = converter_name.removeprefix("from_")
    target = Path(platformdirs.user_cache_dir("hra-export")) / folder / converter.cache_name(path)
    if not target.exists():
        console.say(f"dequantizing `{path.name}` to float32, once, into `{target}`")
        target.parent.mkdir(parents=True, exist_ok=True)
        converter.convert(path, target)
    console.say(f"base: `{path.name}`, dequantized: results refer to its dequantized weights")
    return target


def _download(repository: str, patterns: list[str], *, what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        kind = AdapterError if what == "adapter" else CheckpointError
        raise kind(f"{what} `{repository}` is neither a directory nor a repository of the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise OutputError(f"cannot fetch {what} `{repository}` from the Hub{offline}: {error}") from error
