"""Reflections in ONNX graphs: what they cost in ONNX Runtime on the CPU, in every form, and what an export costs.

    python -m benchmarks.onnx [--work DIR] [--ranks 8 32] [--rounds 8] [--passes 4] [--quick] [--skip-export]
    python -m benchmarks.onnx --work DIR --variants native native-grouped --models smollm2 --skip-export    # a part

Every linear layer of the blocks of MiniLM (as `hra-export onnx` writes it) and of SmolLM2-135M (as ONNX Runtime GenAI's
builder does, with grouped attention) is adapted. The variants of one graph:

    merged         folded into the weights: what the others are held to
    function       the operator `hra::HouseholderReflection`, which the runtime inlines
    native         the same file, with the operator's own kernels: `--operator FILE`, else the library that
                   `HRA_EXPORT_ORT_OP` or the package has, else one that is built now; without a compiler, left out
    native-grouped reflections that share an input are one node, as `hra-export onnx` writes them
    auto           what `--plain-ops` writes
    add … augmented   each form of `hra_export/graph/forms.py` where it applies; `output` is what LoRA looks like
    materialized   a dense (d, d) matrix a layer, as PEFT computes it

They take turns in one process, with bound inputs and one pool of threads. A pass is a process of its own, in which
they are loaded in another order: where weights come to lie in memory decides over some percent of a decoding step.
"÷ merged" is the mean over passes of the ratio of medians, followed by the smallest and the largest. "floor" is what a
native variant cannot fall below, by the bandwidth and peak that the run measures (`benchmarks/roofline.py`). Only a
whole run is written to the results unasked; a part of one prints its table.

An export is a whole command, start of Python included: `hra-export onnx --mode reflect --no-validate` with an adapter
against transformers' exporter on the base alone, which writes a graph of the same inputs.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness import Contender, as_data, as_table, interleave, median, report, say, work_folder
from benchmarks.native_library import native_library

T = TypeVar("T")
MODELS = ("minilm", "smollm2")
# (variant, rank) → word of the case → bar.
BARS: Mapping[tuple[str, int], Mapping[str, float]] = {
    ("auto", 8): {"prefill": 1.20, "length": 1.20, "decode": 1.10},
    ("native-grouped", 8): {"prefill": 1.06, "length": 1.06, "decode": 1.05},
    ("native-grouped", 32): {"decode": 1.10},
}
EXPORT_BAR = 1.2
EXPORTED = ("minilm", "llama-4")
# The same inputs and free axes as in `hra_export.graph.families`.
EXPORT_ALONE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
base, output, is_decoder = sys.argv[1], sys.argv[2], sys.argv[3] == "llama-4"
model = (AutoModelForCausalLM if is_decoder else AutoModel).from_pretrained(base, torch_dtype=torch.float32).eval()
ids = torch.arange(14).reshape(2, 7)
if is_decoder:
    c, cache = model.config, DynamicCache()
    head = c.hidden_size // c.num_attention_heads
    for layer in range(c.num_hidden_layers):
        cache.update(*(torch.zeros(2, c.num_key_value_heads, 5, head) for _ in range(2)), layer)
    mask = torch.ones(2, 12, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": ids % 7, "past_key_values": cache}
else:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, opset_version=20)).save_pretrained(output)
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where graphs are made; deleted afterwards if not given")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each variant in a pass")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="of the shared pool; all cores by default")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="beside the merged graph; all by default")
    parser.add_argument("--operator", type=Path, metavar="FILE", help="the library of the native variants")
    parser.add_argument("--skip-export", action="store_true")
    parser.add_argument("--results", metavar="NAME", help="write results/NAME.json; `onnx` for a whole run")
    parser.add_argument("--quick", action="store_true", help="MiniLM, r = 8 and three variants, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.ranks, arguments.models, arguments.rounds, arguments.passes = [8], ["minilm"], 2, 1
        arguments.variants = ["native-grouped", "auto", "output"]
    is_whole = not (arguments.variants or arguments.skip_export or len(arguments.models) < len(MODELS))
    results = arguments.results or ("onnx" if is_whole else None)
    with work_folder(arguments.work) as work:
        library, reason = native_library(work, arguments.operator)
        rows, timings = measure_forms(arguments, work, library.path if library else None)
        exports = {} if arguments.skip_export else measure_exports(work, rounds=1 if arguments.quick else 2)
    rows += [row for name, each in exports.items() for row in _export_rows(name, each)]
    header = ["case", "r", "variant", "median", "÷ merged", "smallest", "largest", "floor", "bar"]
    data = {"operator": reason, "passes": timings, "exports": {name: as_data(each) for name, each in exports.items()}}
    if results:
        report(results, header, rows, data)
    else:
        sys.stdout.write(as_table(header, rows))
    say(reason)


def measure_forms(
    arguments: argparse.Namespace, work: Path, library: Path | None
) -> tuple[list[list[str]], dict[str, Any]]:
    """The rows of all cases, and the seconds behind them; without a library, no native variants."""
    rows: list[list[str]] = []
    timings: dict[str, Any] = {}
    for model in arguments.models:
        say(f"{model}: making its graph")
        widths = _apart(_make_base, model, work)
        for rank in arguments.ranks:
            folder = work / model / f"r{rank}"
            names = ["merged", *(arguments.variants or _apart(_variant_names)[1:])]
            names = [name for name in names if library or not name.startswith("native")]
            say(f"{model}, r = {rank}: making {len(names)} variants")
            shutil.rmtree(folder, ignore_errors=True)
            _apart(_make_variants, model, work, widths, rank, names)
            passes = []
            for turn in range(arguments.passes):
                say(f"{model}, r = {rank}: pass {turn + 1}")
                order = _order(names, turn, arguments.passes)
                rounds, threads = arguments.rounds, arguments.threads
                passes.append(_apart(_time_variants, model, folder, order, rounds, threads, library))
            shutil.rmtree(folder)
            timings[f"{model}, r = {rank}"] = passes
            rows += _rows(passes, rank, names, _apart(_floors, model, widths, rank, arguments.threads))
    return rows, timings


def _order(names: Sequence[str], turn: int, passes: int) -> list[str]:
    """Another first one in each pass, and every other pass backwards."""
    start = turn * len(names) // passes
    order = [*names[start:], *names[:start]]
    return order if turn % 2 == 0 else order[::-1]


def measure_exports(work: Path, *, rounds: int) -> dict[str, Any]:
    """Name → runs of our exporter and of transformers'."""
    found = {}
    for name in EXPORTED:
        say(f"export of {name}:")
        base, adapter, output = (work / f"export-{name}" / part for part in ("base", "adapter", "output"))
        _apart(_make_export_input, name, base, adapter)

        def clear(output: Path = output) -> None:
            shutil.rmtree(output, ignore_errors=True)

        ours = [sys.executable, "-m", "hra_export", "onnx", str(adapter), "--base", str(base), "--output", str(output)]
        alone = [sys.executable, "-c", EXPORT_ALONE, str(base), str(output), name]
        contenders = [
            Contender("hra-export onnx", [*ours, "--mode", "reflect", "--no-validate", "-q"], clear),
            Contender("transformers' exporter", alone, clear),
        ]
        found[name] = interleave(contenders, rounds)
        clear()
    return found


