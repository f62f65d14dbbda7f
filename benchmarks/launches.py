"""How many nodes ONNX Runtime runs in a layer of a llama: merged, inlined, native, native and grouped.

    python -m benchmarks.launches [--operator FILE] [--precision fp32 int4]

A node is a launch or more on a GPU, where these counts are what decoding pays. The graphs are of ONNX Runtime GenAI's
builder, with grouped-query attention, and every linear layer is adapted: seven sites a layer. What is counted is what
the runtime's CPU provider keeps after its optimizer; widths are small, as counts do not depend on them. A layer is what
a model of two layers has more than a model of one.

    merged, packed    folded; query, key and value are one product, which reflections of their own forbid
    merged            folded, seven products
    native-grouped    as `hra-export onnx` writes it, with the operator's kernels
    native            the same taken apart
    plain             what `--plain-ops` writes
    inlined           as `hra-export onnx` writes it, without the operator's kernels; LoRA's nodes are as many

Without the library of native kernels, the native rows are left out.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import onnx
import onnxruntime
import torch

from benchmarks.graph_variants import NATIVE
from benchmarks.harness import report, say
from benchmarks.llamas import SIZES, build_base
from benchmarks.native_library import native_library
from hra_export.adapter import HraAdapter
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.finishing import finish_
from hra_export.graph.genai_builder import run_builder
from hra_export.graph.genai_names import builder_names
from hra_export.graph.grouped_operator import declare_used_
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.options import GraphOptions, Precision
from hra_export.graph.regrouping import ungroup_

RANK = 8
# As Llama 3.1 8B, an eighth as wide: ranks must be small beside d, as they are there.
SHAPE = replace(SIZES["8B"], hidden=512, feed_forward=1792, heads=8, key_heads=2, head_width=64, vocabulary=128)
LAYERS_8B = SIZES["8B"].layers
SITES = {
    **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), SHAPE.hidden),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), SHAPE.hidden),
    "mlp.down_proj": SHAPE.feed_forward,
}
VARIANTS = ("merged, packed", "merged", "native-grouped", "native", "plain", "inlined")


def main() -> None:
    """Count, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--operator", type=Path, help="library of native kernels")
    parser.add_argument("--precision", choices=get_args(Precision), nargs="+", default=["fp32", "int4"])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        library, sentence = native_library(Path(work), chosen.operator)
        say(sentence)
        counts = {each: count(each, library.path if library else None, Path(work) / each) for each in chosen.precision}
    names = [name for name in VARIANTS if all(name in found for found in counts.values())]
    rows = []
    for name in names:
        cells = []
        for found in counts.values():
            more = found[name] - found["merged"]
            cells += [str(found[name]), str(more), str(more * LAYERS_8B)]
        rows.append([name, *cells])
    header = ["a layer", *(f"{each}{what}" for each in counts for what in (", nodes", ", more", f", × {LAYERS_8B}"))]
    report("launches", header, rows, {"counts": counts})


def count(precision: Precision, library: Path | None, folder: Path, names: Sequence[str] = VARIANTS) -> dict[str, int]:
    """Variant → nodes of one layer.

    Args:
        precision: of the weights.
        library: of the native kernels; None leaves the native variants out.
        folder: made anew.
        names: of the variants.
    """
    found = {}
    for name in names:
        if name in NATIVE and library is None:
            continue
        used = library if name in NATIVE else None
        one, two = (nodes_that_run(write(name, precision, n, folder / name / str(n)), used) for n in (1, 2))
        found[name] = len(two) - len(one)
    return found


def write(name: str, precision: Precision, layers: int, folder: Path) -> Path:
    """The file of one variant."""
    base = folder / "base"
    base.mkdir(parents=True)
    model = build_base(replace(SHAPE, layers=layers), torch.device("cpu"), torch.float32)
    model.save_pretrained(base)  # type: ignore[operator]  # a transformers model
    _write_tokenizer(base)
    options = GraphOptions(mode="reflect", runtime="genai", precision=precision, plain_ops=name == "plain")
    built = run_builder(base, folder, options, fuse_attention=name == "merged, packed")
    graph = open_graph(built / "model.onnx")
    random = torch.Generator().manual_seed(0)
    widths = {f"model.layers.{i}.{site}": d for i in range(layers) for site, d in SITES.items()}
    chains = {target: torch.randn(d, RANK, generator=random) for target, d in widths.items()}
    adapters = [] if name.startswith("merged") else [HraAdapter(chains, RANK)]
    if adapters:
        insert_reflections_(graph, adapters, rename=builder_names(widths))
    finish_(graph, adapters, options, family="decoder", properties={}, blocks={}, renamed={})
    if name == "native":
        ungroup_(graph)
        declare_used_(graph)
    save_graph(graph, folder)
    return folder / "model.onnx"


def _write_tokenizer(folder: Path) -> None:
    """The builder wants one, whatever it is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))  # noqa: S106  no password
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)  # noqa: S106  no password


def nodes_that_run(path: Path, library: Path | None) -> Sequence[str]:
    """The operators of a graph as ONNX Runtime runs it."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(path.with_suffix(".run.onnx"))
    if library is not None:
        settings.register_custom_ops_library(str(library))
    onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    ran = onnx.load(settings.optimized_model_filepath, load_external_data=False)
    return [node.op_type for node in ran.graph.node]


if __name__ == "__main__":
    main()
