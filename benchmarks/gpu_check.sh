#!/bin/sh
# One GPU, no network, under eight minutes: seconds and GPU memory of every stage at Qwen1.5-1.8B -> Qwen2.5-3B shapes.
# PYTHON: the interpreter of an environment with lorasuite; that of `make` by default.
set -e
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}"
exec timeout 480 "$PYTHON" benchmarks/gpu_check.py "$@"
