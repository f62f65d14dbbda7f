"""Fold error: how many stored elements differ from the float64 reference, by storage dtype and method.

    python -m benchmarks.fold_error

"fold" is `hra-export merge`: float64 arithmetic on W − (W U T) Uᵀ, rounded once. "dense" is PEFT's way: H built as a
matrix in float32 (or in the storage dtype, as under `autocast_adapter_dtype=False`), W multiplied by it, then rounded.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import report
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import open_checkpoint
from hra_export.merge import merge_checkpoint
from hra_export.planning import plan_merge

FEATURES, OUT, RANK = 2048, 2048, 8


def main() -> None:
    """Run the benchmark."""
    rows, data = [], {}
    for angle in (0.5, 0.05, 0.005):
        vectors = _pairs(angle)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            torch.manual_seed(0)
            weight = (torch.randn(OUT, FEATURES) * 0.02).to(dtype)
            exact = weight.double() @ _dense(vectors.double())
            methods = {"fold": _merged(weight, vectors), "dense float32": (weight.float() @ _dense(vectors)).to(dtype)}
            if dtype != torch.float32:
                methods[f"dense {str(dtype)[6:]}"] = weight @ _dense(vectors.to(dtype))
            for method, stored in methods.items():
                figures = _figures(stored, exact, weight)
                rows.append([str(dtype)[6:], f"{angle}", method, *(f"{value:.4g}" for value in figures.values())])
                data[f"{dtype}, {angle}, {method}"] = figures
    header = ["stored as", "pair angle", "method", "elements that differ %", "largest, in ulp", "error of ΔW %"]
    report("fold_error", header, rows, {"figures": data, "shape": [OUT, FEATURES], "rank": RANK})


def _pairs(angle: float) -> Tensor:
    """r vectors (d, r) in pairs that enclose `angle` radians."""
    generator = torch.Generator().manual_seed(4)
    first, other = (torch.linalg.qr(torch.randn(FEATURES, RANK // 2, generator=generator)).Q for _ in range(2))
    turned = torch.cos(torch.tensor(angle)) * first + torch.sin(torch.tensor(angle)) * _orthogonal_to(other, first)
    return torch.stack([first, turned], dim=2).reshape(FEATURES, RANK)


def _orthogonal_to(vectors: Tensor, units: Tensor) -> Tensor:
    parts = vectors - units * (vectors * units).sum(0)
    return parts / parts.norm(dim=0)


def _dense(vectors: Tensor) -> Tensor:
    """H_1 … H_r as PEFT multiplies it out, in the vectors' dtype."""
    product = torch.eye(vectors.shape[0], dtype=vectors.dtype)
    for u in (vectors / vectors.norm(dim=0)).T:
        product = product - 2 * (product @ u[:, None]) @ u[None]
    return product


def _merged(weight: Tensor, vectors: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        save_file({"proj.weight": weight}, base / "model.safetensors")
        plan = plan_merge(open_checkpoint(base), [HraAdapter({"proj": vectors}, rank=RANK)])
        merge_checkpoint(plan, Path(folder, "merged"))
        return load_file(Path(folder, "merged", "model.safetensors"))["proj.weight"]


def _figures(stored: Tensor, exact: Tensor, weight: Tensor) -> dict[str, float]:
    rounded = exact.to(stored.dtype)
    steps = (_ordered_bits(stored) - _ordered_bits(rounded)).abs()
    error = (stored.double() - exact).norm() / (exact - weight.double()).norm()
    return {
        "differ_percent": 100 * float((steps > 0).double().mean()),
        "largest_ulp": float(steps.max()),
        "delta_error_percent": 100 * float(error),
    }


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of the floats, one apart for neighbours."""
    kind = torch.int32 if values.element_size() == 4 else torch.int16
    bits = values.view(kind).long()
    return torch.where(bits < 0, -(bits & (2 ** (8 * values.element_size() - 1) - 1)), bits)


if __name__ == "__main__":
    main()
