"""A PEFT adapter directory of any method: its two files, and the fields that all of their configurations have."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hra_export.errors import AdapterError, FormatError, OutputError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
# PEFT's words for the biases that HRA trains beside the chains, from the narrowest to the widest.
BIASES = ("none", "hra_only", "all")


@dataclass(frozen=True)
class SharedFields:
    """The fields of `adapter_config.json` that adapters of every method have; as the attributes of `HraAdapter`.

    Attributes:
        bias: in the method's own words.
    """

    bias: str
    modules_to_save: tuple[str, ...]
    base: str | None
    task: str | None
    model_class: str | None
    model_library: str | None

    @classmethod
    def parse(cls, config: Mapping[str, object], biases: Collection[str] = BIASES) -> tuple["SharedFields", list[str]]:
        """The fields, and a finding for each that is malformed.

        Args:
            config: the parsed file.
            biases: the method's words for which biases were trained.
        """
        saved, bias, mapping = config.get("modules_to_save"), config.get("bias", "none"), config.get("auto_mapping")
        findings = []
        if not (isinstance(bias, str) and bias in biases):
            *others, last = biases
            findings.append(f"bias: expected {', '.join(others)} or {last}, got {bias!r}")
        if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
            findings.append(f"modules_to_save: expected a list of names or null, got {saved!r}")
        mapping = mapping if isinstance(mapping, dict) else {}
        fields = cls(
            bias=str(bias),
            modules_to_save=tuple(saved) if isinstance(saved, list) else (),
            base=_text(config.get("base_model_name_or_path")),
            task=_text(config.get("task_type")),
            model_class=_text(mapping.get("base_model_class")),
            model_library=_text(mapping.get("parent_library")),
        )
        return fields, findings


@contextmanager
def reading_adapter(directory: Path) -> Iterator[None]:
    """Errors of a directory's files as errors of the adapter.

    Raises:
        AdapterError: in place of a FormatError in the block.
        OutputError: the file system said no in the block.
    """
    try:
        yield
    except FormatError as error:
        raise AdapterError(error.message, findings=error.findings, hint=error.hint) from error
    except OSError as error:
        raise OutputError(f"cannot read adapter `{directory}`: {error}") from error


def files_digest(config_bytes: bytes, weights: Path) -> str:
    """SHA-256 over configuration and weights, hex."""
    with weights.open("rb") as stream:
        return hashlib.sha256(config_bytes + hashlib.file_digest(stream, "sha256").digest()).hexdigest()


def read_config_bytes(directory: Path) -> bytes:
    """The configuration of an adapter directory of any method.

    Raises:
        AdapterError: there is none, or it is too large to be one.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(
            f"`{directory}` is not an adapter directory: it has no {CONFIG_NAME}",
            hint="pass the directory that PEFT's `save_pretrained` wrote",
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"`{path}` has {path.stat().st_size} bytes; an adapter config has at most {MAX_CONFIG_BYTES}"
        )
    return path.read_bytes()


def weights_path(directory: Path) -> Path:
    """The weights of an adapter directory of any method.

    Raises:
        AdapterError: there are none, or only a pickle.
    """
    path = directory / WEIGHTS_NAME
    if not path.exists() and (directory / PICKLE_NAME).exists():
        raise AdapterError(
            f"`{directory / PICKLE_NAME}` is a pickle, which can run code when it is read",
            hint="load it once where you trust it, and save it again with `safe_serialization=True`",
        )
    if not path.exists():
        raise AdapterError(f"`{directory}` has no {WEIGHTS_NAME}")
    return path


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file beside its name, flush it to the disk, and rename it."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
