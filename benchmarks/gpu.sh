#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: checks the numbers, times, prints one table, and writes
# benchmarks/results/gpu.json. What it runs, and its exit codes: benchmarks/gpu.py.
#
#   bash benchmarks/gpu.sh                on a machine with an NVIDIA GPU
#   bash benchmarks/gpu.sh --check        the same at toy size, on any machine
#
# Needs Python 3.11 with torch, triton, onnx and onnxruntime-gpu. Nothing is fetched. PYTHON names the interpreter; the
# default is .venv's, else python3. HRA_EXPORT_ORT_OP names an operator library that is built already.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# The package says its version from its metadata, which a checkout has none of.
if ! "$python" -c 'import importlib.metadata as m; m.version("hra-export")' 2>/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$work/site" . >&2 ||
    echo "hra-export's metadata cannot be made here (setuptools?): the operator library cannot be built" >&2
fi

code=0
"$python" -m benchmarks.gpu "$@" || code=$?
exit "$code"
