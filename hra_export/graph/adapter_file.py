"""Adapters in ONNX Runtime's own file format, `NAME.onnx_adapter`, written for one swappable graph.

`onnxruntime.LoraAdapter` and ONNX Runtime GenAI load them, and check neither that a file is complete nor that it was
made for the graph at hand. So a file has U and V of every place of its graph, of rank 0 where the adapter has no
chain; it carries 31 bits of the graph's fingerprint as its model version and 31 bits of the adapter's digest as its
adapter version; and beside it lies `NAME.onnx_adapter.json` with both in full and the SHA-256 of the file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hra_export.adapter import HraAdapter
from hra_export.errors import FormatError, MismatchError, NumericalError
from hra_export.graph import runtime
from hra_export.graph.bank import stack_parameters
from hra_export.graph.operator import operands
from hra_export.graph.swap_sites import SwapContract
from hra_export.graph.values import BFLOAT16, Array
from hra_export.householder import compose
from hra_export.rotation import decompose
from hra_export.strength import Interpolation
from hra_export.tensorfile import strict_json

SCHEMA_VERSION = 1
SUFFIX = ".onnx_adapter"
VERSION_BITS = 31  # the format's version numbers are signed 32-bit integers


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file as it was read.

    Attributes:
        path: where it lies.
        parameters: name → U (d, r) or V (r, d).
        adapter_version: 31 bits of the adapter's digest.
        model_version: 31 bits of the graph's fingerprint.
        description: the file beside it; empty when there is none.
    """

    path: Path
    parameters: Mapping[str, Array]
    adapter_version: int
    model_version: int
    description: Mapping[str, Any]

    def check(self, contract: SwapContract) -> None:
        """The file was made for this graph, and is complete.

        Raises:
            MismatchError: it is foreign, partial, or of other shapes or types; all findings at once.
        """
        findings = []
        if self.model_version != version_of(contract.fingerprint):
            findings.append(f"model version: expected {version_of(contract.fingerprint)}, got {self.model_version}")
        stated = self.description.get("fingerprint", contract.fingerprint)
        if stated != contract.fingerprint:
            findings.append(f"fingerprint: expected {contract.fingerprint}, got {stated}")
        if findings:
            raise MismatchError(
                f"`{self.path}` was made for another graph",
                findings=findings,
                hint="write it for this graph: the weights, or the parameters trained beside the chains, differ",
            )
        contract.check(self.parameters, str(self.path))


@dataclass(frozen=True)
class AdapterContent:
    """An adapter file that is not written yet.

    Attributes:
        parameters: name of an input → its value.
        fingerprint: of the graph that takes them, hex.
        digest: of what they were made of.
        described: further keys of the file beside it.
    """

    parameters: Mapping[str, Array]
    fingerprint: str
    digest: str
    described: Mapping[str, Any]

    def write(self, path: Path, beside: Path) -> None:
        """Write the file, and what describes it; equal contents make equal bytes.

        Raises:
            OutputError: the file cannot be written.
        """
        adapter, model = version_of(self.digest), version_of(self.fingerprint)
        runtime.write_adapter_format(path, self.parameters, adapter=adapter, model=model)
        description = {
            "schema_version": SCHEMA_VERSION,
            "kind": "onnx_adapter",
            "sha256": _file_digest(path),
            "fingerprint": self.fingerprint,
            **self.described,
        }
        beside.write_bytes((json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))


def adapter_parameters(
    adapters: Sequence[HraAdapter], contract: SwapContract, *, strength: float = 1.0
) -> dict[str, Array]:
    """U and V of every place of a graph, rounded once to the graph's type; rank 0 where no adapter has a chain.

    Args:
        adapters: composed in the order of W R_1 R_2 ….
        contract: of the graph.
        strength: s in R → I + s (R − I); 0 is rank 0 everywhere.

    Returns:
        `<target>.hra_U` (d, r) and `<target>.hra_V` (r, d), r the fewest reflections that give the chain.

    Raises:
        MismatchError: a target has no place in the graph or another width there, or the parameters that were trained
            beside the chains are not those in the graph's weights; all findings at once.
        NumericalError: a chain has no direction.
    """
    findings = _unfit(adapters, contract)
    if findings:
        raise MismatchError(
            f"{', '.join(f'`{adapter.label}`' for adapter in adapters)}: does not fit the swappable graph",
            findings=findings,
            hint="export a graph that has these targets and parameters",
        )
    parameters: dict[str, Array] = {}
    for site in contract.sites:
        names = contract.names(site.target)
        blocks = [adapter.reflector(name) for adapter in adapters for name in names if name in adapter.chains]
        dtype = getattr(torch, site.dtype)
        u, v = torch.zeros(site.size, 0, dtype=dtype), torch.zeros(0, site.size, dtype=dtype)
        if blocks and strength:
            rank = decompose(compose(blocks[0], *blocks[1:])).rank
            u, v = operands(blocks, dtype, rows=site.embedding, strength=strength)
            u, v = u[:, :rank].contiguous(), v[:rank]  # directions come largest first; pairs that cancel have none
        parameters |= {site.u: to_numpy(u), site.v: to_numpy(v)}
    overflows = sorted(name for name, value in parameters.items() if not np.isfinite(value).all())
    if overflows:
        raise NumericalError("U and V leave the range of the graph's type", findings=overflows)
    return parameters


