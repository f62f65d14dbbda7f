"""An adapter as LoRA factors for a graph that takes them as inputs: ΔW = s B A, in the form that the graph asks for.

Letters: d in_features, o out_features, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hra_export.checkpoint import Checkpoint
from hra_export.converted import ConvertedTarget
from hra_export.errors import MismatchError, NumericalError, UnsupportedModelError
from hra_export.graph.adapter_file import AdapterContent, to_numpy
from hra_export.graph.base_check import refuse_other_base
from hra_export.graph.lora_inputs import LoraSite, lora_sites, match_sites, shared_ranks
from hra_export.graph.swapping import weights_fingerprint
from hra_export.graph.values import Array
from hra_export.low_rank import DeltaSource, locate, rounded
from hra_export.target_weights import TargetWeight

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoraContent:
    """A file for a graph with LoRA inputs, and what it does to each target of the adapter."""

    content: AdapterContent
    targets: tuple[ConvertedTarget, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    """A target, its inputs, its weight, and the rank that is written."""

    module: str
    site: LoraSite
    weight: TargetWeight
    rank: int


def lora_content(source: DeltaSource, model: ir.Model, base: Checkpoint) -> LoraContent:
    """Factors for every pair of LoRA inputs of a graph; zeros where the adapter has no target.

    Each rank is the adapter's own where the graph leaves it open, the largest of all where the graph has one symbol
    for all, and the graph's where that is fixed.

    Args:
        source: the adapter.
        model: a graph of `base` whose LoRA factors are inputs.
        base: what ΔW is computed from.

    Raises:
        GraphError: the graph takes no adapters, or what it does with them cannot be followed.
        MismatchError: targets, sizes, ranks or weights do not fit, or there are parameters beside the factors; all
            findings at once.
        NumericalError: a factor leaves the range of the graph's type.
        UnsupportedModelError: convolutions, embeddings, quantized factors.
    """
    sites = lora_sites(model)
    weights = locate(source, base)
    _refuse_kinds(weights)
    matched, findings = match_sites(source.modules, sites)
    ranks = {module: source.rank(module) for module in matched}
    findings += [text for module, site in matched.items() for text in _misfits(site, weights[module], ranks[module])]
    findings += [f"{name}: a file of factors cannot bring it" for name in source.parameters]
    if findings:
        raise MismatchError(
            f"{source.label} does not fit the graph",
            findings=findings,
            hint="export a graph that has these targets; `hra-export compress` makes ranks smaller",
        )
    notes = refuse_other_base(base, weights, {module: site.weight for module, site in matched.items()})
    written = _written_ranks(sites, {site.target: ranks[module] for module, site in matched.items()})
    pairs = [_Pair(module, site, weights[module], written[site.target]) for module, site in matched.items()]
    parameters, targets = _factors(source, pairs)
    for site in sites:
        if site.a.name not in parameters:
            o, d, rank = site.b.size, site.a.size, written[site.target]
            parameters |= _stored(site, torch.zeros(o, rank), torch.zeros(rank, d))
    content = AdapterContent(
        parameters,
        weights_fingerprint(model, without={factor.name for site in sites for factor in (site.a, site.b)}),
        f"{source.digest}{base.fingerprint()}",
        {"adapters": source.entries(), "base": base.fingerprint(), "ranks": written},
    )
    return LoraContent(content, targets, (*notes, *_notes(sites, pairs)))


def _refuse_kinds(weights: Mapping[str, TargetWeight]) -> None:
    kinds = {"conv2d": "a convolution", "embedding": "an embedding"}
    findings = [f"{module}: {kinds[each.kind]}" for module, each in weights.items() if each.kind in kinds]
    if findings:
        raise UnsupportedModelError(
            "LoRA inputs are written for linear layers",
            findings=findings,
            hint="a graph of `hra-export onnx --swappable` takes chains on embeddings",
        )


def _misfits(site: LoraSite, weight: TargetWeight, rank: int) -> Iterator[str]:
    o, d = weight.shape
    if (site.b.size, site.a.size) != (o, d):
        yield f"{weight.module}: expected inputs for o = {o} and d = {d}, got {site.b.size} and {site.a.size}"
    if site.a.dtype not in FLOATS:
        yield f"{weight.module}: expected inputs of a float type, got {site.a.dtype}"
    if site.rank is not None and rank > site.rank:
        yield f"{weight.module}: the graph takes rank {site.rank}, the adapter has {rank}"


def _written_ranks(sites: Sequence[LoraSite], ranks: Mapping[str, int]) -> dict[str, int]:
    """Target, as the graph calls it → rank in the file."""
    shared = shared_ranks(sites)
    largest = max((ranks.get(target, 0) for target in shared), default=0)
    found = {}
    for site in sites:
        own = largest if site.target in shared else ranks.get(site.target, 0)
        found[site.target] = own if site.rank is None else site.rank
    return found


def _factors(source: DeltaSource, pairs: Sequence[_Pair]) -> tuple[dict[str, Array], tuple[ConvertedTarget, ...]]:
    parameters: dict[str, Array] = {}
    targets, overflows = [], []
    for pair in pairs:
        left, right = source.factors(pair.weight)
        scale, dtype = pair.site.scale, FLOATS[pair.site.a.dtype]
        left, right, error, norm = rounded(left / scale, right, pair.rank, dtype)
        if error == float("inf"):
            overflows.append(f"{pair.module}: {pair.site.a.dtype}")
        parameters |= _stored(pair.site, left, right)
        targets.append(ConvertedTarget(pair.module, pair.rank, norm * abs(scale), error))
    if overflows:
        raise NumericalError("factors leave the range of the graph's type", findings=overflows)
    return parameters, tuple(targets)


def _stored(site: LoraSite, left: Tensor, right: Tensor) -> dict[str, Array]:
    """B (o, r) and A (r, d) as the graph takes them: so, or transposed."""
    dtype = FLOATS[site.a.dtype]
    a = right if site.a.is_transposed else right.T
    b = left if site.b.is_transposed else left.T
    return {site.a.name: to_numpy(a.to(dtype).contiguous()), site.b.name: to_numpy(b.to(dtype).contiguous())}


def _notes(sites: Sequence[LoraSite], pairs: Sequence[_Pair]) -> Iterator[str]:
    if len(pairs) < len(sites):
        yield f"{len(sites) - len(pairs)} of {len(sites)} pairs of inputs have no target in the adapter: they are zeros"
    scales = sorted({site.scale for site in sites} - {1.0})
    if scales:
        yield f"the graph multiplies by {', '.join(f'{scale:g}' for scale in scales)}, which B is divided by"
    required = [factor.name for site in sites for factor in (site.a, site.b) if not factor.has_default]
    if required:
        yield (
            f"{len(required)} inputs have no default, `{required[0]}` for one: "
            "`run` of the runtime in Python asks for them although the adapter has them"
        )