def _rows(
    passes: Sequence[Mapping[str, Mapping[str, Sequence[float]]]],
    rank: int,
    names: Sequence[str],
    floors: Mapping[str, float],
) -> list[list[str]]:
    """The rows of one model and rank; `floors` has the least seconds of all reflections, by case."""
    rows = []
    for case in passes[0]:
        for name in names:
            bar = next((bar for word, bar in BARS.get((name, rank), {}).items() if word in case), None)
            medians = [statistics.median(each[case][name]) for each in passes]
            ratios = [each / statistics.median(one[case]["merged"]) for each, one in zip(medians, passes, strict=True)]
            ratio = statistics.mean(ratios)
            verdict = f"≤ {bar:.2f}: {'holds' if ratio <= bar else 'FAILS'}" if bar else ""
            figures = [f"{each:.3f}" for each in (ratio, min(ratios), max(ratios))]
            merged = statistics.median(statistics.median(each[case]["merged"]) for each in passes)
            floor = f"{1 + floors[case] / merged:.3f}" if name.startswith("native") else ""
            seconds = statistics.median(medians)
            rows.append([case, str(rank), name, f"{1000 * seconds:.2f} ms", *figures, floor, verdict])
    return rows


def _export_rows(name: str, runs: Mapping[str, Any]) -> list[list[str]]:
    ours, alone = (runs[key] for key in ("hra-export onnx", "transformers' exporter"))
    rows = []
    for what, field in (("wall", "wall"), ("peak memory", "peak_bytes")):
        figures = [median(each, field) for each in (ours, alone)]
        ratio = figures[0] / figures[1]
        shown = [f"{each:.1f} s" if field == "wall" else f"{each / 1e6:.0f} MB" for each in figures]
        verdict = f"≤ {EXPORT_BAR:.2f}: {'holds' if ratio <= EXPORT_BAR else 'FAILS'}"
        rows.append(
            [f"export of {name}, {what}", "8", "hra-export onnx", shown[0], f"{ratio:.3f}", "", "", "", verdict]
        )
        rows.append([f"export of {name}, {what}", "", "transformers alone", shown[1], *[""] * 5])
    return rows


