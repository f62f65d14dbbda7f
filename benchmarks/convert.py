"""Converting to LoRA: what becomes of ΔW, and what it costs, beside naive factors and beside PEFT's conversion by SVD.

    python -m benchmarks.convert [--work DIR] [--rounds 3] [--peft-rounds 1] [--only error|NAME]

Errors of ΔW by dtype and angle between the vectors of a pair, against the explicit chain in float64. "naive" rounds
B = −(W U) T and A = Uᵀ as they are. "PEFT SVD" is `peft.tuners.lora.conversion` on the same ΔW in the same dtype.
Times and memory are those of whole processes, start of Python included: read base and adapter, write a LoRA of the
same rank in float32. PEFT refuses HRA; here its layers are given the ΔW that its conversion asks for.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import Contender, Run, as_data, interleave, median, report, say, work_folder
from benchmarks.merge import RANK, Shape, make_checkpoint
from hra_export.adapter import HraAdapter, read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.householder import low_rank_factors
from hra_export.low_rank import HraSource, locate
from hra_export.registry import load_converter

# What must hold at every angle, as a share of ‖ΔW‖.
BARS = {"float32": 1e-6, "bfloat16": 5e-3}
ANGLES = (0.5, 0.05, 0.005)
DTYPES = ("float32", "bfloat16", "float16")
WIDTH = 1024
# PEFT takes minutes for each layer of 4096.
SHAPES = {"d2048": Shape(2048, 5632, 2), "d4096": Shape(4096, 11008, 1)}

OURS = """
import sys
from pathlib import Path
from hra_export.adapter import read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.low_rank import HraSource
from hra_export.registry import load_converter
base, adapter, output = map(Path, sys.argv[1:])
load_converter("to_lora").convert(HraSource([read_adapter(adapter)]), output, base=open_checkpoint(base))
"""
PEFT = """
import sys
from peft import PeftModel
from peft.tuners.hra.layer import HRALinear
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModelForCausalLM
rotation = HRALinear.get_delta_weight
def delta(self, adapter_name):
    weight = self.get_base_layer().weight.float()
    return weight @ rotation(self, adapter_name).float() - weight
HRALinear.get_delta_weight = delta
HRALinear.supports_lora_conversion = lambda self, adapter_name="default": True
base, adapter, output, rank = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, torch_dtype="auto"), adapter)
save_as_lora(output, model, rank=int(rank))
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoints are made; deleted afterwards if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft-rounds", type=int, default=1, help="PEFT takes minutes at d = 4096")
    parser.add_argument("--only", choices=["error", "smollm2", *SHAPES])
    arguments = parser.parse_args()
    if arguments.only in (None, "error"):
        report_errors()
    if arguments.only == "error":
        return
    names = [arguments.only] if arguments.only else ["smollm2", *SHAPES]
    rounds = {"ours": arguments.rounds, "peft": arguments.peft_rounds}
    with work_folder(arguments.work) as work:
        measured = {name: measure_cost(name, SHAPES.get(name), work, rounds) for name in names}
    header = ["checkpoint", "ours", "PEFT SVD", "PEFT / ours", "peak MB", "PEFT peak MB", "error of ΔW", "PEFT's error"]
    report("convert", header, [row for row, _ in measured.values()], {"runs": {n: d for n, (_, d) in measured.items()}})


def report_errors() -> None:
    """The table of errors by dtype, angle and method."""
    found = measure_errors(WIDTH)
    methods = list(next(iter(found.values())))
    rows = [[*key.split(), *(f"{errors[method]:.2g}" for method in methods)] for key, errors in found.items()]
    data = {"errors": found, "width": WIDTH, "rank": RANK, "bars": BARS}
    report("convert_error", ["dtype", "pair angle", *methods], rows, data)


