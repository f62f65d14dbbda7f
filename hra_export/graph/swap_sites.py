"""What a swappable graph takes for an adapter: the names, sizes and types of U and V at each of its places.

A swappable graph says in its metadata which weights it was made of (`hra.fingerprint`) and which trained parameters
beside the chains are part of them (`hra.baked_parameters`). An adapter file repeats the fingerprint: ONNX Runtime
itself loads a file that was made for another graph, or for half of this one, without a word.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hra_export.errors import GraphError, MismatchError
from hra_export.graph.values import Array, TensorSpec, dtype_of, shape_of

Swapping = Literal["adapter", "rows"]
SWAPPINGS: dict[str, Swapping] = {"adapter": "adapter", "rows": "rows"}

U_SUFFIX = ".hra_U"
V_SUFFIX = ".hra_V"
ADAPTER_INDEX = "adapter_index"

SWAPPING_KEY = "hra.swappable"
FINGERPRINT_KEY = "hra.fingerprint"
BAKED_KEY = "hra.baked_parameters"
EMBEDDINGS_KEY = "hra.embeddings"
RENAMED_KEY = "hra.renamed"


@dataclass(frozen=True)
class Site:
    """A place of a graph that takes a chain.

    Attributes:
        target: module path.
        size: d, the width of what is reflected there.
        dtype: NumPy's name of the type of U and V.
        embedding: the chain rotates looked-up rows, by R and not by Rᵀ.
    """

    target: str
    size: int
    dtype: str
    embedding: bool = False

    @property
    def u(self) -> str:
        """Name of the input that takes U."""
        return self.target + U_SUFFIX

    @property
    def v(self) -> str:
        """Name of the input that takes V."""
        return self.target + V_SUFFIX


@dataclass(frozen=True)
class SwapContract:
    """What a swappable graph asks of an adapter.

    Attributes:
        swapping: one adapter for a run, or one for each row of a batch.
        sites: ordered by target.
        fingerprint: SHA-256 over the graph's weights, hex.
        baked: SHA-256 over the trained parameters that are part of the weights, hex; empty when there are none.
        renamed: other names that adapters may have for targets, from older versions of the model's library → target.
    """

    swapping: Swapping
    sites: tuple[Site, ...]
    fingerprint: str
    baked: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, optional: Sequence[TensorSpec], metadata: Mapping[str, str]) -> "SwapContract | None":
        """From the inputs of a graph that have defaults, and its metadata; None when it is not swappable.

        Raises:
            GraphError: the metadata are damaged.
        """
        swapping = SWAPPINGS.get(metadata.get(SWAPPING_KEY, ""))
        if swapping is None:
            return None
        try:
            embeddings = set(json.loads(metadata.get(EMBEDDINGS_KEY, "[]")))
            renamed = {str(name): str(target) for name, target in json.loads(metadata.get(RENAMED_KEY, "{}")).items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise GraphError(
                f"the graph's metadata are damaged: `{EMBEDDINGS_KEY}` is no list of targets, "
                f"or `{RENAMED_KEY}` no object of names"
            ) from error
        widths = {spec.name: spec for spec in optional if spec.name.endswith(U_SUFFIX)}
        sites = []
        for name, spec in sorted(widths.items()):
            target, size = name.removesuffix(U_SUFFIX), spec.shape[-2]
            if not isinstance(size, int):
                raise GraphError(f"`{name}`: expected a fixed width, got {spec}")
            sites.append(Site(target, size, spec.dtype, target in embeddings))
        return cls(swapping, tuple(sites), metadata.get(FINGERPRINT_KEY, ""), metadata.get(BAKED_KEY, ""), renamed)

    def names(self, target: str) -> list[str]:
        """What adapters may call a target, its own name first."""
        return [target, *(name for name, new in self.renamed.items() if new == target)]

    @property
    def metadata(self) -> dict[str, str]:
        """What the graph says about it."""
        renamed = {RENAMED_KEY: json.dumps(dict(self.renamed))} if self.renamed else {}
        return {
            **renamed,
            SWAPPING_KEY: self.swapping,
            FINGERPRINT_KEY: self.fingerprint,
            BAKED_KEY: self.baked,
            EMBEDDINGS_KEY: json.dumps([site.target for site in self.sites if site.embedding]),
        }

    def check(self, parameters: Mapping[str, Array], label: str) -> None:
        """Every site has its U and V, of its size and type and of one rank, and nothing is left over.

        Args:
            parameters: name → U (d, r) or V (r, d).
            label: how messages call what the parameters came from.

        Raises:
            MismatchError: something does not fit; all findings at once.
        """
        findings = [finding for site in self.sites for finding in _misfits(parameters, site)]
        known = {name for site in self.sites for name in (site.u, site.v)}
        findings += [f"{name}: the graph has no such input" for name in sorted(set(parameters) - known)]
        if findings:
            raise MismatchError(
                f"`{label}` does not fit the graph, which has {len(self.sites)} targets",
                findings=findings,
                hint="write the file for this graph: a runtime would run what is missing as the default, in silence",
            )


def _misfits(parameters: Mapping[str, Array], site: Site) -> list[str]:
    missing = [f"{name}: missing" for name in (site.u, site.v) if name not in parameters]
    if missing:
        return missing
    u, v = parameters[site.u], parameters[site.v]
    findings = [
        f"{name}: expected {site.dtype}, got {dtype_of(value)}"
        for name, value in ((site.u, u), (site.v, v))
        if dtype_of(value) != site.dtype
    ]
    (rows, rank), swapped = _pair(u), _pair(v)[::-1]
    if (rows, rank) != swapped or rows != site.size:
        expected = f"U ({site.size}, r) and V (r, {site.size})"
        findings.append(f"{site.target}: expected {expected}, got {shape_of(u)} and {shape_of(v)}")
    return findings


def _pair(value: Array) -> tuple[int, int]:
    sizes = shape_of(value)
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (-1, -1)
