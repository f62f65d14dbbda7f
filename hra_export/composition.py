"""Several adapters as one: a chain for each target, the adapters' own one after another, W R_1 R_2 ….

Concatenation is exact: the columns stay as they are stored. A Gram–Schmidt chain is the product of the reflections of
its orthonormal columns, which take the place of the stored ones.

Limits: a file has one rank for all of its targets. Shorter chains are filled with pairs of equal vectors, which cancel;
an odd number of missing reflections cannot be filled, since each turns the sign of the determinant.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import HraAdapter, Origin
from hra_export.errors import ConversionError, MismatchError, NumericalError
from hra_export.householder import BlockReflector
from hra_export.peft_directory import BIASES
from hra_export.rotation import padded

T = TypeVar("T")
# ‖R − I‖ that is rounding alone: pairs of equal vectors, in float64.
NOISE = 1e-12


def composed(adapters: Sequence[HraAdapter]) -> HraAdapter:
    """The adapter whose chains are those of all adapters, one after another.

    Args:
        adapters: at least one; a single one is given back as it is.

    Returns:
        One rank for all targets; the columns of plain chains are those that are stored.

    Raises:
        ConversionError: ranks that cannot be made one, or more reflections than features; all of them.
        MismatchError: the adapters disagree on what they were trained on, or on a trained parameter; all findings.
        NumericalError: Gram–Schmidt breaks down; all targets.
    """
    if len(adapters) == 1:
        return adapters[0]
    check_agreement(adapters)
    reflectors(adapters)
    return uniform(joined(adapters, {module: columns(adapters, module) for module in modules_of(adapters)}))


def joined(adapters: Sequence[HraAdapter], chains: Mapping[str, Tensor], *, strength: float = 1.0) -> HraAdapter:
    """An adapter with chains that were made of other adapters', and with all that those bring beside their chains.

    Args:
        adapters: that the chains were made of, in order; they agree.
        chains: module path → U (d, k); k may differ, and `rank` is the largest.
        strength: t of (R_1 R_2 …)^t, for manifests.
    """
    sources = tuple(source for adapter in adapters for source in adapter.sources)
    first = next((adapter for adapter in adapters if adapter.model_class), adapters[0])
    return HraAdapter(
        chains=chains,
        rank=max(vectors.shape[1] for vectors in chains.values()),
        parameters={name: value for adapter in adapters for name, value in adapter.parameters.items()},
        bias=bias_of(adapters),
        modules_to_save=saved_modules_of(adapters),
        base=next((adapter.base for adapter in adapters if adapter.base), None),
        task=next((adapter.task for adapter in adapters if adapter.task), None),
        model_class=first.model_class,
        model_library=first.model_library,
        path=adapters[0].path if len(adapters) == 1 else None,
        digest=_digest(adapters, strength),
        origin=Origin(sources, strength),
    )


def idle(adapters: Sequence[HraAdapter]) -> HraAdapter:
    """The adapters at strength 0: a pair of equal vectors for each target, which does nothing.

    Raises:
        MismatchError: as `composed`.
    """
    check_agreement(adapters)
    chains = {module: columns(adapters, module)[:, :1].repeat(1, 2) for module in modules_of(adapters)}
    return joined(adapters, chains, strength=0.0)


def check_agreement(adapters: Sequence[HraAdapter]) -> None:
    """Refuse adapters that are not for one model.

    Raises:
        MismatchError: they disagree on what they were trained on, on a size, or on a trained parameter; all findings.
    """
    _, clashes = parameters_of(adapters)
    findings = [*clashes, *_disagreements(adapters)]
    if findings:
        labels = ", ".join(f"`{adapter.label}`" for adapter in adapters)
        raise MismatchError(f"{labels} do not compose", findings=findings)


def uniform(adapter: HraAdapter) -> HraAdapter:
    """The same chains, all as long as the longest: what a file can hold.

    Raises:
        ConversionError: chains that are shorter by an odd number, or that have more reflections than features; all.
    """
    findings, hint = [], None
    for module, vectors in adapter.chains.items():
        features, rank = vectors.shape
        if adapter.rank > features:
            findings.append(f"{module}: {adapter.rank} reflections, but {features} features")
            hint = "`hra-export compress` each adapter to fewer reflections first"
        elif (adapter.rank - rank) % 2:
            findings.append(f"{module}: {rank} reflections, which cannot be written as {adapter.rank}")
            hint = hint or "`hra-export convert --to lora` takes any: a LoRA adapter has no determinant to keep"
    if findings:
        raise ConversionError(
            f"`{adapter.label}`: {len(findings)} targets cannot have the rank of the others in one HRA adapter",
            findings=findings,
            hint=hint,
        )
    return replace(adapter, chains={module: padded(u, adapter.rank) for module, u in adapter.chains.items()})


def reflectors(adapters: Sequence[HraAdapter]) -> dict[str, BlockReflector]:
    """R_1 R_2 … of every target, float64.

    Raises:
        NumericalError: chains that cannot be computed; all of them.
    """
    return for_every_chain(modules_of(adapters), lambda module: reflector_of(adapters, module))


def rounded_to_float32(adapter: HraAdapter) -> dict[str, tuple[float, float]]:
    """Of every target ‖R − I‖_F, and the relative error that its vectors in float32, as a file has them, make of it.

    Raises:
        NumericalError: chains that cannot be computed; all of them.
    """
    chains = {module: vectors.to(torch.float32) for module, vectors in adapter.chains.items()}
    written = reflectors([replace(adapter, chains=chains)])
    found = {}
    for module, exact in reflectors([adapter]).items():
        norm, is_as_read = householder.distance(exact), torch.equal(chains[module], adapter.chains[module])
        error = 0.0 if is_as_read or norm < NOISE else householder.distance(written[module], exact) / norm
        found[module] = (norm, error)
    return found


def for_every_chain(modules: Iterable[str], compute: Callable[[str], T]) -> dict[str, T]:
    """What a computation gives for the chain of every target.

    Raises:
        NumericalError: chains that cannot be computed; all of them.
    """
    found, findings, hint = {}, [], None
    for module in modules:
        try:
            found[module] = compute(module)
        except NumericalError as error:
            findings.append(error.message)
            hint = error.hint
    if findings:
        raise NumericalError(f"{len(findings)} chains cannot be computed", findings=findings, hint=hint)
    return found


def reflector_of(adapters: Sequence[HraAdapter], module: str) -> BlockReflector:
    """R_1 R_2 … of one target of any adapter, float64.

    Raises:
        NumericalError: a chain cannot be computed; names the target.
    """
    return householder.compose(*(adapter.reflector(module) for adapter in adapters if module in adapter.chains))


def modules_of(adapters: Sequence[HraAdapter]) -> list[str]:
    """Every target of any adapter, in their order."""
    return list(dict.fromkeys(module for adapter in adapters for module in adapter.chains))


def bias_of(adapters: Sequence[HraAdapter]) -> str:
    """The widest of the adapters' settings."""
    return max((adapter.bias for adapter in adapters), key=BIASES.index)