def measure_errors(width: int) -> dict[str, dict[str, float]]:
    """`dtype angle` → method → ‖ΔW in the file − ΔW‖ / ‖ΔW‖."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator) * 0.02
    found = {}
    for angle in ANGLES:
        adapter = HraAdapter({"proj": _pairs(width, angle)}, rank=RANK)
        exact = weight.double() @ _dense_chain(adapter.chains["proj"].double()) - weight.double()
        for dtype in DTYPES:
            methods: dict[str, Callable[[HraAdapter, Tensor, Tensor, str], Tensor]] = {
                "balanced (ours)": _ours,
                "naive": _naive,
                "PEFT SVD": _peft,
            }
            found[f"{dtype} {angle}"] = {
                name: float((method(adapter, weight, exact, dtype) - exact).norm() / exact.norm())
                for name, method in methods.items()
            }
    return dict(sorted(found.items(), key=lambda entry: DTYPES.index(entry[0].split()[0])))


def measure_cost(
    name: str, shape: Shape | None, work: Path, rounds: Mapping[str, int]
) -> tuple[list[str], dict[str, object]]:
    """A row of the table of costs, and its runs.

    Args:
        name: of the checkpoint.
        shape: None for SmolLM2.
        work: where the checkpoint is made.
        rounds: of each contender.
    """
    say(f"{name}:")
    base, adapter, output = work / name / "base", work / name / "adapter", work / name / "output"
    if not adapter.exists():
        # In a process of its own: the system counts what a parent held into the peak of its children.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            apart.submit(make_checkpoint, shape, base, adapter).result()
    errors = {}

    def clear() -> None:
        shutil.rmtree(output, ignore_errors=True)

    paths = [str(base), str(adapter), str(output)]
    contenders = {
        "ours": Contender("ours", [sys.executable, "-c", OURS, *paths], clear),
        "peft": Contender("peft", [sys.executable, "-c", PEFT, *paths, str(RANK)], clear),
    }
    runs: dict[str, list[Run]] = {}
    for key, contender in contenders.items():
        runs |= interleave([contender], rounds[key])
        errors[key] = file_error(base, adapter, output)
    clear()
    wall = {key: median(each) for key, each in runs.items()}
    row = [
        name,
        *(f"{wall[key]:.2f} s" for key in runs),
        f"{wall['peft'] / wall['ours']:.1f}",
        *(f"{median(runs[key], 'peak_bytes') / 1e6:.0f}" for key in runs),
        *(f"{errors[key]:.2g}" for key in runs),
    ]
    return row, {**as_data(runs), "errors": errors}


def file_error(base: Path, adapter: Path, output: Path) -> float:
    """‖ΔW in a file − ΔW‖ / ‖ΔW‖ over all targets; both are thin products, so no matrix of W's size is made."""
    source = HraSource([read_adapter(adapter)])
    stored = load_file(output / "adapter_model.safetensors")
    lost = whole = 0.0
    for module, weight in locate(source, open_checkpoint(base)).items():
        left, right = source.factors(weight)
        b, a = (stored[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "BA")
        lost += _norm(torch.cat([b, -left], dim=1), torch.cat([a, right])) ** 2
        whole += _norm(left, right) ** 2
    return float((lost / whole) ** 0.5)


def _norm(left: Tensor, right: Tensor) -> float:
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())


def _ours(adapter: HraAdapter, weight: Tensor, _: Tensor, dtype: str) -> Tensor:
    """Through the converter and its file."""
    with TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        save_file({"proj.weight": weight}, base / "model.safetensors")
        output = Path(folder, "lora")
        load_converter("to_lora").convert(HraSource([adapter]), output, base=open_checkpoint(base), dtype=dtype)
        stored = load_file(output / "adapter_model.safetensors")
    b, a = (stored[f"base_model.model.proj.lora_{letter}.weight"].double() for letter in "BA")
    return b @ a


def _naive(adapter: HraAdapter, weight: Tensor, _: Tensor, dtype: str) -> Tensor:
    b, a = low_rank_factors(weight.double(), adapter.reflector("proj"))
    kind = getattr(torch, dtype)
    return b.to(kind).double() @ a.to(kind).double()


def _peft(_: HraAdapter, __: Tensor, exact: Tensor, dtype: str) -> Tensor:
    """PEFT's own function on a layer that answers with this ΔW."""
    from peft.tuners.lora.conversion import _convert_module_to_lora

    class Layer:
        def get_delta_weight(self, _: str) -> Tensor:
            return exact.to(getattr(torch, dtype))

        def get_base_layer(self) -> torch.nn.Linear:
            return torch.nn.Linear(1, 1)  # asked for its kind only

    layer: Any = Layer()
    a, b, _rank = _convert_module_to_lora(layer, RANK)
    return b.double() @ a.double()


def _pairs(d: int, angle: float) -> Tensor:
    """Vectors (d, r) in pairs that enclose `angle` radians."""
    generator = torch.Generator().manual_seed(4)
    first, other = (torch.linalg.qr(torch.randn(d, RANK // 2, generator=generator)).Q for _ in range(2))
    other = torch.nn.functional.normalize(other - first * (first * other).sum(0), dim=0)
    turned = torch.cos(torch.tensor(angle)) * first + torch.sin(torch.tensor(angle)) * other
    return torch.stack([first, turned], dim=2).reshape(d, RANK)


def _dense_chain(vectors: Tensor) -> Tensor:
    """H_1 … H_r, one reflection after the other."""
    product = torch.eye(vectors.shape[0], dtype=vectors.dtype)
    for u in (vectors / vectors.norm(dim=0)).T:
        product -= 2 * torch.outer(product @ u, u)
    return product


if __name__ == "__main__":
    main()
