"""The merged directory's model card, as the Hub's own client reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import open_checkpoint
from hra_export.merge import merge_checkpoint
from hra_export.planning import plan_merge


def merged_card(folder: Path, base_card: str | None, base_name: str | None) -> Any:
    (folder / "base").mkdir()
    save_file({"proj.weight": torch.randn(4, 6)}, folder / "base" / "model.safetensors")
    if base_card is not None:
        (folder / "base" / "README.md").write_text(base_card, encoding="utf-8")
    adapter = HraAdapter({"proj": torch.randn(6, 2)}, rank=2, base=base_name)
    merge_checkpoint(plan_merge(open_checkpoint(folder / "base"), [adapter]), folder / "merged")
    return ModelCard.load(folder / "merged" / "README.md")


def test_card_names_its_base_and_inherits_the_license(tmp_path: Path) -> None:
    card = "---\nlicense: llama3\nlanguage:\n- en\ndatasets:\n- some/set\n---\n\n# Base\n"
    data = merged_card(tmp_path, card, "org/base").data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "llama3"
    assert data["language"] == ["en"]
    assert "datasets" not in data  # the adapter was trained on others
    assert set(data["tags"]) == {"hra", "merge"}


@pytest.mark.parametrize("card", [None, "# no front matter\n", "---\n: [broken\n---\n", "---\n- a list\n---\n"])
def test_card_is_made_whatever_the_base_has(card: str | None, tmp_path: Path) -> None:
    data = merged_card(tmp_path, card, None).data.to_dict()
    assert data["library_name"] == "transformers"
    assert "base_model" not in data


@pytest.mark.parametrize("name", ["/home/me/models/base", "./base", "~/base", "models/of/mine"])
def test_card_does_not_publish_a_path_of_this_machine(name: str, tmp_path: Path) -> None:
    card = merged_card(tmp_path, None, name)
    assert "base_model" not in card.data.to_dict()
    assert name not in card.content