def saved_modules_of(adapters: Sequence[HraAdapter]) -> tuple[str, ...]:
    """The modules that any of the adapters was trained with whole."""
    return tuple(dict.fromkeys(name for adapter in adapters for name in adapter.modules_to_save))


def parameters_of(adapters: Sequence[HraAdapter]) -> tuple[dict[str, Tensor], list[str]]:
    """What was trained beside the chains, and a finding for each value that adapters do not agree on."""
    found: dict[str, Tensor] = {}
    clashes = [
        f"{name}: two adapters carry different values for it"
        for adapter in adapters
        for name, value in adapter.parameters.items()
        if not found.setdefault(name, value).equal(value)
    ]
    return found, list(dict.fromkeys(clashes))


def columns(adapters: Sequence[HraAdapter], module: str) -> Tensor:
    """The reflection vectors of R_1 R_2 … of a target (d, r_1 + r_2 + …): as stored, orthonormal for Gram–Schmidt."""
    plain = [
        adapter.reflector(module).u if adapter.orthogonalize else adapter.chains[module]
        for adapter in adapters
        if module in adapter.chains
    ]
    return torch.cat(plain, dim=1)


def _disagreements(adapters: Sequence[HraAdapter]) -> Iterator[str]:
    """What decides the model that a file is loaded into. The base's name does not: one model has many."""
    for name, values in (
        ("task_type", {adapter.task for adapter in adapters}),
        ("base_model_class", {adapter.model_class for adapter in adapters}),
    ):
        named = sorted(value for value in values if value is not None)
        if len(named) > 1:
            yield f"{name}: the adapters were trained for {' and '.join(named)}"
    for module in modules_of(adapters):
        sizes = sorted({adapter.chains[module].shape[0] for adapter in adapters if module in adapter.chains})
        if len(sizes) > 1:
            yield f"{module}: the adapters' chains have {' and '.join(map(str, sizes))} features"


def _digest(adapters: Sequence[HraAdapter], strength: float) -> str:
    """Over the digests, in order, and the strength; empty when an adapter has none."""
    digests = [adapter.digest for adapter in adapters]
    return hashlib.sha256(json.dumps([digests, strength]).encode()).hexdigest() if all(digests) else ""
