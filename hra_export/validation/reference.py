"""The reference: PyTorch in float32 with live HRA layers, and the same model without them.

Limits: everything runs on the CPU in float32 with the base's weights as stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hra_export.adapter import HraAdapter
from hra_export.attachment import Attachment, attach
from hra_export.checkpoint import Checkpoint
from hra_export.loading import load_model
from hra_export.strength import Interpolation

# Results that are hidden states, under the names graphs give them.
LAST_HIDDEN = ("last_hidden_state", "hidden_states")


@dataclass
class Reference:
    """A loaded base with adapters attached.

    Attributes:
        missing: parameters that the base lacks; the adapters' own stay even without the adapters.
    """

    model: nn.Module
    attachment: Attachment
    missing: set[str]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base, inside the block."""
        with self.attachment.disabled(keep=self.missing):
            yield

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by the names of graphs; those of an encoder before a decoder as `encoder/NAME`."""
        options = {} if "sample" in inputs else {"output_hidden_states": True}
        result = self.model(**inputs, **options)
        found = {name: value for name, value in result.items() if isinstance(value, Tensor)}
        if isinstance(found.get("encoder_last_hidden_state"), Tensor):
            found["encoder/last_hidden_state"] = found.pop("encoder_last_hidden_state")
        states = result.get("decoder_hidden_states") or result.get("hidden_states")
        for name in LAST_HIDDEN if states else ():
            found.setdefault(name, states[-1])
        return found

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], count: int) -> tuple[list[int], Tensor]:
        """Greedy continuation of a prompt, past any end of text, and its logits (count, vocabulary)."""
        tokens, rows = list(ids), []
        past = None
        for _ in range(count):
            fed = torch.tensor([tokens if past is None else tokens[-1:]])
            result: Any = self.model(input_ids=fed, past_key_values=past, use_cache=True)
            past = result.past_key_values
            rows.append(result.logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
        return tokens[len(ids) :], torch.stack(rows)

    @torch.inference_mode()
    def negative_log_likelihood(self, ids: Sequence[int]) -> float:
        """Sum over every token but the first."""
        tokens = torch.tensor([list(ids)])
        logits = self.model(input_ids=tokens).logits[0, :-1].double()
        return float(nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))

    @contextmanager
    def watched(self, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Show the outputs of modules whenever they run inside the block."""
        handles = [
            self.model.get_submodule(path).register_forward_hook(_watcher(path, see)) for path in dict.fromkeys(paths)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def make_reference(
    base: Checkpoint,
    adapters: Sequence[HraAdapter],
    config: Mapping[str, Any],
    *,
    strength: float = 1.0,
    interpolation: Interpolation = "geodesic",
) -> Reference:
    """Load a base and put adapters to work in it.

    Args:
        base: the weights.
        adapters: in the order they compose.
        config: of the candidate: its class and labels.
        strength: at which the adapters work.
        interpolation: of that strength.

    Raises:
        ConversionError: adapters that have no such strength.
        CheckpointError: the base cannot be loaded.
        MismatchError: the adapters do not fit it.
    """
    model, missing = load_model(base, config)
    return Reference(model, attach(model, *adapters, strength=strength, interpolation=interpolation), missing)


def _watcher(path: str, see: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            see(path, output)

    return hook
