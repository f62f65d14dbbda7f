"""Starting: the wall time of `hra-export --help` beside that of a bare interpreter, in one interleaved run.

    python -m benchmarks.startup [--rounds 20]

The bar is on `--help`: at most 0.3 s. The rest is for comparison: a verb's own help, and what importing torch adds.
"""

import argparse
import sys

from benchmarks.harness import Contender, as_data, interleave, median, report

BAR_SECONDS = 0.3
PROGRAM = "from hra_export.cli import main; main()"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    contenders = [
        Contender("python -c pass", [sys.executable, "-c", "pass"]),
        Contender("hra-export --help", [sys.executable, "-c", PROGRAM, "--help"]),
        Contender("hra-export merge --help", [sys.executable, "-c", PROGRAM, "merge", "--help"]),
        Contender("python -c 'import torch'", [sys.executable, "-c", "import torch"]),
    ]
    runs = interleave(contenders, arguments.rounds)
    rows = []
    for contender in contenders:
        bar = f"{BAR_SECONDS} s" if contender.name == "hra-export --help" else ""
        rows.append([contender.name, f"{median(runs[contender.name]) * 1000:.0f} ms", bar])
    report("startup", ["command", "median wall", "bar"], rows, {"bar_seconds": BAR_SECONDS, "runs": as_data(runs)})


if __name__ == "__main__":
    main()
