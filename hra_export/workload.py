"""What a graph is given to do when its speed is measured: prefill, decoding, one forward pass.

    a graph with a cache     prefill (`tokens` at once, nothing before) · decode (1 token after `tokens`)
    encoder and decoder      encode (`tokens`) · decode (1 token after `tokens`, `tokens` encoded)
    any other                forward

Feeds are made from what the graph says of its inputs: the names of the inputs and of their dynamic axes, as
`hra-export onnx`, ONNX Runtime GenAI's builder and optimum give them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hra_export.errors import GraphError
from hra_export.graph.swap_sites import ADAPTER_INDEX
from hra_export.graph.values import Array, TensorSpec, numpy_dtype

PAST = ("past_key_values", "past")
# Tokens that every vocabulary has, beyond the special ones.
FIRST_TOKEN, LAST_TOKEN = 4, 64
DEFAULT_PIXELS = 64


@dataclass(frozen=True)
class Load:
    """One kind of run.

    Attributes:
        name: `prefill`, `decode`, `encode` or `forward`.
        graph: stem of the file that runs.
        batch: rows.
        tokens: new ones of a row.
        past: those in the cache.
        source: those that an encoder has read.
        pixels: height and width, where the graph leaves them open.
    """

    name: str
    graph: str
    batch: int
    tokens: int
    past: int = 0
    source: int = 0
    pixels: int = DEFAULT_PIXELS


def loads_of(
    graphs: Mapping[str, Sequence[TensorSpec]], *, batch: int, tokens: int, pixels: int = DEFAULT_PIXELS
) -> list[Load]:
    """The loads of a model.

    Args:
        graphs: stem of the file → its inputs.
        batch: rows of each.
        tokens: of a row.
        pixels: height and width, where a graph leaves them open.
    """
    if {"encoder_model", "decoder_model"} <= graphs.keys():
        return [
            Load("encode", "encoder_model", batch, tokens, source=tokens),
            Load("decode", "decoder_model", batch, 1, past=tokens, source=tokens),
        ]
    (stem,) = graphs
    if any(spec.name.startswith(PAST) for spec in graphs[stem]):
        return [Load("prefill", stem, batch, tokens), Load("decode", stem, batch, 1, past=tokens)]
    return [Load("forward", stem, batch, tokens, source=tokens, pixels=pixels)]


def feeds_of(inputs: Sequence[TensorSpec], load: Load, *, widths: Mapping[str, int]) -> dict[str, Array]:
    """Random numbers of the right sizes for every input; the same for the same load.

    Args:
        inputs: without those that have defaults.
        load: how much.
        widths: sizes of dynamic axes that no load knows, a head's width for one.

    Raises:
        GraphError: a dynamic axis that nothing is known for; all of them.
    """
    random = np.random.default_rng(0)
    wanted = [spec for spec in inputs if spec.name != ADAPTER_INDEX]  # the session knows the rows' adapters
    shapes = {spec.name: [_size(axis, load, widths) for axis in spec.shape] for spec in wanted}
    if unknown := [f"`{spec.name}`: {spec}" for spec in wanted if None in shapes[spec.name]]:
        raise GraphError("the graph has inputs of sizes that nothing is known for", findings=unknown)
    return {spec.name: _filled(spec, [size or 0 for size in shapes[spec.name]], load, random) for spec in wanted}


def _size(axis: int | str | None, load: Load, widths: Mapping[str, int]) -> int | None:
    if isinstance(axis, int) or axis is None:
        return axis
    if axis in widths:
        return widths[axis]
    sizes = {
        "batch": load.batch,
        "total": load.past + load.tokens,
        "past": load.past,
        "encoder": load.source,
        "sequence": load.tokens,
        "height": load.pixels,
        "width": load.pixels,
    }
    return next((size for word, size in sizes.items() if word in axis.lower()), None)


def _filled(spec: TensorSpec, shape: Sequence[int], load: Load, random: np.random.Generator) -> Array:
    dtype = numpy_dtype(spec.dtype)
    if spec.name.endswith("mask"):
        return np.ones(shape, dtype)
    if spec.name == "position_ids":
        return np.broadcast_to(np.arange(load.past, load.past + load.tokens, dtype=dtype), shape).copy()
    if spec.name == "token_type_ids":
        return np.zeros(shape, dtype)
    if spec.name == "timestep":
        return np.ones(shape, dtype)
    if dtype.kind == "i":
        return random.integers(FIRST_TOKEN, LAST_TOKEN, shape, dtype)
    return random.standard_normal(shape).astype(dtype)
