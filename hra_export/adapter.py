"""HRA adapters in PEFT's layout: a directory with `adapter_config.json` and `adapter_model.safetensors`.

What is adapted is read from the tensor names. The config's `target_modules` may hold a regular expression, which is
never run: a hostile one takes hours on a short name. Pickled adapters (`adapter_model.bin`) are refused.

Limits: PEFT keeps each named adapter but `default` in a folder of its own; pass that folder.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hra_export import names, tensorfile
from hra_export.errors import AdapterError, NumericalError
from hra_export.householder import BlockReflector, compact_wy
from hra_export.peft_directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    SharedFields,
    files_digest,
    read_config_bytes,
    reading_adapter,
    weights_path,
    write_whole,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HraAdapter:
    """One adapter: a chain per target module, and the parameters that were trained beside them.

    Attributes:
        chains: module path → U (d, r) as stored, columns not normalized, float32 or half.
        parameters: parameter name → its trained value: biases, saved modules. Paged lazily when read from a file.
        rank: r, the same for every chain.
        orthogonalize: the Gram-Schmidt variant (PEFT's `apply_GS`).
        bias: PEFT's `none`, `hra_only` or `all`.
        base: `base_model_name_or_path`, if the config has one.
        task: PEFT's `task_type`, if any.
        model_class: the class that was adapted, from PEFT's `auto_mapping`, if any.
        model_library: the module that has this class, from the same place; kept for PEFT, never imported.
        path: the directory it came from, if any.
        digest: SHA-256 over config and weights, hex; empty when it was not read from a file.
        origin: what it was made of, when it is not an adapter of its own.
    """

    chains: Mapping[str, Tensor]
    rank: int
    orthogonalize: bool = False
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None
    task: str | None = None
    model_class: str | None = None
    model_library: str | None = None
    path: Path | None = None
    digest: str = ""
    origin: "Origin | None" = None

    @property
    def label(self) -> str:
        """How messages call this adapter."""
        if self.path is None and self.origin is not None:
            return ", ".join(adapter.label for adapter in self.origin.adapters)
        return str(self.path) if self.path is not None else "(in memory)"

    @cached_property
    def identity(self) -> str:
        """What tells it from any other adapter, hex: the digest, or SHA-256 over what it holds where it has none."""
        settings = [self.orthogonalize, self.bias, self.modules_to_save, self.task, self.base]
        return self.digest or digest_of({**self.chains, **self.parameters}, settings)

    @property
    def sources(self) -> tuple["HraAdapter", ...]:
        """The adapters it was made of, in order; itself when it was not."""
        return (self,) if self.origin is None else self.origin.adapters

    def entries(self) -> list[dict[str, object]]:
        """How manifests of what was made with it name it: an entry for each of its sources."""
        strength = 1.0 if self.origin is None else self.origin.strength
        part = {} if strength == 1 else {"strength": strength, "interpolation": "geodesic"}
        return [{**source.entry(), **part} for source in self.sources]

    def entry(self) -> dict[str, object]:
        """How manifests name this adapter alone."""
        return {
            "name": self.path.name if self.path else None,
            "digest": self.digest,
            "rank": self.rank,
            "apply_GS": self.orthogonalize,
            "targets": len(self.chains),
        }

    def reflector(self, module: str, *, dtype: torch.dtype = torch.float64) -> BlockReflector:
        """The chain of one target in compact WY form.

        Raises:
            NumericalError: a zero or non-finite vector, or Gram-Schmidt breaks down; names the target.
        """
        try:
            return compact_wy(self.chains[module], orthogonalize=self.orthogonalize, dtype=dtype)
        except NumericalError as error:
            raise NumericalError(
                f"adapter `{self.label}`, target `{module}`: {error.message}", hint=error.hint
            ) from error


@dataclass(frozen=True)
class Origin:
    """What an adapter was made of: (R_1 R_2 …)^t.

    Attributes:
        adapters: as they were read, in the order they compose.
        strength: t, of their whole product.
    """

    adapters: tuple[HraAdapter, ...]
    strength: float = 1.0


def read_adapter(directory: Path) -> HraAdapter:
    """Read an adapter directory and check everything that can be checked without the base.

    Raises:
        AdapterError: not an adapter, not HRA, malformed, or config and tensors disagree; all findings at once.
        NumericalError: a reflection vector is zero or not finite; all of them named.
        OutputError: the file system does not let us read it.
    """
    with reading_adapter(directory):
        config_bytes = read_config_bytes(directory)
        config = _HraConfig.parse(directory, tensorfile.strict_json(directory / CONFIG_NAME, config_bytes))
        weights = tensorfile.read_header(weights_path(directory))
        digest = files_digest(config_bytes, weights.path)
    chains, parameters = _read_tensors(directory, weights, config)
    shared = config.shared
    return HraAdapter(
        chains=chains,
        parameters=parameters,
        rank=config.rank,
        orthogonalize=config.orthogonalize,
        bias=shared.bias,
        modules_to_save=shared.modules_to_save,
        base=shared.base,
        task=shared.task,
        model_class=shared.model_class,
        model_library=shared.model_library,
        path=directory,
        digest=digest,
    )


def write_adapter(adapter: HraAdapter, directory: Path) -> None:
    """Write an adapter so that stock PEFT loads it: `adapter_files` in a directory.

    The directory is made if needed; each file appears whole or not at all.

    Raises:
        NumericalError: a reflection vector is zero or not finite, or float32 cannot hold it; nothing is written.
        OSError: the directory cannot be written.
    """
    files = adapter_files(adapter)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(directory / name, data)


def adapter_files(adapter: HraAdapter) -> dict[str, bytes]:
    """The files that stock PEFT loads, the configuration last: chains in float32, parameters in their own dtype.

    `target_modules` lists full module paths.

    Raises:
        NumericalError: a reflection vector is zero or not finite, or float32 cannot hold it.
    """
    tensors = {names.chain_key(module): u.detach().to("cpu", torch.float32) for module, u in adapter.chains.items()}
    _check_directions(adapter.label, tensors)
    for name, value in adapter.parameters.items():
        tensors[names.parameter_key(name, adapter.chains)] = value.detach().to("cpu")
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    layout = tensorfile.lay_out(
        ((key, tensorfile.dtype_name(value.dtype), tuple(value.shape)) for key, value in ordered.items()),
        {"format": "pt"},
    )
    body = b"".join(ordered[key].reshape(-1).view(torch.uint8).numpy().tobytes() for key in layout.tensors)
    config = json.dumps(_peft_config(adapter), indent=2, sort_keys=True) + "\n"
    return {WEIGHTS_NAME: layout.header + body, CONFIG_NAME: config.encode()}


@dataclass(frozen=True)
class _HraConfig:
    """The fields of `adapter_config.json` that matter here, checked."""

    rank: int
    orthogonalize: bool
    shared: SharedFields

    @classmethod
    def parse(cls, directory: Path, config: object) -> "_HraConfig":
        path = directory / CONFIG_NAME
        if not isinstance(config, dict):
            raise AdapterError(f"`{path}`: expected a JSON object, got {type(config).__name__}")
        peft_type = config.get("peft_type")
        if peft_type != "HRA":
            raise AdapterError(
                f"`{directory}` is not an HRA adapter: its peft_type is {peft_type!r}",
                hint="PEFT's own `merge_and_unload` merges the other methods",
            )
        rank, orthogonalize = config.get("r"), config.get("apply_GS", False)
        findings = []
        if type(rank) is not int or rank < 1:
            findings.append(f"r: expected a positive integer, got {rank!r}")
        if not isinstance(orthogonalize, bool):
            findings.append(f"apply_GS: expected true or false, got {orthogonalize!r}")
        shared, more = SharedFields.parse(config)
        findings += more
        if findings:
            raise AdapterError(f"`{path}` is not a valid HRA config", findings=findings)
        return cls(rank, orthogonalize, shared)  # type: ignore[arg-type]  # rank: checked above


def digest_of(tensors: Mapping[str, Tensor], settings: object) -> str:
    """SHA-256 over named tensors, their dtypes and shapes, and settings that JSON can hold."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in tensors.items():
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_tensors(
    directory: Path, weights: tensorfile.TensorFile, config: _HraConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    chains: dict[str, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    findings = []
    for key, info in weights.tensors.items():
        parsed = names.parse_adapter_key(key, config.shared.modules_to_save)
        if parsed is None:
            findings.append(f"{key}: not a tensor of an HRA adapter")
        elif info.dtype not in tensorfile.FLOAT_DTYPES and not _is_saved(parsed, config.shared.modules_to_save):
            findings.append(f"{key}: expected floats, got {info.dtype}")
        elif parsed.kind == "original":
            continue
        elif parsed.path in parameters and not parameters[parsed.path].equal(weights.map(key)):
            findings.append(f"{key}: a second value for {parsed.path}")
        elif parsed.kind == "parameter":
            parameters[parsed.path] = weights.map(key)
        elif len(info.shape) != 2 or info.shape[1] != config.rank or info.shape[0] < config.rank:
            expected = f"(d, {config.rank}) with d >= {config.rank}"
            findings.append(f"{key}: the config says r = {config.rank}, so expected {expected}, got {info.shape}")
        else:
            chains[parsed.path] = weights.map(key).clone()
    if not chains and not findings:
        findings.append(f"{WEIGHTS_NAME} holds no `hra_u` tensor")
    if findings:
        raise AdapterError(f"adapter `{directory}`: {len(findings)} tensors are wrong", findings=findings)
    _check_directions(str(directory), {names.chain_key(module): vectors for module, vectors in chains.items()})
    return chains, parameters


def _is_saved(key: names.AdapterKey, saved: Sequence[str]) -> bool:
    """Whether this belongs to a saved module, which may hold counters: a BatchNorm's `num_batches_tracked`."""
    return key.kind == "parameter" and names.is_under(key.path, saved)


def _check_directions(label: str, vectors: Mapping[str, Tensor]) -> None:
    unusable = [line for key, value in vectors.items() for line in _unusable_vectors(key, value)]
    if unusable:
        raise NumericalError(
            f"adapter `{label}`: {len(unusable)} reflection vectors have no direction",
            findings=unusable,
            hint="training diverged, or the file is damaged; go back to an earlier checkpoint",
        )


def _unusable_vectors(key: str, vectors: Tensor) -> list[str]:
    """One line for each column that is zero, NaN or infinite; empty for usable vectors."""
    largest = vectors.abs().amax(dim=0)
    return [
        f"{key}, vector {i}: {'zero' if value == 0 else 'NaN or infinite'}"
        for i, value in enumerate(largest.tolist())
        if not 0 < value < float("inf")
    ]


def _peft_config(adapter: HraAdapter) -> dict[str, object]:
    """The fields that PEFT 0.21 writes, so that any PEFT since 0.12 reads them."""
    mapping = {"base_model_class": adapter.model_class, "parent_library": adapter.model_library}
    return {
        "apply_GS": adapter.orthogonalize,
        "auto_mapping": mapping if all(mapping.values()) else None,
        "base_model_name_or_path": adapter.base,
        "bias": adapter.bias,
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "peft_type": "HRA",
        "r": adapter.rank,
        "revision": None,
        "target_modules": _target_modules(adapter.chains),
        "task_type": adapter.task,
    }


def _target_modules(modules: Iterable[str]) -> list[str] | str:
    """Exactly these modules, in PEFT's terms.

    PEFT takes a name in a list as a suffix too: `conv` would also adapt `block.conv`. A string is a pattern for the
    whole name.
    """
    ordered = sorted(modules)
    return ordered if all("." in module for module in ordered) else "|".join(re.escape(module) for module in ordered)
