"""Greedy answers from an exported decoder, in ONNX Runtime and in ONNX Runtime GenAI: both as they come from PyPI.

`demo.py` uses these; they are also what a program that serves such a directory begins with.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def answer_with_onnxruntime(directory: Path, prompt: list[int], *, stop: set[int], max_new_tokens: int) -> list[int]:
    """Continue a prompt, feeding the cache that each step gives to the next.

    Args:
        directory: with `model.onnx` of a decoder and its `config.json`.
        prompt: token ids.
        stop: ids that end the answer; the answer does not hold them.
        max_new_tokens: at most so many.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((directory / "config.json").read_text())
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    names = [each.name for each in session.get_inputs()]
    caches = [name for name in names if CACHE.fullmatch(name)]
    empty = np.zeros((1, config["num_key_value_heads"], 0, head_size), np.float32)
    past: dict[str, Any] = dict.fromkeys(caches, empty)
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    answer: list[int] = []
    step, seen = prompt, 0
    while len(answer) < max_new_tokens:
        seen += len(step)
        feeds = {
            "input_ids": np.array([step]),
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(seen - len(step), seen)[None],
        }
        logits, *present = session.run(outputs, {name: feeds.get(name, past.get(name)) for name in names})
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
        past, step = dict(zip(caches, present, strict=True)), [token]
    return answer


def answer_with_genai(directory: Path, prompt: list[int], *, stop: set[int], max_new_tokens: int) -> list[int]:
    """The same through the generator of ONNX Runtime GenAI, which keeps the cache itself."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(directory))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, batch_size=1, max_length=len(prompt) + max_new_tokens)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    return [token for token in tokens if token not in stop]
