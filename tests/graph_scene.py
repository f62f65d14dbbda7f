"""Tiny models of every ONNX family: as they are, with live layers, and as graphs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from hra_export import attach
from hra_export.adapter import HraAdapter
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import GraphSpec, graph_specs
from hra_export.graph.tracing import make_traceable_
from tests.tiny_models import DEBERTA, MODELS, VOCABULARY
from tests.tiny_models import build as build_tiny

RANK = 4
# Embeddings whose table is read without a lookup, so that a chain on them does nothing in PyTorch either.
UNUSED = ("rel_embeddings", "shared")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ONE_LAYER = {"num_hidden_layers": 1}
END = {"bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {**SIZES, **ONE_LAYER, **END, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, **END}


def _made(name: str, config: str, *sizes: Mapping[str, Any], **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers under a fixed seed; later sizes and options win."""
    given = {key: value for part in (*sizes, options) for key, value in part.items()}

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**given))
        return model.eval()

    return build


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text = {**sizes, "num_attention_heads": 4, "vocab_size": VOCABULARY, **END, "eos_token_id": 5}
    vision = {**sizes, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def _known(name: str) -> Callable[[], nn.Module]:
    assert name in MODELS
    return lambda: build_tiny(name)


# Sizes and options that make each architecture's own ways show: shared heads, windows, transposed layers, one bias
# table for all blocks.
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _known("bert"),
    "bert-features": _made("BertModel", "BertConfig", SIZES),
    "bert-tokens": _made("BertForTokenClassification", "BertConfig", SIZES, ONE_LAYER, num_labels=5),
    "roberta": _made("RobertaForSequenceClassification", "RobertaConfig", SIZES, ONE_LAYER, type_vocab_size=1),
    "deberta-v2": _known("deberta-v2"),
    "deberta-v2-features": _made("DebertaV2Model", "DebertaV2Config", SIZES, ONE_LAYER, DEBERTA, share_att_key=True),
    "llama": _known("llama"),
    "qwen2": _made("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": _made("Qwen3ForCausalLM", "Qwen3Config", DECODER, head_dim=8),
    "mistral": _made("MistralForCausalLM", "MistralConfig", DECODER, head_dim=8, sliding_window=8),
    "gpt2": _made("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt-neox": _made("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER),
    "phi": _made("PhiForCausalLM", "PhiConfig", DECODER),
    "phi3": _made("Phi3ForCausalLM", "Phi3Config", DECODER),
    "t5": _known("t5"),
    "vit": _known("vit"),
    "vit-features": _made("ViTModel", "ViTConfig", SIZES, ONE_LAYER, image_size=16, patch_size=4),
    "clip": _clip,
    "unet": _known("unet"),
}


@dataclass(frozen=True)
class Scene:
    """A model three times: as it is, with live layers, and as graphs.

    Attributes:
        name: of the builder.
        targets: module paths that carry a chain.
        base: the model without its adapter.
        live: the model with live layers; the reference.
        graphs: file stem → graph, reflections still opaque.
        specs: what the graphs were made from.
    """

    name: str
    targets: tuple[str, ...]
    base: nn.Module
    live: nn.Module
    graphs: Mapping[str, ir.Model]
    specs: Sequence[GraphSpec]

    @property
    def family(self) -> str:
        return self.specs[0].family


def make_scene(name: str, *, mode: str = "reflect", **options: Any) -> Scene:
    """Build, adapt and export.

    Args:
        name: key of `BUILDERS`.
        mode: `reflect` or `merged`.
        options: of `export_graph`.
    """

    def build() -> nn.Module:
        return _sharpened(BUILDERS[name]())

    live, traced = build(), build()
    adapter = random_adapter(live)
    attach(live, adapter)
    attachment = attach(traced, adapter)
    if mode == "merged":
        attachment.fold_()
    else:
        assert not make_traceable_(attachment)
    specs = graph_specs(traced)
    graphs = {spec.name: export_graph(spec, **options) for spec in specs}
    return Scene(name, tuple(adapter.chains), build(), live, graphs, specs)


@torch.no_grad()
def _sharpened(model: nn.Module) -> nn.Module:
    """A fresh model whose products keep the size of their inputs.

    As initialized for training they are so small that every query attends to all keys alike: a chain before a query or
    a key would then make no difference that a comparison could see.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        features = None if isinstance(module, nn.Embedding) else _features(module)
        if features is not None:
            weight.div_(weight.std() * features**0.5)
    return model


def random_adapter(model: nn.Module, *, seed: int = 1) -> HraAdapter:
    """Random chains for every layer that HRA is defined for: products, embeddings and, in a denoiser, convolutions."""
    random = torch.Generator().manual_seed(seed)
    chains = {}
    for path, module in model.named_modules():
        features = _features(module)
        if features is not None and not path.endswith(UNUSED):
            chains[path] = torch.randn(features, RANK, generator=random)
    return HraAdapter(chains, RANK)


def _features(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    if type(module).__name__ == "Conv1D":
        weight: Any = module.weight
        return weight.shape[0]
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel()
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return None