def adapter_content(adapters: Sequence[HraAdapter], contract: SwapContract, *, strength: float = 1.0) -> AdapterContent:
    """What an adapter file of a swappable graph holds.

    Args:
        adapters: composed in the order of W R_1 R_2 ….
        contract: of the graph.
        strength: as of `adapter_parameters`.

    Raises:
        MismatchError, NumericalError: as `adapter_parameters`.
    """
    parameters = adapter_parameters(adapters, contract, strength=strength)
    digests = [adapter.digest or _digest(adapter.chains) for adapter in adapters]
    sources = [source for adapter in adapters for source in adapter.sources]
    asked, interpolation = _asked_strength(adapters, strength)
    described = {
        "adapters": [
            {
                "name": source.path.name if source.path else None,
                "digest": source.digest or _digest(source.chains),
                "rank": source.rank,
                "apply_GS": source.orthogonalize,
            }
            for source in sources
        ],
        "strength": asked,
        "interpolation": interpolation,
        "ranks": {site.target: parameters[site.u].shape[1] for site in contract.sites},
    }
    changed = [] if strength == 1 else [str(strength)]
    return AdapterContent(parameters, contract.fingerprint, "".join([*digests, *changed]), described)


def _asked_strength(adapters: Sequence[HraAdapter], linear: float) -> tuple[float, Interpolation]:
    """As a user gave it: a part of a rotation is in the adapters themselves."""
    if linear != 1:
        return linear, "linear"
    return next((adapter.origin.strength for adapter in adapters if adapter.origin is not None), 1.0), "geodesic"


def stack_operands(
    adapters: Sequence[Sequence[HraAdapter]], contract: SwapContract, *, strength: float = 1.0
) -> dict[str, Array]:
    """What a graph whose rows name their adapters is fed: all adapters at once, behind one of zeros, the base.

    Args:
        adapters: each a composition in the order of W R_1 R_2 …; adapter i has the index i + 1.
        contract: of the graph.
        strength: of each, as of `adapter_parameters`.

    Returns:
        `<target>.hra_U` (a + 1, d, r) and `<target>.hra_V` (a + 1, r, d), smaller ranks padded with zeros.

    Raises:
        MismatchError, NumericalError: as `adapter_parameters`.
    """
    parameters = [adapter_parameters(each, contract, strength=strength) for each in adapters]
    return stack_parameters(parameters, contract.sites)


def write_adapter_file(
    path: Path, adapters: Sequence[HraAdapter], contract: SwapContract, *, strength: float = 1.0
) -> tuple[Path, Path]:
    """Write `NAME.onnx_adapter` and what describes it; equal inputs make equal bytes.

    Args:
        path: ends in `.onnx_adapter`; in a folder that exists.
        adapters: composed in the order of W R_1 R_2 ….
        contract: of the graph.
        strength: as of `adapter_parameters`.

    Returns:
        The two files.

    Raises:
        MismatchError, NumericalError: as `adapter_parameters`.
        ValueError: the name has another ending.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"path: expected a name that ends in `{SUFFIX}`, got `{path.name}`")
    beside = described_by(path)
    adapter_content(adapters, contract, strength=strength).write(path, beside)
    return path, beside


def read_adapter_file(path: Path) -> AdapterFile:
    """Read an adapter file, and what describes it when it lies beside.

    Raises:
        FormatError: not an adapter file, corrupt, or not the one that is described.
        OutputError: it cannot be read.
    """
    parameters, adapter_version, model_version = runtime.read_adapter_format(path)
    beside = described_by(path)
    description = strict_json(beside, beside.read_bytes()) if beside.is_file() else {}
    if not isinstance(description, dict):
        raise FormatError(f"`{beside}`: expected a JSON object, got {type(description).__name__}")
    expected, got = description.get("sha256"), _file_digest(path)
    if expected not in (None, got):
        raise FormatError(
            f"`{path}` is not the file that `{beside.name}` describes",
            findings=[f"sha256: expected {expected}, got {got}"],
        )
    return AdapterFile(path, parameters, adapter_version, model_version, description)


def parameters_digest(adapters: Sequence[HraAdapter]) -> str:
    """SHA-256 over what adapters bring beside their chains, hex; empty when they bring nothing."""
    parameters = {name: value for adapter in adapters for name, value in adapter.parameters.items()}
    return _digest(parameters) if parameters else ""


def version_of(text: str) -> int:
    """31 bits that stand for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> (32 - VERSION_BITS)


def _unfit(adapters: Sequence[HraAdapter], contract: SwapContract) -> list[str]:
    sites = {site.target: site for site in contract.sites}
    findings = []
    for adapter in adapters:
        for target, vectors in sorted(adapter.chains.items()):
            site = sites.get(contract.renamed.get(target, target))
            if site is None:
                findings.append(f"{target}: no such place in the graph")
            elif len(vectors) != site.size:
                findings.append(f"{target}: expected {site.size} rows of U, got {len(vectors)}")
    if parameters_digest(adapters) != contract.baked:
        names = sorted({name for adapter in adapters for name in adapter.parameters})
        findings.append(f"parameters beside the chains are not those in the graph: {', '.join(names) or 'none'}")
    return findings


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_numpy(tensor: Tensor) -> Array:
    """A tensor on the CPU as an array, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return np.asarray(tensor.numpy())


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def described_by(path: Path) -> Path:
    """Where the description of an adapter file lies."""
    return path.with_name(path.name + ".json")
