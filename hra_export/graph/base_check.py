"""Is a graph of this base? Its weights say so, where they are plain constants.

A few rows of each weight are compared, so that a graph of many GB is checked in the time it takes to open it.

Letters: d in_features, o out_features.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from hra_export.checkpoint import Checkpoint
from hra_export.errors import MismatchError
from hra_export.graph.lora_products import as_multiplied
from hra_export.graph.matching import SiteIndex, spellings
from hra_export.graph.sites import Weight, sites_of
from hra_export.low_rank import DeltaSource, locate
from hra_export.target_weights import TargetWeight

BASE_KEY = "hra.base"
ROWS = 8
# bfloat16 rounds to 2⁻⁹, and a graph may have been rounded twice; the weights of another model are off by about 1.
TOLERANCE = 2**-6


def check_base(
    source: DeltaSource, models: Sequence[ir.Model], base: Checkpoint, renamed: Mapping[str, str]
) -> tuple[str, ...]:
    """See to it that graphs and adapter are of this base.

    Args:
        source: the adapter.
        models: graphs of one model.
        base: as opened by `open_checkpoint`.
        renamed: target → what the graphs call it, where they differ.

    Returns:
        What a user should know, when some could not be compared.

    Raises:
        MismatchError: the graphs hold other weights, or the adapter does not fit the base; all findings.
        UnsupportedModelError: as `locate`.
    """
    weights = locate(source, base)
    if base.fingerprint() in {model.metadata_props.get(BASE_KEY) for model in models}:
        return ()
    indexes = [SiteIndex(sites_of(model)) for model in models]
    found = {module: _weight(renamed.get(module, module), indexes) for module in weights}
    return refuse_other_base(base, weights, found)


def refuse_other_base(
    base: Checkpoint, weights: Mapping[str, TargetWeight], found: Mapping[str, Weight | None]
) -> tuple[str, ...]:
    """Compare the weights of a base with those of a graph, as a product takes them.

    Args:
        base: that the weights are of.
        weights: module path → W (o, d) on disk.
        found: module path → W (d, o) in the graph, None where it is no plain constant.

    Returns:
        What a user should know, when some could not be compared.

    Raises:
        MismatchError: they differ; all findings.
    """
    findings = [
        f"{module}: {text}"
        for module, theirs in found.items()
        if theirs is not None and (text := _difference(weights[module], theirs)) is not None
    ]
    if findings:
        raise MismatchError(
            f"the graph is not of base `{base.root}`: {len(findings)} weights differ",
            findings=findings,
            hint="pass the base that the graph was exported from: an adapter belongs to one base",
        )
    unknown = sum(theirs is None for theirs in found.values())
    if not unknown:
        return ()
    return (f"{unknown} of {len(found)} weights of the graph are quantized or unnamed: whose they are was not checked",)


def _weight(module: str, indexes: Sequence[SiteIndex]) -> Weight | None:
    """W (d, o) of the one product that goes by a module's name, or by that of the layer inside a live one."""
    names = [each for name in spellings(module) for each in (name, f"{name}.base_layer")]
    for index in indexes:
        for name in names:
            sites = index.find(name)
            if len(sites) == 1 and sites[0].kind == "product" and sites[0].weight is not None:
                return as_multiplied(sites[0].weight, sites[0].node) if sites[0].weight.is_plain else None
    return None


def _difference(ours: TargetWeight, theirs: Weight) -> str | None:
    o, d = ours.shape
    if theirs.shape != (d, o):
        return f"expected a weight of {o} rows and {d} columns, the graph has {theirs.shape[1]} and {theirs.shape[0]}"
    rows = torch.linspace(0, o - 1, min(ROWS, o)).long()
    expected = ours.matrix()[rows].double()
    got = torch.from_numpy(theirs.array()[:, rows.numpy()].astype("float64")).T
    lost = float((got - expected).norm() / expected.norm()) if expected.any() else float(got.norm())
    return None if lost <= TOLERANCE else f"its weight is off by {lost:.2g}"
