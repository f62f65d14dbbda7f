"""One place for the factors U and S of all chains of a model: found in one batched solve, reused while they hold.

A layer asks for its factors at each forward pass. When they are out of date, those of every chain of the same shape are
found together. They are up to date as long as

- the vectors are the same tensor at the same place with the same version counter,
- no optimizer has stepped: some write through raw pointers, which no counter sees,
- the model has been training with gradients since: elsewhere weights are swapped through `.data` (an average of
  weights before an evaluation, say), so that each pass of the model outside of training starts afresh.

So micro-batches of one step share their factors, and so do the second forward passes of gradient checkpointing.

Limits: vectors that are changed through `.data` between two micro-batches of one training step are not noticed.
Vectors that are sharded (FSDP, ZeRO-3) are known to their own layer alone, while it runs, and are factored there.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hra_export.reflection import Factors, factor, orthonormal_columns


@dataclass(frozen=True)
class _Entry:
    """Factors, and what they were made of."""

    vectors: "weakref.ref[Tensor]"
    stamp: tuple[int, int, int]  # address, version counter, epoch
    factors: Factors


class Workspace:
    """The factors of one model's chains.

    It listens to the forward passes of the model (`watch`) and to every optimizer step of the process; the latter
    through torch's own registry, until the workspace is gone.
    """

    def __init__(self) -> None:
        self._layers: list[HRALayer] = []
        self._begin()

    def _begin(self) -> None:
        self._entries: dict[tuple[int, str, torch.dtype], _Entry] = {}
        self._epoch = 0
        self._is_training = False
        me = weakref.ref(self)

        def after_step(optimizer: object, args: object, kwargs: object) -> None:
            if (workspace := me()) is not None:
                workspace.expire()

        weakref.finalize(self, register_optimizer_step_post_hook(after_step).remove)

    def __getstate__(self) -> dict[str, Any]:
        """A copied model gets a workspace of its own, with nothing in it yet."""
        return {"_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Listen anew."""
        self._layers = state["_layers"]
        self._begin()

    def add(self, layers: Iterable[HRALayer]) -> None:
        """Let layers take part in the batched solve."""
        known = {id(layer) for layer in self._layers}
        self._layers += [layer for layer in layers if id(layer) not in known]

    def watch(self, model: nn.Module) -> None:
        """Notice the forward passes of the whole model."""
        model.register_forward_pre_hook(self._before_forward)

    def expire(self) -> None:
        """Forget all factors: the vectors may have changed."""
        self._epoch += 1

    def _before_forward(self, model: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        is_training = model.training and torch.is_grad_enabled()
        if not (is_training and self._is_training):
            self.expire()
        self._is_training = is_training

    def factors(self, layer: HRALayer, adapter: str, dtype: torch.dtype) -> Factors:
        """The factors of one chain, for activations of `dtype`.

        Args:
            layer: holds the vectors (d, r) of `adapter`. Its Gram–Schmidt variant is orthonormalized first.
            adapter: its name.
            dtype: of the activations.
        """
        vectors = layer.hra_u[adapter]
        if self._is_due(layer, adapter, dtype, vectors):
            self._find(layer, adapter, dtype)
        return self._entries[id(layer), adapter, dtype].factors

    def _is_due(self, layer: HRALayer, adapter: str, dtype: torch.dtype, vectors: Tensor) -> bool:
        entry = self._entries.get((id(layer), adapter, dtype))
        return entry is None or entry.vectors() is not vectors or entry.stamp != self._stamp(vectors)

    def _stamp(self, vectors: Tensor) -> tuple[int, int, int]:
        # Inference tensors have no counter, and cannot be changed in place outside of inference mode.
        version = -1 if vectors.is_inference() else vectors._version
        return vectors.data_ptr(), version, self._epoch

    @torch.no_grad()
    def _find(self, layer: HRALayer, adapter: str, dtype: torch.dtype) -> None:
        """Find the factors of this chain and of all like it that are out of date."""
        own, orthogonalize = layer.hra_u[adapter], layer.hra_apply_GS[adapter]
        together = {(id(layer), adapter): own}
        # With ZeRO-3 (`ds_id`) a look at another layer's vectors gathers them: a meeting of all processes.
        for other in [] if hasattr(own, "ds_id") else self._layers:
            for name in other.active_adapters:
                if name in other.hra_u and other.hra_apply_GS[name] == orthogonalize:
                    vectors = other.hra_u[name]
                    if (
                        _is_whole(vectors)
                        and _kind(vectors) == _kind(own)
                        and self._is_due(other, name, dtype, vectors)
                    ):
                        together[id(other), name] = vectors
        stacked = torch.stack(list(together.values()))  # (chains, d, r)
        if orthogonalize:
            stacked = orthonormal_columns(stacked.to(torch.promote_types(stacked.dtype, torch.float32)))
        batch = factor(stacked, dtype)
        for (key, vectors), u, s in zip(together.items(), batch.u.unbind(), batch.s.unbind(), strict=True):
            self._entries[*key, dtype] = _Entry(weakref.ref(vectors), self._stamp(vectors), Factors(u, s))


def _kind(vectors: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return vectors.shape, vectors.dtype, vectors.device


def _is_whole(vectors: Tensor) -> bool:
    """Whether all of it is here: not a shard, not an empty stand-in for one."""
    return type(vectors) in (Tensor, nn.Parameter) and vectors.ndim == 2 and vectors.untyped_storage().size() > 0
