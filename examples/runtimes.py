"""Greedy answers from an exported decoder or a converted adapter, in runtimes as they come from PyPI.

ONNX Runtime, ONNX Runtime GenAI, PEFT and llama.cpp. `demo.py` uses these; they are also what a program that serves
such a file begins with.
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


def answer_with_peft(base: Path, lora: Path, prompt: str, *, max_new_tokens: int) -> str:
    """Continue a prompt with a converted adapter in stock PEFT.

    Args:
        base: directory of the model that the adapter was converted for.
        lora: directory that `hra-export convert --to lora` wrote.
        prompt: text.
        max_new_tokens: at most so many.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    text: str = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def answer_with_llama_cpp(gguf: Path, lora: Path, prompt: str, *, max_new_tokens: int) -> str:
    """Continue a prompt with a converted adapter in llama.cpp, on the model in the bits that it has.

    Args:
        gguf: the model file that the adapter was converted for.
        lora: file that `hra-export convert --to gguf` wrote.
        prompt: text.
        max_new_tokens: at most so many.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_parallel, params.n_ctx, params.verbosity = 1, 512, -1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0})
    text: str = answer["choices"][0]["text"]
    return text
