"""Layer by layer: what every product and lookup gives on both sides, so that the first departure shows.

The order is the one in which PyTorch runs them.

Limits: one input, without padding; only layers that run once and that the graph tells by name. Fused operators that
swallow a product hide it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hra_export import parity
from hra_export.graph.native import Operator
from hra_export.graph.variants import Tap, make_variant, tap_
from hra_export.layer import ReflectedLayer
from hra_export.parity import OutputParity
from hra_export.validation.candidates import GraphCandidate
from hra_export.validation.feeding import runs_of
from hra_export.validation.graph_probes import GraphProbe
from hra_export.validation.job import Array, Job
from hra_export.validation.process import run_job
from hra_export.validation.reference import Reference

Seen = dict[str, Tensor]


def compare_layers(
    reference: Reference,
    candidate: GraphCandidate,
    probes: Sequence[GraphProbe],
    *,
    provider: str,
    adapters: Mapping[str, Path],
    timeout: float,
    operator: Operator = "auto",
) -> tuple[list[OutputParity], list[str]]:
    """Measure every layer that can be found on both sides.

    Args:
        reference: PyTorch.
        candidate: whose main graph is looked into; a copy of it gets the further outputs.
        probes: the largest of them without padding is used.
        provider: to run on.
        adapters: to switch on in swappable graphs, by role.
        timeout: seconds for the child.
        operator: library with kernels for the reflections, `auto` for the one that is found, None for none.

    Returns:
        The measures in the order the layers run in PyTorch, and why some are missing.
    """
    probe = max(probes, key=_size)  # the first of the largest
    adapted, base = _outputs(reference, probe)
    with tempfile.TemporaryDirectory(prefix="hra-export-layers-") as folder:
        taps: list[Tap] = []
        path = make_variant(candidate.main.path, Path(folder), lambda model: taps.extend(tap_(model, list(adapted))))
        if not taps:
            return [], ["the graph does not say which of its nodes belong to which layer"]
        graphs = {role: graph.path for role, graph in candidate.graphs.items()} | {candidate.main_role: path}
        run = runs_of(candidate, probe, further=[tap.output for tap in taps])[0]
        ending = run_job(Job(graphs, provider, [run], adapters, operator=operator), timeout=timeout)
    if ending.failure is not None or ending.answers[run.name].error is not None:
        return [], [f"layers could not be compared: {ending.failure or ending.answers[run.name].error}"]
    found = ending.answers[run.name].outputs[-1]
    measured = _measured(reference, taps, found, adapted, base)
    missing = len(adapted) - len(measured)
    return measured, [f"{missing} of {len(adapted)} layers cannot be told apart in the graph"] if missing else []


def _measured(
    reference: Reference, taps: Sequence[Tap], found: Mapping[str, Array], adapted: Seen, base: Seen
) -> list[OutputParity]:
    by_path = {tap.path: tap for tap in taps}
    measured = []
    for path, tensor in adapted.items():
        tap = by_path.get(path)
        if tap is None or tap.output not in found:
            continue
        bias = getattr(reference.model.get_submodule(path), "bias", None)
        shift = bias.detach() if isinstance(bias, Tensor) and not tap.has_bias else torch.zeros(())
        if tensor.ndim == 4 and shift.ndim:
            shift = shift[:, None, None]
        ref, origin = ((each - shift).numpy() for each in (tensor, base[path]))
        if found[tap.output].size == ref.size:
            measured.append(parity.compare(path, ref, found[tap.output].reshape(ref.shape), origin, logits=False))
    return measured


def _outputs(reference: Reference, probe: GraphProbe) -> tuple[Seen, Seen]:
    """What layers give with the adapter and without it, in the order they run."""
    paths = [
        path
        for path, module in reference.model.named_modules()
        if _carries_chains(module) and not path.endswith(".base_layer")
    ]
    adapted = _seen(reference, paths, probe)
    with reference.without_adapter():
        return adapted, _seen(reference, paths, probe)


def _carries_chains(module: nn.Module) -> bool:
    """Whether HRA is defined for this kind of layer, or at work in it."""
    known = (nn.Linear, nn.Conv2d, nn.Embedding, ReflectedLayer)
    return isinstance(module, known) or type(module).__name__ == "Conv1D"


def _seen(reference: Reference, paths: Sequence[str], probe: GraphProbe) -> Seen:
    """Outputs of the modules that run exactly once."""
    seen: dict[str, list[Tensor]] = {}
    with reference.watched(paths, lambda path, output: seen.setdefault(path, []).append(output)):
        reference.run(probe.inputs)
    return {path: outputs[0] for path, outputs in seen.items() if len(outputs) == 1}


def _size(probe: GraphProbe) -> int:
    is_padded = probe.mask is not None and not bool(probe.mask.all())
    return -1 if is_padded else sum(tensor.numel() for tensor in probe.inputs.values())
