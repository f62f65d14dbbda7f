"""HRA → HRA: several adapters as one, and adapters at another strength, as a directory of PEFT.

Composition is exact to the bit: the chains stand one behind another as they were stored. What is computed, R^t and the
columns of Gram–Schmidt chains, is rounded once to float32, and the report says what that costs.

Limits: those of `composition.py` and `strength.py`. Nearly parallel vectors in float32 hold an angle of 0.005 rad to
five digits.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from hra_export import modelcard, publish
from hra_export.adapter import HraAdapter, adapter_files
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.companions import tokenizer_files
from hra_export.composition import composed, idle, rounded_to_float32, uniform
from hra_export.converted import HRA_FORMAT, ConvertedTarget, ConvertReport, manifest_bytes
from hra_export.errors import ConversionError
from hra_export.strength import Interpolation, take_strength


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
    targets = tuple(
        ConvertedTarget(module, product.rank, norm, error)
        for module, (norm, error) in rounded_to_float32(product).items()
    )
    tokenizer = {name: path for source in product.sources for name, path in tokenizer_files(source.path).items()}
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
        report = ConvertReport(HRA_FORMAT, output, size, targets, notes, quantity="R − I")
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


def _clause(product: HraAdapter, strength: float) -> str:
    composition = "one behind another" if len(product.sources) > 1 else "unchanged"
    return composition if strength == 1 else f"their product at strength {strength:g} (that part of every angle)"


def _manifest(product: HraAdapter, report: ConvertReport, strength: float, interpolation: str) -> bytes:
    content = {
        "format": report.format,
        "adapters": [source.entry() for source in product.sources],
        "strength": strength,
        "interpolation": interpolation,
        "rank": product.rank,
        "apply_GS": product.orthogonalize,
        **report.measured(),
    }
    return manifest_bytes("adapter", content)
