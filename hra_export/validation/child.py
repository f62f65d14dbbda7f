"""The child process that runs the runtime: a crash in there is seen from outside, as a failure.

It reads a job from a directory, writes its answer there, and knows nothing of PyTorch. It is started with the
directory's path; nothing it prints counts.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hra_export.errors import DeviceError, HraExportError
from hra_export.validation.job import ANSWER, JOB, PROGRESS, Array

if TYPE_CHECKING:
    from hra_export.graph.native import OperatorChoice
    from hra_export.graph.session import GraphSession

ADAPTER = "adapter"


class Session:
    """A session whose feeds need not have the graph's dtypes, with one adapter switched on or none."""

    def __init__(self, inner: Any, adapter: str | None) -> None:
        self._inner = inner
        self._adapter = adapter
        self._dtypes = {spec.name: spec.dtype for spec in inner.inputs}

    def run(self, feeds: Mapping[str, Any], rows: Sequence[bool] = ()) -> dict[str, Any]:
        """Outputs by name; the adapter in some rows only, when rows are told."""
        cast = {name: _cast(value, self._dtypes.get(name)) for name, value in feeds.items()}
        chosen: dict[str, Any] = {"adapter": self._adapter}
        if rows:
            chosen = {"adapters": [self._adapter if has_adapter else None for has_adapter in rows]}
        outputs: dict[str, Any] = self._inner.run(cast, **chosen)
        return outputs


def main(directory: str) -> int:
    """Do the job in a directory and write the answer.

    Returns:
        0 when there is an answer, of whatever kind.
    """
    root = Path(directory)
    job = json.loads((root / JOB).read_text())
    try:
        operators: dict[str, Any] = {}
        answers = [*_run_all(root, job, operators), *_generate_all(root, job, operators)]
        answer: dict[str, Any] = {"answers": answers, "operators": operators}
    except HraExportError as error:
        details = {"message": error.message, "findings": list(error.findings), "hint": error.hint}
        answer = {"error": {"kind": type(error).__name__, **details}}
    (root / ANSWER).write_text(json.dumps(answer))
    return 0


def _run_all(root: Path, job: Mapping[str, Any], operators: dict[str, Any]) -> list[dict[str, Any]]:
    (root / PROGRESS).write_text("loading the graph")
    sessions = {}
    for role, path in job["graphs"].items():
        opened = _open(Path(path), job, job["adapters"].get(role))
        operators[role] = _told(opened.operator, opened.native_nodes)
        sessions[role] = Session(opened, None if job["adapters"].get(role) is None else ADAPTER)
    answers = []
    for index, run in enumerate(job["runs"]):
        (root / PROGRESS).write_text(run["name"])
        try:
            kept, further = _run(root, sessions, run)
        except DeviceError:
            raise
        except Exception as error:  # whatever the runtime raises about one input is that input's failure
            answers.append({"error": f"{type(error).__name__}: {error}"})
            continue
        np.savez(root / f"run{index}.npz", allow_pickle=False, **kept)
        answers.append(further)
    return answers


def _generate_all(root: Path, job: Mapping[str, Any], operators: dict[str, Any]) -> list[dict[str, Any]]:
    """What ONNX Runtime GenAI's generator says."""
    if job["genai"] is None:
        return []
    from hra_export.graph.genai import GenaiModel

    (root / PROGRESS).write_text("loading the directory into ONNX Runtime GenAI")
    model = GenaiModel.open(Path(job["genai"]), provider=job["provider"], operator=_operator(job))
    operators["genai"] = _told(model.operator, model.reflections)
    file = job["adapters"].get("model")
    chosen = None if file is None else ADAPTER
    if chosen is not None:
        model.load_adapter(chosen, Path(file))
    answers: list[dict[str, Any]] = []
    for each in job["generations"]:
        (root / PROGRESS).write_text(each["name"])
        try:
            said = model.generate(each["ids"], max_new_tokens=each["count"], adapter=chosen)
            answers.append({"tokens": list(said.tokens)})
        except Exception as error:  # as above
            answers.append({"error": f"{type(error).__name__}: {error}"})
    return answers


