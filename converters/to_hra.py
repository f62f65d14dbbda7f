"""HRA → HRA: several adapters as one, and adapters at another strength, as a directory of PEFT.

Composition is exact to the bit: the chains stand one behind another as they were stored. What is computed, R^t and the
columns of Gram–Schmidt chains, is rounded once to float32, and the report says what that costs.

Limits: those of `composition.py` and `strength.py`. Nearly parallel vectors in float32 hold an angle of 0.005 rad to
five digits.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from hra_export import householder, modelcard, publish
from hra_export.adapter import HraAdapter, adapter_files
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.companions import TOKENIZER_FILES
from hra_export.composition import composed, idle, reflectors, uniform
from hra_export.converted import ConvertedTarget, ConvertReport
from hra_export.errors import ConversionError
from hra_export.strength import Interpolation, take_strength

FORMAT = "HRA of PEFT"
# ‖R − I‖ that is rounding alone: pairs of equal vectors, in float64.
NOISE = 1e-12


def convert(
    adapters: Sequence[HraAdapter],
    output: Path,
    *,
    strength: float = 1.0,
    interpolation: Interpolation = "geodesic",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write (R_1 R_2 …)^t as one adapter directory that PEFT loads.

    The output path is absent, the old directory, or complete at every instant.

    Args:
        adapters: composed in the order given.
        output: directory to be made.
        strength: t.
        interpolation: linear only at 0 and 1: what lies between is no rotation.
        overwrite: replace an earlier output of ours.
        progress: called with the bytes of each file written.

    Returns:
        Of each target its rank, ‖R − I‖_F in place of ‖ΔW‖, which takes a base, and the relative error of R − I.

    Raises:
        ConversionError: no HRA adapter is this product at this strength; all targets.
        MismatchError: the adapters are not for one model; all findings.
        NumericalError: chains that cannot be computed; all of them. Nothing is written.
        OutputError: the output exists, the disk is full or cannot be written.
        ValueError: the strength is not finite.
    """
    product, notes = plan_product(adapters, strength=strength, interpolation=interpolation)
    targets = _measured(product)
    tokenizer = _tokenizer_files(product)
    card = modelcard.adapter_card(product, _clause(product, strength))
    files = {**adapter_files(product), "README.md": card.encode(errors="replace")}
    size = sum(map(len, files.values())) + sum(path.stat().st_size for path in tokenizer.values())
    protected = [source.path for source in product.sources if source.path is not None]
    key = hashlib.sha256(b"".join(files.values())).hexdigest()
    with publish.stage(output, key=key, size_bytes=size, overwrite=overwrite, protected=protected) as stage:
        for name, data in files.items():
            stage.write_bytes(name, data)
            if progress is not None:
                progress(len(data))
        for name, path in tokenizer.items():
            stage.copy(path, name)
        report = ConvertReport(FORMAT, output, size, targets, notes, quantity="R − I")
        stage.publish(MANIFEST_NAME, _manifest(product, report, strength, interpolation))
    return report


def plan_product(
    adapters: Sequence[HraAdapter], *, strength: float = 1.0, interpolation: Interpolation = "geodesic"
) -> tuple[HraAdapter, tuple[str, ...]]:
    """The adapter that would be written, and what a user should know about it.

    Raises:
        as `convert`, which writes it.
    """
    taken = take_strength(adapters, strength, interpolation)
    if taken.linear not in (0, 1):
        raise ConversionError(
            f"a part of ΔW, {taken.linear:g}, is no rotation: no HRA adapter stands for it",
            hint="`--interpolation geodesic` stays a rotation; `--to lora` takes any part of ΔW",
        )
    product = uniform(composed(taken.adapters) if taken.linear else idle(taken.adapters))
    bases = sorted({source.base for source in product.sources if source.base})
    notes = taken.notes
    if len(bases) > 1:
        notes = (*notes, f"the adapters name their base differently ({', '.join(bases)}); the first name is written")
    return product, notes


def _measured(product: HraAdapter) -> tuple[ConvertedTarget, ...]:
    """What float32 costs of R − I, target by target."""
    chains = {module: vectors.to(torch.float32) for module, vectors in product.chains.items()}
    written = reflectors([replace(product, chains=chains)])
    found = []
    for module, exact in reflectors([product]).items():
        norm, is_as_read = householder.distance(exact), torch.equal(chains[module], product.chains[module])
        error = 0.0 if is_as_read or norm < NOISE else householder.distance(written[module], exact) / norm
        found.append(ConvertedTarget(module, product.rank, norm, error))
    return tuple(found)


def _clause(product: HraAdapter, strength: float) -> str:
    composition = "one behind another" if len(product.sources) > 1 else "unchanged"
    return composition if strength == 1 else f"their product at strength {strength:g} (that part of every angle)"


def _tokenizer_files(product: HraAdapter) -> dict[str, Path]:
    """The adapters' own tokenizer files, those of the last that has them."""
    paths = [source.path / name for source in product.sources if source.path for name in TOKENIZER_FILES]
    return {path.name: path for path in paths if path.is_file()}


def _manifest(product: HraAdapter, report: ConvertReport, strength: float, interpolation: str) -> bytes:
    """What was done. No times and no machine: equal inputs, equal bytes."""
    manifest = {
        "schema_version": 1,
        "kind": "adapter",
        "tool": {"name": "hra-export", "version": metadata.version("hra-export")},
        "format": report.format,
        "adapters": [source.entry() for source in product.sources],
        "strength": strength,
        "interpolation": interpolation,
        "rank": product.rank,
        "apply_GS": product.orthogonalize,
        "notes": list(report.notes),
        "totals": {"size_bytes": report.size_bytes, "delta_norm": report.delta_norm, "error": report.error},
        "targets": {
            target.module: {"rank": target.rank, "delta_norm": target.delta_norm, "error": target.error}
            for target in report.targets
        },
    }
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(errors="replace")
