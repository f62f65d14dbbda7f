"""A real Llama and a real BERT: stock PEFT's unmerged outputs = our merged checkpoint's."""

from pathlib import Path

import pytest
import torch
from peft import HRAConfig, get_peft_model
from safetensors.torch import load_file

from hra_export.adapter import read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.merge import MergeReport, merge_checkpoint
from hra_export.parity import compare
from hra_export.planning import plan_merge
from hra_export.registry import load_converter
from tests.real_models import minilm_directory, smollm2_gguf

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

# Thirty layers of float32 sums in another order, relative to an adapter that moves the logits by a tenth or more.
EFFECT = 1e-3
PROMPT = "The three largest cities of France are"


def merge(base: Path, adapter: Path, output: Path) -> MergeReport:
    plan = plan_merge(open_checkpoint(base), [read_adapter(adapter)])
    return merge_checkpoint(plan, output)


def turn_vectors(adapted: torch.nn.Module) -> None:
    """Move every chain away from the identity, as training does; adjacent vectors end a few degrees apart."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "hra_u" in name:
                value.add_(0.05 * value.std() * torch.randn_like(value))


@torch.no_grad()
def test_smollm2_merged_has_the_logits_of_peft(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    load_converter("from_gguf").convert(smollm2_gguf(), base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")
    start = model(**tokens).logits
    adapted = get_peft_model(model, HRAConfig(r=8, target_modules="all-linear"))
    turn_vectors(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    reference = adapted(**tokens).logits
    report = merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    found = compare("logits", reference.numpy(), merged(**tokens).logits.numpy(), start.numpy(), logits=True)
    assert len(report.folded) == 210
    assert found.effect_size > 0.01
    assert found.effect_error < EFFECT
    assert found.top1 == 1
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(
        load_file(tmp_path / "merged" / "model.safetensors")[embeddings],
        load_file(base / "model.safetensors")[embeddings],
    )


@torch.no_grad()
def test_minilm_merged_as_a_classifier_has_the_logits_of_peft(tmp_path: Path) -> None:
    """The base is a headless BertModel; the adapter brings a classifier and the `bert.` prefix."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = minilm_directory()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    tokens = AutoTokenizer.from_pretrained(base)(["a fine film", "it never ends"], return_tensors="pt", padding=True)
    start = model(**tokens).logits
    adapted = get_peft_model(model, HRAConfig(r=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS"))
    turn_vectors(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    reference = adapted(**tokens).logits
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == 3
    found = compare("logits", reference.numpy(), merged(**tokens).logits.numpy(), start.numpy(), logits=True)
    assert found.effect_size > 0.01
    assert found.effect_error < EFFECT
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
