"""Models as llama.cpp keeps them: in which order the rows of its tensors lie.

The order is transformers' own reading of GGUF files, done to row numbers: a `TensorProcessor` knows what llama.cpp's
converter did to the tensors of an architecture.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hra_export.errors import UnsupportedModelError

# Architectures with the rows of Llama's queries and keys, and without a `TensorProcessor` that says so.
PERMUTED = ("granite", "smollm3")


def is_known(architecture: str) -> bool:
    """Whether transformers reads files of llama.cpp's architecture of this name."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return _plain(architecture).removesuffix("encoder") in map(_plain, GGUF_SUPPORTED_ARCHITECTURES)


def tensor_processor(architecture: str, config: Mapping[str, object]) -> Any:
    """transformers' `TensorProcessor`, which turns a tensor of a file into a parameter.

    Args:
        architecture: llama.cpp's name of it.
        config: of the model, with its heads.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, LlamaTensorProcessor, TensorProcessor

    default = LlamaTensorProcessor if architecture in PERMUTED else TensorProcessor
    processor_class: Any = TENSOR_PROCESSORS.get(architecture, default)
    return processor_class(config=config)


def row_order(
    processor: Any, tensor: str, shape: tuple[int, int], *, mapping: Mapping[str, str] | None = None
) -> NDArray[np.int64]:
    """Which row of a tensor each output of its parameter is.

    Args:
        processor: of the tensor's model.
        tensor: llama.cpp's name.
        shape: (o, d), as it lies in a file.
        mapping: llama.cpp's names → transformers', where the processor asks for them.

    Raises:
        UnsupportedModelError: transformers does more to it than to put rows in another order.
    """
    for columns in dict.fromkeys((1, shape[1])):  # one is enough, where the reordering does not count columns
        try:
            order = _moved_rows(processor, tensor, (shape[0], columns), mapping or {})
        except ValueError:
            continue
        if order is not None:
            return order
    raise UnsupportedModelError(
        f"transformers takes the rows of `{tensor}` apart: its parameter has no order of its own for them"
    )


def _moved_rows(
    processor: Any, tensor: str, shape: tuple[int, int], mapping: Mapping[str, str]
) -> NDArray[np.int64] | None:
    numbers = np.broadcast_to(np.arange(shape[0])[:, None], shape).copy()
    held: dict[str, Any] = {}
    result = processor.process(
        weights=numbers, name=tensor, tensor_key_mapping=mapping, parsed_parameters={"tensors": held}
    )
    # GPT-2's head is put away, under the parameter's name; so is a part of what stands in several tensors.
    parts = [value.numpy() for value in held.values()] if result.name is None else [result.weights]
    for part in parts[:1]:
        for moved in (part, part.T):  # GPT-2 stores (d, o)
            if moved.shape == shape and np.array_equal(moved, np.broadcast_to(moved[:, :1], shape)):
                order: NDArray[np.int64] = moved[:, 0].astype(np.int64)
                return order
    return None


def _plain(name: str) -> str:
    """transformers spells llama.cpp's `qwen2moe` and `gpt-oss` as `qwen2_moe` and `gpt_oss`."""
    return re.sub("[-_]", "", name)
