"""A model with an adapter that takes training steps on command, in a process of its own.

One line on standard input is one command, one line of JSON on standard output its answer: `turn` trains for half a
second, one step at least, and says how long a step took; `memory` trains one more and says what it held. Libraries that
print write to standard error.

Memory is told twice. Resident memory is what the system sees: it moves by some percent from run to run, since the C
library keeps freed pages. It is read from /proc, because the record of `getrusage` cannot be cleared after loading. The
bytes of live tensors are exact: torch's CPU allocator reports every block to its profiler, and their running sum over a
step has a highest point. To it are added the tensors that Python holds between steps: the adapter's parameters, the
optimizer's state, whatever a layer keeps. The base and the batch, the same for all, are not in that sum. Counting what
autograd saves (`saved_tensors_hooks`) would miss temporary matrices, and everything inside gradient checkpoints.
"""

import gc
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO, cast, get_args

import torch
from peft import HRAConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from torch.autograd.profiler import profile

from benchmarks.llamas import checkpoint_gradients_
from hra_export.training.tuner import get_hra_model

Method = Literal["ours", "lora", "oft", "peft-hra"]
METHODS: tuple[Method, ...] = get_args(Method)
LEARNING_RATE = 1e-4
# A single step of some milliseconds would be timed with caches that the others' turns have filled.
TURN_SECONDS = 0.5
# What is left to everybody else when a trainee takes all the memory that it may have.
SPARE_BYTES = 2**30


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: as in tables and on the command line.
        rank: r of the adapter.
        tokens: in one row of the batch.
        batch: rows.
        directory: a causal language model in transformers' layout, trained in float32. None for a single layer.
        width: d of a single square `nn.Linear`; its input wants a gradient, as it does inside a model.
        targets: names of the linear layers that are adapted.
        checkpointing: gradients are checkpointed at every block.
    """

    name: str
    rank: int
    tokens: int
    batch: int = 1
    directory: str | None = None
    width: int = 0
    targets: Sequence[str] = ("linear",)
    checkpointing: bool = False


class Single(nn.Module):
    """One square linear layer with a name that PEFT can find."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, d) → (tokens, d)."""
        return self.linear(x)


def adapt(model: nn.Module, method: Method, rank: int, targets: Sequence[str]) -> PeftModel:
    """Put an adapter of a method on the targets of a model; everything else is frozen.

    LoRA has alpha = r and no dropout. OFT has the block size with which its number of parameters comes nearest to
    HRA's. The adapter's own parameters are float32, as PEFT has them by default.

    Args:
        model: is changed in place.
        method: `ours` is `get_hra_model`; the others are what PEFT makes of its configuration.
        rank: r, of HRA and of LoRA.
        targets: last parts of module paths.
    """
    names = list(targets)
    if method == "ours":
        return get_hra_model(model, HRAConfig(r=rank, target_modules=names))
    if method == "peft-hra":
        return get_peft_model(model, HRAConfig(r=rank, target_modules=names))
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names))
    size = oft_block_size(target_features(model, names), rank)
    return get_peft_model(model, OFTConfig(oft_block_size=size, target_modules=names))


def target_features(model: nn.Module, targets: Collection[str]) -> set[int]:
    """The in_features d of every linear layer whose name is among the targets."""
    return {
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }


def oft_block_size(features: Collection[int], rank: int) -> int:
    """The block size b that divides every d and brings OFT's d (b − 1) / 2 parameters a layer nearest to HRA's d r."""
    common = math.gcd(*features)
    return min((b for b in range(2, common + 1) if common % b == 0), key=lambda b: abs((b - 1) / 2 - rank))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def live_bytes() -> int:
    """Bytes of all tensors that Python holds, each piece of memory once."""
    gc.collect()
    # By exact type: the stand-ins of a compiler have no memory to ask for.
    kinds = (torch.Tensor, nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds and each.device.type == "cpu"]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


class Trainee:
    """A model, an adapter on it, and an optimizer, in float32 on the CPU.

    Attributes:
        parameters: how many are trained.
        loaded_bytes: resident memory with the model loaded, before the adapter is there.
    """

    def __init__(self, case: Case, method: Method) -> None:
        torch.manual_seed(0)
        model, self._pass = _language_model(case) if case.directory else _single_layer(case)
        self._loaded_tensors = live_bytes()
        self.loaded_bytes = resident_bytes("VmRSS")
        # Loading may peak higher than training: the record starts anew. Where that is forbidden, it includes loading.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._model = adapt(model, method, case.rank, case.targets).train()
        parameters = trainable(self._model)
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> None:
        """Forward, backward, AdamW, zero_grad."""
        self._pass(self._model)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def turn(self, seconds: float = TURN_SECONDS) -> dict[str, float]:
        """Step until so much time has passed; returns the mean time of a step."""
        started, steps, passed = time.perf_counter(), 0, 0.0
        while passed < seconds or not steps:
            self.step()
            steps, passed = steps + 1, time.perf_counter() - started
        return {"seconds": passed / steps}

    def memory(self) -> dict[str, int]:
        """The resident peak so far; of one more step, the tensors that outlive it and the highest sum of the others."""
        peak = resident_bytes("VmHWM")
        with profile(profile_memory=True) as record:
            self.step()
        held = live_bytes() - self._loaded_tensors
        assert record.kineto_results is not None
        events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
        live = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            highest = max(highest, live)
        return {"peak_bytes": peak, "held_bytes": held, "transient_bytes": highest}


def _language_model(case: Case) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    for parameter in model.parameters():
        # Into memory of its own: pages of a mapped file would count as they are first used.
        parameter.data = parameter.data.clone()
    model.config.use_cache = False
    if case.checkpointing:
        checkpoint_gradients_(model)
    ids = torch.randint(model.config.vocab_size, (case.batch, case.tokens))

    def forward_and_backward(adapted: nn.Module) -> None:
        adapted(input_ids=ids, labels=ids).loss.backward()

    return model, forward_and_backward


def _single_layer(case: Case) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    x, gradient = (torch.randn(case.batch * case.tokens, case.width) for _ in range(2))

    def forward_and_backward(adapted: nn.Module) -> None:
        adapted(x.detach().requires_grad_()).backward(gradient)

    return Single(case.width), forward_and_backward


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Resident memory of this process, at present or at its peak since the record last started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def limit_memory() -> None:
    """Let allocations fail before the system has to kill somebody: all that is free may be taken, but for a rest."""
    lines = Path("/proc/meminfo").read_text().splitlines() + Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = sizes["VmData"] + max(0, sizes["MemAvailable"] - SPARE_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def serve() -> None:
    """Load the case of the first argument (JSON) with the method of the second, and obey until input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainee = Trainee(Case(**json.loads(sys.argv[1])), cast(Method, sys.argv[2]))
    _answer(answers, {"parameters": trainee.parameters, "loaded_bytes": trainee.loaded_bytes})
    for number, line in enumerate(sys.stdin):
        if number == 0:
            limit_memory()
        try:
            _answer(answers, trainee.turn() if line.strip() == "turn" else trainee.memory())
        except (MemoryError, RuntimeError) as error:
            # What torch's CPU allocator raises is a RuntimeError like any other.
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            _answer(answers, {"failure": "out of memory"})
            return


def _answer(answers: TextIO, body: Mapping[str, object]) -> None:
    answers.write(json.dumps(body) + "\n")
    answers.flush()
