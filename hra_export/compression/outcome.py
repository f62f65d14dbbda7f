"""Write a compressed adapter in PEFT's layout, and measure what became of it from the file as written.

The directory appears whole or not at all, with the tokenizer files of the adapter's own directory.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import torch
from torch import Tensor

from hra_export import modelcard, publish
from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.companions import tokenizer_files
from hra_export.compression.components import Deviation
from hra_export.compression.plan import Aspect, CompressedTarget, CompressionPlan
from hra_export.converted import manifest_bytes
from hra_export.filesystem import as_output_error
from hra_export.householder import BlockReflector, compact_wy
from hra_export.publish import MANIFEST_NAME
from hra_export.rotation import padded

# What each error is relative to, in words.
ERROR_OF: dict[Aspect, str] = {
    "rotation": "rotation",
    "weights": "change of the weights",
    "outputs": "change of outputs",
}


@dataclass(frozen=True)
class CompressionReport:
    """What was written.

    Attributes:
        plan: that was carried out.
        output: the directory.
        size_bytes: of its files.
        achieved: aspect → relative error over all targets, recomputed from the vectors in the file.
    """

    plan: CompressionPlan
    output: Path
    size_bytes: int
    achieved: Mapping[Aspect, float]

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        written = {"output": str(self.output), "size_bytes": self.size_bytes, "achieved": dict(self.achieved)}
        return {**self.plan.to_json(), **written}


def compress_adapter(plan: CompressionPlan, output: Path, *, overwrite: bool = False) -> CompressionReport:
    """Write what was planned.

    Args:
        plan: from `plan_compression`.
        output: the directory; see `publish.check_output`.
        overwrite: replace an output that hra-export wrote.

    Raises:
        OutputError: refused, or the file system said no.
        NumericalError: float32 cannot hold a vector.
    """
    with as_output_error(f"write to the temporary folder `{gettempdir()}`"), TemporaryDirectory() as folder:
        made = Path(folder, "adapter")
        write_adapter(_compressed(plan), made)
        written = read_adapter(made)
        achieved = _achieved(plan, written)
        files = {path.name: path.read_bytes() for path in sorted(made.iterdir())}
    files |= {name: path.read_bytes() for name, path in tokenizer_files(plan.adapter.path).items()}
    files["README.md"] = _card(plan, achieved, output.name).encode(errors="replace")
    manifest = _manifest(plan, written, achieved)
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(files.items())))
    size_bytes = sum(map(len, files.values())) + len(manifest)
    protected = [path for path in (plan.adapter.path, plan.base.root if plan.base else None) if path is not None]
    with publish.stage(
        output, key=digest.hexdigest(), size_bytes=size_bytes, overwrite=overwrite, protected=protected
    ) as stage:
        for name, data in sorted(files.items()):
            stage.write_bytes(name, data)
        stage.publish(MANIFEST_NAME, manifest)
    return CompressionReport(plan, output, size_bytes, achieved)


def _compressed(plan: CompressionPlan) -> HraAdapter:
    """The adapter with its new chains, filled up to one rank; what it brings beside them stays."""
    chains = {target.module: padded(target.vectors(), plan.rank) for target in plan.kept}
    return replace(plan.adapter, chains=chains, rank=plan.rank, orthogonalize=False, path=None, digest="", origin=None)


def _achieved(plan: CompressionPlan, written: HraAdapter) -> dict[Aspect, float]:
    totals = dict.fromkeys(plan.aspects, Deviation())
    for target in plan.targets:
        before = plan.adapter.reflector(target.module)
        after = written.chains.get(target.module)
        for aspect, deviation in _deviations(target, before, after).items():
            totals[aspect] += deviation
    return {aspect: total.relative for aspect, total in totals.items()}


def _deviations(target: CompressedTarget, before: BlockReflector, after: Tensor | None) -> dict[Aspect, Deviation]:
    """R as the adapter has it against R' of the stored vectors (d, r'), None for the identity."""
    reflectors = [before] if after is None else [before, compact_wy(after)]
    span = torch.linalg.qr(torch.cat([each.u for each in reflectors], dim=1)).Q  # (d, r + r'), or (d, d)
    cores = [_core(each, span) for each in reflectors]
    whole, change = cores[0], (cores[1] if len(cores) > 1 else torch.zeros_like(cores[0])) - cores[0]
    found: dict[Aspect, Deviation] = {"rotation": Deviation(_squared(change), _squared(whole))}
    if target.weight is not None:
        image = torch.linalg.qr(target.weight.times(span)).R
        found["weights"] = Deviation(_squared(image @ change), _squared(image @ whole))
    if "outputs" in target.measures:
        turn, measure = target.parts.rotation.basis.T @ span, target.measures["outputs"]
        found["outputs"] = Deviation(*(measure.squared(turn @ each @ turn.T) for each in (change, whole)))
    return found


def _core(reflector: BlockReflector, span: Tensor) -> Tensor:
    """R − I in coordinates of a basis (d, n) that spans its vectors."""
    inside = span.T @ reflector.u
    return -(inside @ reflector.t @ inside.T)


def _squared(values: Tensor) -> float:
    return float(values.square().sum())


def _manifest(plan: CompressionPlan, written: HraAdapter, achieved: Mapping[Aspect, float]) -> bytes:
    asked, value = plan.asked
    base = None if plan.base is None else {"name": plan.base.root.name, "fingerprint": plan.base.fingerprint()}
    content = {
        "base": base,
        "sources": plan.adapter.entries(),
        "adapter": {
            "digest": written.digest,
            "rank": written.rank,
            "apply_GS": written.orthogonalize,
            "targets": len(written.chains),
            "parameters": len(written.parameters),
        },
        "compression": {
            asked: value,
            "by": plan.by,
            "calibration": None if plan.calibration is None else plan.calibration.digest,
            "predicted": plan.predicted,
            "achieved": dict(achieved),
            "ranks": {target.module: target.rank for target in plan.targets},
        },
    }
    return manifest_bytes("adapter", content)


def _card(plan: CompressionPlan, achieved: Mapping[Aspect, float], name: str) -> str:
    """README.md: what it was made of, and how far it is from that."""
    front = modelcard.adapter_front_matter(plan.adapter.base, {"library_name": "peft", "tags": ["hra"]})
    source = plan.adapter.path.name if plan.adapter.path is not None else "adapter"
    errors = ", ".join(f"{error:.2%} of the {ERROR_OF[aspect]}" for aspect, error in achieved.items())
    return (
        f"{front}# {name}, an HRA adapter\n\n"
        f"The Householder reflections of `{source}`, {plan.adapter.rank} for each target, in at most {plan.rank}. "
        f"It is off by {errors}.\n\n"
        "`hra_export_manifest.json` says how many each target keeps. Made with `hra-export compress`.\n"
    )