def _open(path: Path, job: Mapping[str, Any], adapter: str | None) -> "GraphSession":
    from hra_export.graph.session import GraphSession

    session = GraphSession.open(path, provider=job["provider"], operator=_operator(job))
    if adapter is not None:
        session.load_adapter(ADAPTER, Path(adapter))
    return session


def _operator(job: Mapping[str, Any]) -> Any:
    """A path, `auto` or None."""
    return job["operator"] if job["operator"] in ("auto", None) else Path(job["operator"])


def _told(choice: "OperatorChoice", nodes: int) -> dict[str, Any]:
    """What ran the reflections, as plain values."""
    library = choice.library.to_json() if choice.library is not None else None
    return {"library": library, "nodes": nodes, "reason": choice.reason}


def _run(
    root: Path, sessions: Mapping[str, Session], run: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """One run: the outputs that are wanted, and tokens or scores."""
    kept: dict[str, Array] = {}
    state: dict[str, Any] = {}
    feeds: dict[str, Any] = {}
    for index, step in enumerate(run["steps"]):
        with np.load(root / step["feeds"], allow_pickle=False) as arrays:
            feeds = {name: arrays[name] for name in arrays.files}
        feeds |= {name: state[source] for name, source in step["flow"].items()}
        outputs = sessions[step["graph"]].run(feeds, run["rows"])
        state |= {f"{step['graph']}/{name}": value for name, value in outputs.items()}
        kept |= {f"{index}/{name}": _plain(outputs[name]) for name in step["keep"] if name in outputs}
    further: dict[str, Any] = {}
    if run["greedy"] is not None:
        further["tokens"] = _greedy(sessions, state, feeds, run["greedy"])
    if run["scored"]:
        further["scores"] = _scores(kept, feeds["input_ids"])
        kept = {}
    return kept, further


def _greedy(
    sessions: Mapping[str, Session], state: dict[str, Any], feeds: dict[str, Any], plan: Mapping[str, Any]
) -> list[int]:
    """Continue one row, one token a step, each from the cache of the one before."""
    graph, ids = plan["graph"], feeds[plan["tokens"]]
    tokens: list[int] = []
    while True:
        scores = _plain(state[f"{graph}/{plan['logits']}"])
        tokens.append(int(scores[0, -1].argmax()))
        if len(tokens) == plan["count"]:
            return tokens
        ids = np.concatenate([ids, np.array([[tokens[-1]]], dtype=ids.dtype)], axis=1)
        total = ids.shape[1]
        feeds = dict(feeds) | {plan["tokens"]: ids[:, -1:] if plan["cache"] else ids}
        feeds |= {name: state[f"{graph}/{output}"] for name, output in plan["cache"].items()}
        if plan["mask"]:
            feeds[plan["mask"]] = np.ones((1, total), dtype=np.int64)
        if plan["positions"]:
            start = total - 1 if plan["cache"] else 0
            feeds[plan["positions"]] = np.arange(start, total, dtype=np.int64)[None]
        outputs = sessions[graph].run(feeds)
        state |= {f"{graph}/{name}": value for name, value in outputs.items()}


def _scores(kept: Mapping[str, Array], ids: Array) -> dict[str, float]:
    """Sum of the negative log-likelihoods of every token but the first."""
    (scores,) = kept.values()
    shifted = scores[:, :-1].astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logs, ids[:, 1:, None].astype(np.int64), axis=-1)
    return {"nll": float(-chosen.sum()), "tokens": int(chosen.size)}


def _cast(value: Any, dtype: str | None) -> Any:
    """A feed in the graph's dtype; files of arrays hold no bfloat16."""
    if dtype != "bfloat16":
        return value
    from hra_export.graph.values import BFLOAT16

    return value.astype(BFLOAT16)


def _plain(value: Any) -> Array:
    """An array whose dtype a file of arrays can hold: bfloat16 becomes float32, which has every value of it."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