def _apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own: the system counts what a parent held into the peak of its children."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(function, *arguments).result()


def _variant_names() -> tuple[str, ...]:
    from benchmarks.graph_variants import VARIANTS

    return VARIANTS


def _make_base(model: str, work: Path) -> dict[str, int]:
    """The base and its graph, if they are not there; target → d."""
    from benchmarks.graph_variants import make_base_graph
    from hra_export.registry import load_converter
    from tests.real_models import minilm_directory, smollm2_gguf

    folder = work / model
    base = minilm_directory() if model == "minilm" else folder / "base"
    if not base.exists():
        load_converter("from_gguf").convert(smollm2_gguf(), base)
    if not (folder / "made").exists():
        make_base_graph(model, base, folder / "made")
    return _widths(model, base)


def _widths(model: str, base: Path) -> dict[str, int]:
    """Every linear layer of the blocks."""
    from safetensors import safe_open

    words = ("query", "key", "value", "dense") if model == "minilm" else ("_proj",)
    with safe_open(base / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  not a mapping
    layers = {key: shape for key, shape in shapes.items() if "layer" in key and len(shape) == 2}
    return {
        key.removesuffix(".weight"): shape[1] for key, shape in layers.items() if any(word in key for word in words)
    }


def _make_variants(model: str, work: Path, widths: Mapping[str, int], rank: int, names: Sequence[str]) -> None:
    from benchmarks.graph_variants import make_variants

    graph = work / model / "made" / "graph" / "model.onnx"
    make_variants(graph, widths, rank, work / model / f"r{rank}", names)


def _time_variants(
    model: str, folder: Path, names: Sequence[str], rounds: int, threads: int, library: Path | None
) -> dict[str, dict[str, list[float]]]:
    from benchmarks.graph_variants import CASES, time_variants

    cases = [case for case in CASES if case.model == model]
    return time_variants(folder, names, cases, rounds=rounds, threads=threads, library=library)


def _floors(model: str, widths: Mapping[str, int], rank: int, threads: int) -> dict[str, float]:
    """Case → the least seconds of all its reflections on this machine: factors from memory, x and y in the caches."""
    import torch

    from benchmarks.ceilings import measured
    from benchmarks.graph_variants import CASES
    from benchmarks.roofline import Shape, operator

    torch.set_num_threads(threads or os.cpu_count() or 1)
    ceilings, dtype = measured(torch.device("cpu")), "float32"
    loads = {case.name: case.load.batch * case.load.tokens for case in CASES if case.model == model}

    def seconds(rows: int, width: int) -> float:
        work = operator(Shape(rows, width, width, rank, dtype), rows_cached=True, constant=True)
        return ceilings.floor(work, dtype)

    return {name: sum(seconds(n, width) for width in widths.values()) for name, n in loads.items()}


def _make_export_input(name: str, base: Path, adapter: Path) -> None:
    from benchmarks.merge import generate_adapter

    if adapter.exists():
        return
    base.parent.mkdir(parents=True, exist_ok=True)
    if name == "minilm":
        from tests.real_models import minilm_directory

        shutil.copytree(minilm_directory(), base)
        widths = _widths("minilm", base)
    else:
        _make_llama(base)
        widths = _widths("llama", base)
    generate_adapter({path: (d, d) for path, d in widths.items()}, base, adapter)
    if name == "minilm":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "FEATURE_EXTRACTION"}))


def _make_llama(base: Path) -> None:
    """Four layers of SmolLM2's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, num_hidden_layers=4, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(base)


if __name__ == "__main__":
    main()
