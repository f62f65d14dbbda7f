"""Bases on disk, live models with layers of other people's HRA code in them, and the files that this code saves."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.registry import load_converter
from tests import official_layouts as code
from tests import tiny_models

from_official = load_converter("from_official")

RANK = 4
EPSILON = 1e-4


@dataclass(frozen=True)
class Scene:
    """A base on disk, a live model with layers of other code, and the file that this code saved.

    Attributes:
        layers: module path in the base → the layer of other code.
    """

    base: Checkpoint
    model: nn.Module
    layers: dict[str, Any]
    source: Path

    def read(self, **options: Any) -> Any:
        """As the command would, with the base and leave to read pickles."""
        return from_official.read(self.source, **{"allow_pickle": True, "base": self.base, **options})


def save_base(model: nn.Module, directory: Path, *, left_out: tuple[str, ...] = ()) -> Checkpoint:
    """A model as a base in float64, some of its parameters left out."""
    model.save_pretrained(directory)
    path = next(directory.glob("*.safetensors"))
    kept = {name: value for name, value in safetensors.torch.load_file(path).items() if not name.startswith(left_out)}
    safetensors.torch.save_file(kept, path, {"format": "pt"})
    return open_checkpoint(directory)


def scene(name: str, folder: Path, make: Callable[[nn.Linear], nn.Module], chosen: Callable[[str], bool]) -> Scene:
    """A tiny model whose chosen layers are those of other code; the source is yet to be written."""
    model = tiny_models.build(name).double()
    base = save_base(model, folder / "base", left_out=("classifier", "pooler") if name == "deberta-v2" else ())
    torch.manual_seed(1)
    layers = code.replace_linears(model, make, chosen)
    return Scene(base, model, layers, folder / "source")


def nlu(folder: Path, layer: Any = code.NluLinear, **options: Any) -> Scene:
    """The DeBERTa code saves the whole model, a new classifier and pooler included."""
    made = scene("deberta-v2", folder, partial(layer, rank=RANK, **options), lambda path: ".layer." in path)
    torch.save(made.model.state_dict(), folder / "pytorch.model-000100.bin")
    return Scene(made.base, made.model, made.layers, folder / "pytorch.model-000100.bin")


def is_attention(path: str) -> bool:
    return ".attn" in path and path.endswith(code.ATTENTION_LEAVES)


def subject(folder: Path) -> Scene:
    """The DreamBooth code saves the attention processors alone, and their sizes."""
    made = scene("unet", folder, partial(code.NluLinear, rank=RANK), is_attention)
    tensors = {}
    for module, layer in made.layers.items():
        owner = f"{code.processor_owner(module)}_hra"
        tensors[f"{owner}.hra_u"] = layer.hra_u.detach()
        tensors[f"{owner}.hidden_size"] = torch.tensor(layer.out_features)
        tensors[f"{owner}.cross_attention_dim"] = torch.tensor(layer.in_features)
    torch.save(tensors, folder / "pytorch_model.bin")
    return Scene(made.base, made.model, made.layers, folder / "pytorch_model.bin")


# The tiny UNet's blocks as Stable Diffusion's code counts them: one layer a block, attention in the outer blocks.
LDM_BLOCKS = {
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}


def control(folder: Path) -> Scene:
    """The controllable generation saves a checkpoint of Lightning: the whole pipeline, and the hint encoder."""
    made = scene(
        "unet",
        folder,
        partial(code.ControlLinear, rank=RANK),
        lambda path: is_attention(path) or path.endswith("ff.net.0.proj"),
    )
    downsampler = made.model.get_parameter("down_blocks.0.downsamplers.0.conv.weight").detach()
    tensors = {"model.diffusion_model.input_blocks.2.0.op.weight": downsampler}
    for module, layer in made.layers.items():
        block, _, rest = module.partition(".transformer_blocks.")
        owner = f"model.diffusion_model.{LDM_BLOCKS[block]}.transformer_blocks.{rest}"
        tensors |= {f"{owner}.{key}": value for key, value in layer.state_dict().items()}
    tensors["control_model.input_hint_block.0.weight"] = torch.ones(16, 3, 3, 3)
    tensors["first_stage_model.encoder.conv_in.weight"] = torch.ones(4, 3, 3, 3)
    tensors["betas"] = torch.ones(1000)
    torch.save({"epoch": 11, "global_step": 7, "state_dict": tensors}, folder / "last.ckpt")
    return Scene(made.base, made.model, made.layers, folder / "last.ckpt")


def adapter_directory(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """An adapter directory as the authors' fork of PEFT 0.10 writes it."""
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "OFT", "r": RANK, "task_type": "CAUSAL_LM", "base_model_name_or_path": "meta/llama"}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder


def after_layers(folder: Path, leaf: str, layer: Any, options: dict[str, Any], **config: object) -> Scene:
    """A llama with chains after some of its layers, square ones and others."""
    made = scene(
        "llama-biases", folder, partial(layer, rank=RANK, **options), lambda path: path.endswith(("q_proj", "v_proj"))
    )
    tensors = {f"base_model.model.{path}.{leaf}": layer.oft_r.detach() for path, layer in made.layers.items()}
    source = adapter_directory(folder / "source", tensors, **config)
    return Scene(made.base, made.model, made.layers, source)


def llama(folder: Path, *, leaf: str = "oft_r", **options: Any) -> Scene:
    """The LLaMA code."""
    return after_layers(folder, leaf, code.LlamaLinear, {"epsilon": EPSILON, **options}, eps=EPSILON, coft=False)


def draft(folder: Path) -> Scene:
    """PEFT's first draft."""
    return after_layers(folder, "hra_u", code.DraftLinear, {}, peft_type="HRA", apply_GS=False)


def first_code(folder: Path, *, scale: float = 0.02) -> Scene:
    """The authors' first code, in its processors."""
    make = partial(code.FirstLinear, rank=3, epsilon=EPSILON, scale=scale)
    made = scene("unet", folder, make, is_attention)
    tensors: dict[str, Tensor] = {}
    for module, layer in made.layers.items():
        owner = f"{code.processor_owner(module)}_householder"
        tensors |= {f"{owner}.v_list.{i}": vector.detach() for i, vector in enumerate(layer.v_list)}
        tensors[f"{owner}.cross_attention_dim"] = torch.tensor(len(layer.v_list[0]))
    torch.save(tensors, folder / "weights.pt")
    return Scene(made.base, made.model, made.layers, folder / "weights.pt")


def lora_lite(folder: Path, *, reversed_order: bool = False) -> Scene:
    """lora-lite: safetensors with its configuration now, a pickle around everything before."""
    make = partial(code.LoraLiteLinear, rank=RANK, reversed_order=reversed_order)
    made = scene("llama", folder, make, lambda path: path.endswith(("q_proj", "down_proj")))
    tensors = {f"{path}.lora_U": layer.lora_U.detach() for path, layer in made.layers.items()}
    if reversed_order:
        config = {"variant": "hra", "r": RANK, "variant_kwargs": {}}
        torch.save({"cfg": config, "state": tensors, "base_fp": 1.0}, folder / "weights.pt")
        return Scene(made.base, made.model, made.layers, folder / "weights.pt")
    metadata = {"cfg": json.dumps({"variant": "hra", "r": RANK})}
    safetensors.torch.save_file(tensors, folder / "weights.safetensors", metadata)
    return Scene(made.base, made.model, made.layers, folder / "weights.safetensors")
