"""All that needs a GPU, in one run of less than nine minutes: one table at the end, and `results/gpu.json`.

    bash benchmarks/gpu.sh [--check] [--only PART …]

    reflect_gpu    the kernels against torch's calls, against the base product, and against their floors
    onnx_gpu       graphs in ONNX Runtime: merged, inlined, native, LoRA's nodes; int4 and fp16; 1 to 64 rows
    train_gpu      training steps of blocks of llamas: our kernels, the plain layers, PEFT's LoRA, OFT and HRA

The operator library is the one that `HRA_EXPORT_ORT_OP` or the package has, or is built first, with nvcc from the path
or from PyPI's packages. Every part is a process of its own with a limit of its own, and compares its numbers before it
times them; what it has finished by then is in the table. A part whose packages are missing is left out, and said so.

`--check` runs every part at toy size on any machine, the Triton kernels in their interpreter. Exit codes: 7 without a
GPU, 1 when a part failed, with all other figures.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.ceilings import clocks
from benchmarks.harness import report, say, work_folder
from benchmarks.native_library import native_library

GRACE_SECONDS = 10
NO_GPU = 7


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        name: of the module, and of its results.
        budget: seconds after which it begins nothing new.
        limit: seconds after which it is interrupted; it reports what it has.
        packages: modules that it cannot do without.
        arguments: of the module.
    """

    name: str
    budget: int
    limit: int
    packages: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


TRAINED = ("1B-all-eager", "8B-all-eager", "1B-all-compiled", "8B-all-compiled")
ONNX = ("8B-int4", "8B-fp16", "1B-int4", "1B-fp16")
# With a minute and a half for the build, and half a minute for the starts: below nine minutes.
PARTS = (
    Part("reflect_gpu", 100, 125, ("torch", "triton"), ("--rounds", "3")),
    Part("onnx_gpu", 90, 150, ("torch", "onnx", "onnx_ir", "onnxruntime", "scipy"), ("--rounds", "3", "--only", *ONNX)),
    Part("train_gpu", 90, 130, ("torch", "triton", "transformers", "peft"),
         ("--rounds", "3", "--layers", "4", "--only", *TRAINED)),
)  # fmt: skip
BUILD_SECONDS = 90
HEADER = ["part", "case", "variant", "figure", "compared", "verdict"]


class BuildTooLong(Exception):  # noqa: N818  caught where it is raised
    """The operator library is not built in time."""


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the numbers at toy size, time nothing")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    arguments = parser.parse_args()
    chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    if not arguments.check and not has_gpu():
        say("error: these benchmarks need an NVIDIA GPU, and torch sees none")
        sys.exit(NO_GPU)
    sys.exit(run(chosen, checks=arguments.check))


def has_gpu() -> bool:
    """Whether torch sees a GPU; asked of a process of its own, which takes no memory on it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run(parts: Sequence[Part], *, checks: bool) -> int:
    """Run parts, print the table, and write the results of what was measured; returns the exit code."""
    began = time.monotonic()
    states: dict[str, str] = {}
    with work_folder(None) as work:
        signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(0 if checks else BUILD_SECONDS)
        try:
            library, origin = native_library(work, cuda="off" if checks else "auto")
        except BuildTooLong:
            library, origin = None, f"native variants are left out: not built within {BUILD_SECONDS} s"
        signal.alarm(0)
        say(origin)
        environment = {**os.environ, **({"HRA_EXPORT_ORT_OP": str(library.path)} if library else {})}
        for part in parts:
            states[part.name] = run_part(part, environment, checks=checks)
            say(f"{part.name}: {states[part.name]}")
    rows = [row for part in parts for row in summary(part.name, states[part.name], checks=checks)]
    seconds = time.monotonic() - began
    if checks:
        sys.stdout.write(harness.as_table(HEADER, rows))
    else:
        about = {"operator": origin, "seconds": seconds, "states": states, "clocks": clocks()}
        report("gpu", HEADER, rows, {**about, "parts": {part.name: results(part.name) for part in parts}})
    say(f"{seconds:.0f} s in all; {origin}")
    return int(any(state.startswith("failed") for state in states.values()))


def run_part(part: Part, environment: Mapping[str, str], *, checks: bool) -> str:
    """Run one part; returns what became of it: done, failed …, left out …."""
    if part.missing:
        return f"left out: no {', '.join(part.missing)}"
    if checks:
        arguments = ["--check"]
    else:
        arguments = [*part.arguments, "--budget", str(part.budget)]
        (harness.RESULTS / f"{part.name}.json").unlink(missing_ok=True)  # what is there afterwards is of this run
    command = [sys.executable, "-m", f"benchmarks.{part.name}", *arguments]
    # Its own table goes to stderr: there is one on stdout, at the end.
    with subprocess.Popen(command, env=dict(environment), stdout=2, preexec_fn=_take_interrupts) as process:
        for stop, seconds in ((signal.SIGINT, part.limit), (signal.SIGKILL, GRACE_SECONDS)):
            try:
                code = process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(stop)
        else:
            return f"failed: killed after {part.limit + GRACE_SECONDS} s"
    return "done" if code == 0 else f"failed with {code}"


def _take_interrupts() -> None:
    """A shell's background job ignores interrupts, and what it starts would do so too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def results(name: str) -> dict[str, Any]:
    """What a part has written; nothing where it has not."""
    path: Path = harness.RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def summary(name: str, state: str, *, checks: bool) -> list[list[str]]:
    """The rows of one part in the table."""
    rows = [[name, "", "", state, "", ""]]
    body = {} if checks else results(name)
    if name == "reflect_gpu":
        rows += [[name, what, "reflect", worst, f"best {best}, bar {bar}", verdict]
                 for what, bar, worst, best, verdict in body.get("bars", [])]  # fmt: skip
        return rows
    table = body.get("table", [[]])
    for row in (dict(zip(table[0], each, strict=True)) for each in table[1:]):
        if name == "train_gpu":
            compared = f"{row['÷ LoRA']} of LoRA's" if row["÷ LoRA"] else ""
            rows.append([name, row["case"], row["adapter"], f"{row['s a step']} s a step", compared, ""])
        elif row["batch"] in ("1", "64") and "CUDA graph" in row["variant"]:
            case = f"{row['case']}, batch {row['batch']}"
            compared = f"{row['÷ merged with CUDA graph']} of merged's time"
            rows.append([name, case, row["variant"], f"{row['tokens/s']} tokens/s", compared, ""])
    return rows


def _give_up(*_: object) -> None:
    raise BuildTooLong


if __name__ == "__main__":
    main()
