"""Real text: prompts through the candidate's own tokenizer and chat template, and pieces of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hra_export.errors import CheckpointError, OutputError

# Neutral prompts of different lengths.
PROMPTS = (
    "The capital of France is",
    "List three things that are needed to make bread.",
    "A train leaves at nine and arrives at noon. How long is the journey, and when does it end if it starts at ten?",
)
NEW_TOKENS = 16
WINDOW = 256  # tokens of a text that are scored at once
MAX_WINDOWS = 16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and whether its prompts go through a chat template."""

    inner: Any

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, as the model is spoken to."""
        if getattr(self.inner, "chat_template", None):
            message = [{"role": "user", "content": text}]
            templated = self.inner.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            return list(self.inner(templated, add_special_tokens=False)["input_ids"])
        return list(self.inner(text)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens included."""
        decoded: str = self.inner.decode(list(ids))
        return decoded

    def windows(self, path: Path, longest: int) -> list[list[int]]:
        """A text file in pieces of at most `WINDOW` tokens; at most `MAX_WINDOWS` of them.

        Raises:
            OutputError: the file cannot be read.
            CheckpointError: it is not text, or too short to score.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot read `{path}`: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"`{path}` is not UTF-8 text") from error
        ids = list(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"])
        size = min(WINDOW, longest)
        windows = [ids[start : start + size] for start in range(0, min(len(ids), size * MAX_WINDOWS), size)]
        found = [window for window in windows if len(window) > 1]
        if not found:
            raise CheckpointError(f"`{path}` has no two tokens to score")
        return found


def find_tokenizer(*folders: Path) -> Tokenizer | None:
    """The tokenizer of the first folder that has one; no remote code, no network.

    Raises:
        CheckpointError: it has one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            try:
                return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"the tokenizer in `{folder}` cannot be loaded: {error}") from error
    return None
