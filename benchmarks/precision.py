"""What precision costs a language model with an adapter: folded and rounded, or reflected outside a rounded base.

    python -m benchmarks.precision --graph GRAPH --gguf FILE --data ROWS.jsonl --tokenizer DIR

GRAPH is the base of FILE, dequantized and exported in float32 with the adapter's reflections as operators. Each case
is made from it in memory and run on the CPU provider over 8 × 128 held-out tokens. The reference is the exact fold of
the same base in float32, so that the error of the base's own quantization is not in the figures where it is kept.
"""

import argparse
import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from benchmarks.harness import report, say
from hra_export.graph.half import to_half_, widened
from hra_export.graph.kept_bits import keep_bits_
from hra_export.graph.operator import declare_, is_reflection
from hra_export.graph.products import weight_products
from hra_export.graph.quantize import quantize_
from hra_export.registry import load_converter

ROWS, TOKENS = 8, 128
# Of a block's step: moves every weight of the base off the grid that its file was rounded to.
NOISE = 0.3

Array = NDArray[Any]
Change = Callable[[ir.Model], object]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("graph", "gguf", "data", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", help="only these")
    options = parser.parse_args()
    matrices = dict(load_converter("from_gguf").quantized_matrices(options.gguf))
    tokens = _tokens(options.tokenizer, options.data)
    figures: dict[str, dict[str, float]] = {}
    for start, cases in _cases(matrices).items():
        wanted = {name: case for name, case in cases.items() if not options.cases or name in options.cases}
        if not wanted:
            continue
        reference = _logits(_made(options.graph, _OFF_GRID if start == "float base" else None, fold_), tokens)
        for name, changes in wanted.items():
            moved = _OFF_GRID if start == "float base" else None
            got = _logits(_made(options.graph, moved, *changes), tokens)
            figures[f"{start}: {name}"] = _figures(reference, got, tokens)
            say(f"{start}: {name}: {figures[f'{start}: {name}']}")
            gc.collect()
    rows = [[name, *(f"{value:.3g}" for value in values.values())] for name, values in figures.items()]
    header = ["case", "KL", "top-1 %", "perplexity", "perplexity of the reference"]
    report("precision", header, rows, {"figures": figures, "tokens": [ROWS, TOKENS]})


def _cases(matrices: Any) -> dict[str, dict[str, list[Change]]]:
    def keep(level: int) -> Change:
        return lambda model: keep_bits_(model, matrices, accuracy_level=level)

    def rounded(precision: Any, **options: Any) -> Change:
        return lambda model: quantize_(model, precision, family="decoder", **options)

    exact: dict[str, Any] = {"accuracy_level": 0, "head_bits": None}
    fast: dict[str, Any] = {"accuracy_level": 4, "head_bits": None}
    return {
        "4-bit base": {
            "bits kept, reflected": [keep(0)],
            "bits kept, reflected, 8-bit activations": [keep(4)],
            "folded, rounded again": [fold_, rounded("int4", **exact)],
            "folded, rounded again, symmetric": [fold_, rounded("int4", symmetric=True, **exact)],
            "bits kept, reflected, float16": [keep(0), lambda model: to_half_(model, "float16")],
        },
        "float base": {
            "int4, folded": [fold_, rounded("int4", **exact)],
            "int4, reflected": [rounded("int4", **exact)],
            "int4 symmetric, folded": [fold_, rounded("int4", symmetric=True, **exact)],
            "int4 symmetric, reflected": [rounded("int4", symmetric=True, **exact)],
            "int4, reflected, 8-bit activations": [rounded("int4", **fast)],
            "int4, reflected, 8-bit head": [rounded("int4", accuracy_level=0)],
            "int4, reflected, 8-bit head and activations of it": [rounded("int4")],
            "int4, reflected, 4-bit head": [rounded("int4", head_bits=4, accuracy_level=0)],
            "int4 blocks of 128, reflected": [rounded("int4", block_size=128, **exact)],
            "int8, folded": [fold_, rounded("int8", **exact)],
            "int8, reflected": [rounded("int8", **exact)],
            "int8, reflected, 8-bit activations": [rounded("int8")],
            "fp16, reflected": [lambda model: to_half_(model, "float16")],
            "fp16, folded": [fold_, lambda model: to_half_(model, "float16")],
            "bf16 weights, reflected": [_narrowed_],
        },
    }


def fold_(model: ir.Model) -> None:
    """Put W + U (V W) in place of every W (d, o) behind a reflection, in float64, and take the reflection out."""
    products = {product.x: product for product in weight_products(model)}
    for node in [node for node in model.graph if is_reflection(node)]:
        x, u, v = node.inputs
        (output,) = node.outputs
        product = products[output]
        assert x is not None
        exact = product.matrix().T.astype(np.float64)  # (d, o)
        change = _numbers(u) @ (_numbers(v) @ exact)
        product.weight.const_value = ir.tensor((exact + change).astype(np.float32), name=product.weight.name)
        output.replace_all_uses_with(x)
        model.graph.remove(node, safe=True)
        for factor in (u, v):
            assert factor is not None
            del model.graph.initializers[str(factor.name)]


def _off_grid_(model: ir.Model) -> None:
    random = np.random.default_rng(0)
    for product in weight_products(model):
        exact = product.weight.const_value
        assert exact is not None
        values = exact.numpy()  # (d, o)
        steps = np.ptp(values.reshape(-1, 32, values.shape[1]), axis=1).repeat(32, axis=0) / 15
        noise = random.standard_normal(values.shape, np.float32) * steps * NOISE
        product.weight.const_value = ir.tensor(values + noise, name=product.weight.name)


_OFF_GRID: Change = _off_grid_


def _narrowed_(model: ir.Model) -> None:
    """The stored weights of a bfloat16 graph, computed with in float32."""
    to_half_(model, "bfloat16")
    wide = widened(model)
    for name, held in wide.graph.initializers.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = held.const_value
    for values in ([output for node in model.graph for output in node.outputs], model.graph.initializers.values()):
        for each in values:
            if each.dtype == ir.DataType.BFLOAT16:
                each.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)


