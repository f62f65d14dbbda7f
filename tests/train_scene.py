"""Tiny bases with tokenizers, and rows for them, for the tests of `hra-export train`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.tiny_models import VOCABULARY, build

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
WORDS = (
    *["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    *["plus", "is", "good", "bad", "fine", "poor", "the", "a", "and"],
)
SPREAD, SPREAD_EMBEDDING = 8.0, 25.0
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<{{ message.role }}> {% if message.role == 'assistant' %}{% generation %}{{ message.content }} </s>"
    "{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """A tokenizer of whole words, every one of which is in the vocabulary of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    assert len(vocabulary) < VOCABULARY
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)


def save_base(folder: Path, name: str = "llama", *, chat: bool = True) -> Path:
    """A causal language model of `tests.tiny_models` with a tokenizer."""
    _spread_(build(name)).save_pretrained(folder)
    save_tokenizer(folder, chat=chat)
    return folder


def save_encoder(folder: Path) -> Path:
    """A BERT without a head."""
    _spread_(build("bert").bert).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _spread_(model: Any) -> Any:
    """Weights as they are after a training: drawn small, different inputs come out all the same."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data *= SPREAD_EMBEDDING if "embed" in name else SPREAD
    return model


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Prompts with completions: sums of two numbers."""
    pairs = [(i % 5, (i // 5 + i) % 6) for i in range(count)]
    return [{"prompt": f"{WORDS[a]} plus {WORDS[b]} is", "completion": f" {WORDS[a + b]}"} for a, b in pairs]


def chats(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """The same as messages."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in sums(count)
    ]


def opinions(count: int) -> list[dict[str, str]]:
    """Texts with one of two labels."""
    words = (("good", "fine"), ("bad", "poor"))
    return [
        {"text": f"the {WORDS[i % 11]} is {words[i % 2][i // 2 % 2]}", "label": ("up", "down")[i % 2]}
        for i in range(count)
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def arguments(options: Mapping[str, object] | Sequence[str] = (), **more: object) -> list[str]:
    """Options of the command line from keywords: `max_steps=4` is `--max-steps 4`, True is a flag."""
    words: list[str] = list(options)
    for name, value in more.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return words
