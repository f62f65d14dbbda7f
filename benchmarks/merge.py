"""Merging: `hra-export merge` against a plain copy of the base and against PEFT, in one interleaved run.

    python -m benchmarks.merge [--work DIR] [--rounds 5] [--peft-rounds 1] [--only NAME]

Checkpoints: SmolLM2-135M-Instruct (float32, 538 MB), and generated Llama-shaped ones in bfloat16 with hidden sizes
2048 and 4096. Every linear layer is adapted, r = 8. `cp -r` + `sync` is what the disk can do; PEFT loads the model,
runs `merge_and_unload`, and saves. Start-up is `hra-export merge --dry-run`: Python, torch, headers, the plan.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.harness import Contender, as_data, interleave, median, report, say, work_folder

RANK = 8
PEFT_MERGE = """
import sys, torch, os
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype="auto")
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
os.sync()
"""


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped checkpoint: hidden and feed-forward size, layers."""

    hidden: int
    feed_forward: int
    layers: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module suffix → (out, in)."""
        d, ff = self.hidden, self.feed_forward
        attention = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        return {**attention, "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff)}


GENERATED = {"d2048": Shape(2048, 5632, 20), "d4096": Shape(4096, 11008, 9)}
VOCABULARY = 1024


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoints are made; deleted afterwards if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft-rounds", type=int, default=1, help="PEFT takes minutes at d = 4096")
    parser.add_argument("--only", choices=["smollm2", *GENERATED])
    arguments = parser.parse_args()
    with work_folder(arguments.work) as work:
        rows, data = [], {}
        for name in [arguments.only] if arguments.only else ["smollm2", *GENERATED]:
            say(f"{name}:")
            row, runs = _measure(name, work, arguments.rounds, arguments.peft_rounds)
            rows.append(row)
            data[name] = runs
    header = ["checkpoint", "size", "cp + sync", "start-up", "merge", "beyond start-up / cp", "PEFT", "PEFT / merge",
              "peak MB", "PEFT peak MB"]  # fmt: skip
    report("merge", header, rows, {"runs": data})


def _measure(name: str, work: Path, rounds: int, peft_rounds: int) -> tuple[list[str], dict[str, object]]:
    base, adapter = work / name / "base", work / name / "adapter"
    if not adapter.exists():
        # In a process of its own: the system counts what a parent held into the peak of its children.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            apart.submit(make_checkpoint, GENERATED.get(name), base, adapter).result()
    output = work / name / "output"

    def clear() -> None:
        shutil.rmtree(output, ignore_errors=True)

    merge = [sys.executable, "-m", "hra_export", "merge", str(adapter), "--base", str(base), "--output", str(output)]
    copy = ["sh", "-c", f"cp -r '{base}' '{output}' && sync"]
    quick = [
        Contender("cp", copy, clear),
        Contender("start-up", [*merge, "--dry-run"], clear),
        Contender("merge", merge, clear),
    ]
    peft = Contender("peft", [sys.executable, "-c", PEFT_MERGE, str(base), str(adapter), str(output)], clear)
    # One run: PEFT's turns lie between two halves of the others'.
    runs = interleave(quick, -(-rounds // 2))
    runs |= interleave([peft], peft_rounds)
    for key, more in interleave(quick, max(1, rounds // 2)).items():
        runs[key] += more
    clear()
    wall = {key: median(each) for key, each in runs.items()}
    size = sum(path.stat().st_size for path in base.iterdir())
    row = [
        name,
        f"{size / 1e9:.2f} GB",
        *(f"{wall[key]:.2f} s" for key in ("cp", "start-up", "merge")),
        f"{(wall['merge'] - wall['start-up']) / wall['cp']:.2f}",
        f"{wall['peft']:.1f} s",
        f"{wall['peft'] / wall['merge']:.1f}",
        *(f"{median(runs[key], 'peak_bytes') / 1e6:.0f}" for key in ("merge", "peft")),
    ]
    return row, dict(as_data(runs))


def make_checkpoint(shape: Shape | None, base: Path, adapter: Path) -> None:
    """A checkpoint of random weights, or SmolLM2 where no shape is given, and an adapter for its linear layers."""
    base.mkdir(parents=True)
    if shape is None:
        from hra_export.registry import load_converter
        from tests.real_models import smollm2_gguf

        base.rmdir()
        load_converter("from_gguf").convert(smollm2_gguf(), base)
        shapes = _linear_shapes(base / "model.safetensors")
    else:
        shapes = _generate(shape, base)
    generate_adapter(shapes, base, adapter)


def _linear_shapes(path: Path) -> dict[str, tuple[int, int]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = {key.removesuffix(".weight"): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return {key: (shape[0], shape[1]) for key, shape in shapes.items() if "_proj" in key}


def _generate(shape: Shape, base: Path) -> dict[str, tuple[int, int]]:
    """Two shards of random bfloat16 weights with an index; returns the linear layers."""
    torch.manual_seed(0)
    d, found = shape.hidden, {}
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    shards[0]["model.embed_tokens.weight"] = _weights(VOCABULARY, d)
    shards[1]["lm_head.weight"] = _weights(VOCABULARY, d)
    shards[1]["model.norm.weight"] = torch.ones(d, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        shard, path = shards[layer * 2 // shape.layers], f"model.layers.{layer}"
        for suffix, (out, features) in shape.linears().items():
            shard[f"{path}.{suffix}.weight"] = _weights(out, features)
            found[f"{path}.{suffix}"] = (out, features)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{path}.{norm}.weight"] = torch.ones(d, dtype=torch.bfloat16)
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(shard, base / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": d,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": d // 128,
        "num_key_value_heads": d // 128,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config))
    return found


def _weights(out: int, features: int) -> torch.Tensor:
    return (torch.randn(out, features) * 0.02).to(torch.bfloat16)


def generate_adapter(shapes: dict[str, tuple[int, int]], base: Path, adapter: Path) -> None:
    """Pairs of vectors a few degrees apart, as a trained adapter has them."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, (_, features) in shapes.items():
        half = torch.rand(features, RANK // 2, generator=generator) * 2 - 1
        vectors = half.repeat_interleave(2, dim=1)
        tensors[f"base_model.model.{path}.hra_u"] = vectors + 0.05 * torch.randn(vectors.shape, generator=generator)
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "HRA",
        "r": RANK,
        "apply_GS": False,
        "bias": "none",
        "init_weights": True,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in shapes}),
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
