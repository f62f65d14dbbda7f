"""The least that a reflection costs on a GPU, computed from data sheets: a table, and a picture for the guide.

    python -m benchmarks.floors [--plot docs/images/floors.png]

Nothing is measured here; `benchmarks/reflect_gpu.py` puts measured times beside the floors of the machine it runs on.
"""

import argparse
from pathlib import Path

from benchmarks import roofline
from benchmarks.harness import report, say
from benchmarks.roofline import DATA_SHEETS, H100, Machine, Shape, Work

WIDTHS = (2048, 4096, 8192, 14336)
ROWS = (1, 16, 64, 512, 4096)
RANKS = (8, 64)
LAYERS, SITES_A_LAYER, GROUPS_A_LAYER = 32, 7, 4  # Llama 3.1 8B; q, k, v and gate, up share their inputs
HEADER = ["device", "d = o", "n", "r", "product µs", "reflection µs", "with launch µs", "of it floor", "÷ product",
          "fused LoRA ÷ product"]  # fmt: skip


def rows_of(machine: Machine) -> list[list[str]]:
    """One row a shape."""
    rows = []
    for width in WIDTHS:
        for n in ROWS:
            for rank in RANKS:
                shape = Shape(n, width, width, rank)
                work = roofline.reflect(shape)
                floor = machine.floor(work, shape.dtype)
                whole = machine.with_launches(work, shape.dtype, recorded=True)
                product = machine.floor(roofline.product(shape), shape.dtype)
                fused = roofline.on_top(machine, roofline.fused_lora(shape), shape)
                figures = [f"{1e6 * each:.2f}" for each in (product, floor, whole)]
                shares = [f"{floor / whole:.0%}", f"{floor / product:.1%}", f"{fused:.1%}"]
                rows.append([machine.name, str(width), str(n), str(rank), *figures, *shares])
    return rows


def decoding(machine: Machine, *, bits: int, nodes: int) -> tuple[float, float]:
    """Seconds of one token through the linear layers of an 8B model, and how much more so many launches a layer cost.

    Args:
        machine: with its time between two kernels of a CUDA graph.
        bits: of a weight.
        nodes: kernels that the reflections of a layer take.
    """
    d, inner, kv = 4096, 14336, 1024
    products = [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]
    shapes = [Shape(1, i, o, 8) for i, o in products]
    works = [roofline.quantized_product(s) if bits == 4 else roofline.product(s) for s in shapes]
    base = LAYERS * sum(machine.with_launches(work, "float16", recorded=True) for work in works)
    extra = Work(sum(roofline.operator(s, rows_cached=True).bytes for s in shapes), 0, nodes)
    return base, LAYERS * machine.with_launches(extra, "float16", recorded=True) / base


def main() -> None:
    """Print the table, store it, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    tokens = {
        f"{machine.name}, {bits} bits, {nodes} launches a layer": decoding(machine, bits=bits, nodes=nodes)
        for machine in DATA_SHEETS
        for bits in (16, 4)
        for nodes in (3 * SITES_A_LAYER, SITES_A_LAYER, GROUPS_A_LAYER)
    }
    for name, (seconds, share) in tokens.items():
        say(f"{name}: {1e6 * seconds:.0f} µs a token, reflections {share:+.1%}")
    report("floors", HEADER, [row for machine in DATA_SHEETS for row in rows_of(machine)], {"decoding": tokens})
    if arguments.plot:
        plot(arguments.plot)


def plot(path: Path) -> None:
    """Floors over the number of rows, d = o = 4096 in half precision, on an H100."""
    from matplotlib.figure import Figure

    counts = [2**i for i in range(14)]
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    field = figure.subplots()

    def curve(label: str, work: str, rank: int, style: str, colour: str, *, launched: bool) -> None:
        shapes = [Shape(n, 4096, 4096, rank) for n in counts]
        works = [getattr(roofline, work)(shape) for shape in shapes]
        seconds = [
            H100.with_launches(each, "float16", recorded=True) if launched else H100.floor(each, "float16")
            for each in works
        ]
        field.plot(counts, [1e6 * each for each in seconds], style, color=colour, label=label)

    curve("product x W, float16", "product", 8, "-", "tab:gray", launched=True)
    curve("three calls, r = 8", "reflect_in_three_calls", 8, "-", "tab:red", launched=True)
    curve("one kernel, r = 8", "reflect", 8, "-", "tab:blue", launched=True)
    curve("one kernel, r = 64", "reflect", 64, "-", "tab:green", launched=True)
    curve("one kernel, r = 8, without its launch", "reflect", 8, ":", "tab:blue", launched=False)
    field.set(xscale="log", yscale="log", xlabel="rows of activations", ylabel="µs")
    field.set_title("Computed floors on an H100 in a CUDA graph, d = o = 4096")
    field.grid(visible=True, alpha=0.3)
    field.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
