"""The files beside the weights of an output: copied from the base and the adapters, or changed."""

import json
from pathlib import Path, PurePosixPath

from hra_export.plan import MergePlan

# Files that a tokenizer or processor consists of; the adapter directory's own copy wins over the base's.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def companion_files(plan: MergePlan) -> dict[str, Path]:
    """Output name → file to copy: the base's companions, the adapters' own tokenizer files winning."""
    found = {str(name): plan.base.root / name for name in plan.base.companions()}
    if not plan.base.component:  # a pipeline keeps its tokenizers in folders of their own
        for adapter in plan.sources:
            found |= tokenizer_files(adapter.path)
    return found


def tokenizer_files(folder: Path | None) -> dict[str, Path]:
    """Name → path of each file of a tokenizer or processor in an adapter's directory, if it has one."""
    paths = [] if folder is None else [folder / name for name in TOKENIZER_FILES]
    return {path.name: path for path in paths if path.is_file()}


def changed_config(plan: MergePlan) -> dict[str, bytes]:
    """The configuration under its output name when it must change; empty when the base's is copied."""
    if not plan.config_changes:
        return {}
    config = {**plan.base.config, **plan.config_changes}
    name = str(PurePosixPath(plan.base.component) / "config.json")
    return {name: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
