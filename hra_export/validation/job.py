"""What the child process is asked to run, as plain values: a file of JSON and one of arrays for each feed.

    job.json        provider, operator, graphs, runs
    ARRAYS.npz      feeds of one step
    answer.json     what became of each run, or why there is none
    RUN.npz         `STEP/OUTPUT` → array

A run is a sequence of steps. Outputs flow on: what a step names in `flow` is taken from the steps before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

Array = NDArray[Any]

JOB, ANSWER, PROGRESS = "job.json", "answer.json", "progress"


@dataclass(frozen=True)
class Step:
    """One run of one graph.

    Attributes:
        graph: its role.
        feeds: input → array.
        flow: input → output of an earlier step, as `ROLE/OUTPUT`.
        keep: outputs that are wanted.
    """

    graph: str
    feeds: Mapping[str, Array]
    flow: Mapping[str, str] = field(default_factory=dict)
    keep: Sequence[str] = ()


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding: how the steps after the first go on, one token each.

    Attributes:
        graph: the decoder's role.
        count: tokens to decode.
        tokens: input that takes ids.
        cache: input → output, of the cache; empty for a graph that reads all tokens again.
        mask: input that takes a mask of all tokens so far, or None.
        positions: input that takes positions, or None.
        logits: output.
    """

    graph: str
    count: int
    tokens: str
    cache: Mapping[str, str]
    mask: str | None
    positions: str | None
    logits: str = "logits"


@dataclass(frozen=True)
class Run:
    """Steps in order, then perhaps decoding or scoring.

    Attributes:
        name: for people.
        steps: at least one.
        greedy: decode on from the last step.
        scored: keep of the last step's logits only the log-likelihood of its own next tokens.
        rows: which rows of the batch have the adapter, in a graph whose rows name theirs; empty for all.
    """

    name: str
    steps: Sequence[Step]
    greedy: Greedy | None = None
    scored: bool = False
    rows: Sequence[bool] = ()


@dataclass(frozen=True)
class Generation:
    """Greedy decoding by ONNX Runtime GenAI's own generator.

    Attributes:
        name: for people.
        ids: of the prompt.
        count: tokens to decode, fewer when one ends the text.
    """

    name: str
    ids: Sequence[int]
    count: int


@dataclass(frozen=True)
class Job:
    """Everything one child does.

    Attributes:
        graphs: role → file.
        provider: `cpu`, `cuda` or `tensorrt`.
        runs: in order.
        adapters: role → the `.onnx_adapter` file to switch on in that graph; for ONNX Runtime GenAI, `model`.
        genai: a directory of ONNX Runtime GenAI, or None.
        generations: what its generator is asked for, after the runs.
        operator: library with kernels for the reflections, `auto` for the one that is found, None for none.
    """

    graphs: Mapping[str, Path]
    provider: str
    runs: Sequence[Run] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    genai: Path | None = None
    generations: Sequence[Generation] = ()
    operator: Path | Literal["auto"] | None = "auto"

    @property
    def names(self) -> list[str]:
        """Of everything that is answered, in order."""
        return [run.name for run in self.runs] + [each.name for each in self.generations]