def _made(graph: Path, *changes: Change | None) -> ir.Model:
    model = ir.load(graph)
    for change in changes:
        if change is not None:
            change(model)
    return model


def _numbers(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _tokens(tokenizer: Path, data: Path) -> Array:
    """(8, 128) tokens of rows that no training saw."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(tokenizer)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    ids = reader("\n".join(row["prompt"] + row["completion"] for row in rows)).input_ids
    return np.array(ids[: ROWS * TOKENS], np.int64).reshape(ROWS, TOKENS)


def _logits(model: ir.Model, tokens: Array) -> Array:
    """(8, 128, vocabulary), one row at a time."""
    if any(is_reflection(node) for node in model.graph):
        declare_(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        ir.save(model, path, external_data="model.onnx.data")
        del model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(["logits"], dict(_feed(session, row[None])))[0] for row in tokens])


def _feed(session: onnxruntime.InferenceSession, ids: Array) -> Iterator[tuple[str, Array]]:
    for port in session.get_inputs():
        if port.name == "input_ids":
            yield port.name, ids
        elif port.name == "attention_mask":
            yield port.name, np.ones_like(ids)
        elif port.name == "position_ids":
            yield port.name, np.arange(ids.shape[1])[None]
        else:  # an empty cache (batch, heads, 0, size)
            dtype = np.float16 if "16" in port.type else np.float32
            yield port.name, np.zeros((1, port.shape[1], 0, port.shape[3]), dtype)


def _figures(reference: Array, got: Array, tokens: Array) -> dict[str, float]:
    divergences: list[float] = []
    losses: list[float] = []
    exact_losses: list[float] = []
    same: list[float] = []
    for ref, cand, ids in zip(reference, got, tokens, strict=True):
        log_p, log_q = _log_softmax(ref), _log_softmax(cand)
        divergences.append(float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()))
        same.append(float((ref.argmax(-1) == cand.argmax(-1)).mean()))
        for log, into in ((log_q, losses), (log_p, exact_losses)):
            into.append(-float(np.take_along_axis(log[:-1], ids[1:, None], -1).mean()))
    mean = [float(np.mean(values)) for values in (divergences, same, losses, exact_losses)]
    return {"kl": mean[0], "top1": 100 * mean[1], "perplexity": math.exp(mean[2]), "exact": math.exp(mean[3])}


def _log_softmax(scores: Array) -> Array:
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


if __name__ == "__main__":
    main()
