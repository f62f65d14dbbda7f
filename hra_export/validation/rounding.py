"""The dequantized reference: what a graph of rounded weights should hold, and what it should compute.

    each matrix     |dequantized − W| ≤ scale / 2, or W R where the adapter is part of the weights
    the outputs     PyTorch with the dequantized weights, live layers on top

The first proves the weights, the second the graph around them. Both ask that the graph tells which matrix belongs to
which parameter.

Letters: o out_features, d in_features.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hra_export.adapter import HraAdapter
from hra_export.graph.codes import CodedSite, activation_precision, coded_sites, holds_reflections
from hra_export.graph.document import open_graph
from hra_export.graph.genai_names import NAMES
from hra_export.graph.matching import FUSED
from hra_export.layer import ReflectedLayer
from hra_export.parity import RoundingCost, mean_kl
from hra_export.quantization import ROWS, QuantizedMatrix
from hra_export.validation.candidates import GraphCandidate
from hra_export.validation.reference import Reference

QUANTIZED = ("int8", "int4")
# Rounding errors of float32 on the way to a code, in steps: at most 3 · 2⁻²⁴ · 255.
SLACK = 1e-3
# Scales of half precision, and weights that were in it before they were rounded: relative errors of each.
SCALE_ROUNDING = {"fp32": 0.0, "fp16": 2.0**-10, "bf16": 2.0**-7}
# ‖Q(W) − W‖ / ‖W‖ of a matrix that others rounded by rules of their own: 0.1 is usual for 4 bits, 1.4 another matrix.
MOST_FOREIGN = 0.5
SMALLEST = 2.0**-25  # half of float16's smallest step: the least that a scale in it is rounded by
SHOWN = 5

Sides = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Rounding:
    """What came of putting a candidate's dequantized weights into the reference.

    Attributes:
        matrices: how many were read.
        findings: matrices that do not hold what they should.
        precision: of the products' activations.
        is_dynamic: products are in integers, and activations have one scale for all.
        is_live: the adapter stands beside the weights, so that the reference still runs without it.
    """

    matrices: int
    findings: tuple[str, ...]
    precision: str
    is_dynamic: bool
    is_live: bool


def round_reference_(reference: Reference, candidate: GraphCandidate, adapters: Sequence[HraAdapter]) -> Rounding | str:
    """Check every quantized matrix of a candidate and put its values into the reference, in place.

    Args:
        reference: with live layers, which are folded where the candidate's are.
        candidate: of rounded weights.
        adapters: of the reference.

    Returns:
        What was found, or why nothing was done: a matrix that cannot be read or assigned.
    """
    sites, is_live, problem = _sites(candidate)
    trained = {name for adapter in adapters for name in adapter.parameters} if is_live else set()
    places = [_modules(reference.model, site) for site in sites]
    lost = [site for site, names in zip(sites, places, strict=True) if not names or _is_any(names, trained)]
    if lost:
        problem = f"{len(lost)} quantized matrices belong to no parameter (`{lost[0].node.name}`)"
    if problem:
        return problem
    if not is_live:
        reference.attachment.fold_()
    precision, is_ours = activation_precision(sites), candidate.manifest.get("precision") in QUANTIZED
    findings = []
    for site, names in zip(sites, places, strict=True):
        weights = [_weight(reference.model, name) for name in names]
        values, steps, error = _compared(site.matrix(), torch.cat(weights), SCALE_ROUNDING[precision])
        if is_ours and steps:
            findings.append(f"{' + '.join(names)}: its codes are off from the weight by up to {steps:.2g} steps")
        elif not is_ours and not error <= MOST_FOREIGN:
            findings.append(f"{' + '.join(names)}: its codes are off from the weight by {error:.0%} of its size")
        for name, part in zip(names, torch.split(values, [len(weight) for weight in weights]), strict=True):
            _install_(reference.model, name, part)
    return Rounding(
        len(sites), tuple(_shown(findings, len(sites))), precision, any(site.is_dynamic for site in sites), is_live
    )


def _sites(candidate: GraphCandidate) -> tuple[list[CodedSite], bool, str]:
    """Every quantized matrix of a candidate, whether the adapter stands beside them, and what stands in the way."""
    models = [open_graph(graph.path) for graph in candidate.graphs.values()]
    read = [coded_sites(model) for model in models]
    sites = [site for found, _ in read for site in found]
    others = [name for _, names in read for name in names]
    is_live = any(holds_reflections(model) for model in models)
    if candidate.manifest.get("precision") in QUANTIZED:
        is_live = candidate.manifest.get("mode") != "merged"
    problem = f"{len(others)} quantized products cannot be read back ({others[0]})" if others else ""
    return sites, is_live, problem or ("" if sites else "no quantized product was found")


def _modules(model: nn.Module, site: CodedSite) -> list[str]:
    """The modules whose weights, one's rows after another's, a matrix holds; none where that cannot be told."""
    stem, _, leaf = site.path.rpartition(".")
    packed = [f"{stem}.{member}" for member in FUSED.get(leaf, ())]
    renamed = [[f"{stem}.{own}"] for (_, own), name in NAMES.items() if name == leaf == "o_proj"]
    for names in ([site.path], packed, *renamed):
        shapes = [_weight(model, name).shape for name in names if _has_weight(model, name)]
        is_whole = names and len(shapes) == len(names) and sum(rows for rows, _ in shapes) == site.shape[0]
        if is_whole and {columns for _, columns in shapes} == {site.shape[1]}:
            return list(names)
    return []


def _is_any(modules: Sequence[str], parameters: Collection[str]) -> bool:
    return any(f"{module}.weight" in parameters for module in modules)


def _has_weight(model: nn.Module, path: str) -> bool:
    try:
        weight = getattr(_owner(model, path), "weight", None)
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and weight.ndim == 2


def _owner(model: nn.Module, path: str) -> nn.Module:
    module = model.get_submodule(path)
    return module.base_layer if isinstance(module, ReflectedLayer) else module


def _weight(model: nn.Module, path: str) -> Tensor:
    """(o, d)."""
    owner = _owner(model, path)
    weight = owner.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if _is_transposed(owner) else weight.detach()


def _install_(model: nn.Module, path: str, values: Tensor) -> None:
    """Give a module a weight of its own: one that is tied to it keeps the old."""
    owner = _owner(model, path)
    whole = values.T if _is_transposed(owner) else values
    owner.weight = nn.Parameter(whole.contiguous(), requires_grad=False)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' GPT-2 layer, (d, o)


def _compared(matrix: QuantizedMatrix, expected: Tensor, rounding: float) -> tuple[Tensor, float, float]:
    """A matrix dequantized (o, d), by how many steps it is off where it should not be, and its relative error.

    Rounding to the nearest code is off by half a step. Without zero points, the largest code stands for up to half a
    step more: two's complement has no +2^(bits−1).
    """
    values, top = torch.empty(matrix.shape), 2**matrix.bits - 1
    slack = SLACK + top * rounding
    steps = error = size = 0.0
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        part, wanted = matrix.rows(rows), expected[rows].float()
        values[rows] = torch.from_numpy(part.values())
        off = (values[rows] - wanted).abs()
        scales = torch.from_numpy(np.abs(part.scales)).repeat_interleave(matrix.block_size, dim=1)[:, : matrix.columns]
        allowed = torch.full((), 0.5)
        if matrix.zero_points is None:
            codes = torch.from_numpy(part.codes().reshape(len(wanted), -1)[:, : matrix.columns])
            allowed = torch.where(codes == top, 1.0, 0.5)
        broken = ~(off <= scales * (allowed + slack) + top * SMALLEST)
        if broken.any():
            steps = max(steps, float((off / scales)[broken].nan_to_num(nan=math.inf).max()))
        error += float(off.double().square().sum())
        size += float(wanted.double().square().sum())
    return values, steps, math.sqrt(error / size) if size else error


def _shown(findings: Sequence[str], count: int) -> Iterator[str]:
    """A handful, and how many there are."""
    yield from findings[:SHOWN]
    if len(findings) > SHOWN:
        yield f"{len(findings)} of {count} quantized matrices do not hold the weights that they should"


def rounding_cost(exact: Sides, rounded: Sides, exact_base: Sides, rounded_base: Sides | None) -> RoundingCost:
    """What rounding the weights does to PyTorch's own outputs, over all inputs together.

    Args:
        exact: input → output → tensor, of the float model with its adapter.
        rounded: with the dequantized weights.
        exact_base: the float model without its adapter.
        rounded_base: with the dequantized weights; None where the adapter is part of them.
    """
    pairs = [(probe, name) for probe, outputs in exact.items() for name in outputs]
    logits = [(probe, name) for probe, name in pairs if name == "logits"]

    def moved(one: Sides, other: Sides) -> float:
        return math.sqrt(sum(float((one[p][n] - other[p][n]).double().square().sum()) for p, n in pairs))

    def kl(one: Sides, other: Sides) -> float | None:
        found = [mean_kl(one[p][n].double().numpy(), other[p][n].double().numpy()) for p, n in logits]
        return float(np.mean(found)) if found else None

    effect = moved(exact, exact_base)
    return RoundingCost(
        effect=moved(rounded, exact) / effect if effect else math.inf,
        kl=kl(exact, rounded),
        base_effect=None if rounded_base is None or not effect else moved(rounded_base, exact_base) / effect,
        base_kl=None if rounded_base is None else kl(exact_base, rounded_base),
    )


def moved_base(rounded: Sides, exact: Sides, exact_base: Sides) -> dict[str, dict[str, Tensor]]:
    """What stands for the base where the adapter is part of the rounded weights: the adapter's effect, taken off."""
    return {
        probe: {name: tensor - (exact[probe][name] - exact_base[probe][name]) for name, tensor in outputs.items()}
        for probe, outputs in rounded.items()
    }
