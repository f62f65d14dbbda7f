"""What a conversion wrote: values only, for the command line and for manifests."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SCHEMA_VERSION = 1
# How reports call an HRA adapter, whatever it was made of.
HRA_FORMAT = "HRA of PEFT"


@dataclass(frozen=True)
class ConvertedTarget:
    """One target in the output.

    Attributes:
        rank: in the output; 0 when it was left out.
        delta_norm: ‖ΔW‖_F that was asked for.
        error: ‖ΔW written − ΔW‖ / ‖ΔW‖, 0 where there is no ΔW.
    """

    module: str
    rank: int
    delta_norm: float
    error: float


@dataclass(frozen=True)
class ConvertReport:
    """A finished conversion.

    Attributes:
        format: of the output, in words a user knows: `LoRA of PEFT`.
        notes: what a user should know about it, one sentence each.
        floor: the error that no output of this format could go below, where the format cannot express every ΔW.
        quantity: what norms and errors are of: `R − I` where no base is read.
    """

    format: str
    output: Path
    size_bytes: int
    targets: tuple[ConvertedTarget, ...]
    notes: tuple[str, ...] = ()
    floor: float | None = None
    quantity: str = "ΔW"

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F over all targets."""
        return math.sqrt(sum(target.delta_norm**2 for target in self.targets))

    @property
    def error(self) -> float:
        """Relative error of ΔW over all targets."""
        lost = math.sqrt(sum((target.error * target.delta_norm) ** 2 for target in self.targets))
        return lost / self.delta_norm if self.delta_norm else 0.0

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank of a target."""
        ranks = [target.rank for target in self.targets] or [0]
        return min(ranks), max(ranks)

    def measured(self) -> dict[str, object]:
        """What manifests say of any conversion: `notes`, `totals`, and the figures of each of `targets`."""
        return {
            "notes": list(self.notes),
            "totals": {"size_bytes": self.size_bytes, "delta_norm": self.delta_norm, "error": self.error},
            "targets": {
                target.module: {"rank": target.rank, "delta_norm": target.delta_norm, "error": target.error}
                for target in self.targets
            },
        }


def manifest_bytes(kind: str, content: Mapping[str, object]) -> bytes:
    """The manifest of an output, as UTF-8. No times and no machine: equal inputs, equal bytes.

    Args:
        kind: of the output: `adapter`, `lora`.
        content: what stands behind its schema, kind and tool.
    """
    tool = {"name": "hra-export", "version": metadata.version("hra-export")}
    manifest = {"schema_version": SCHEMA_VERSION, "kind": kind, "tool": tool, **content}
    # A name on disk may hold bytes that are no UTF-8.
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(errors="replace")
