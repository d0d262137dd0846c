#!/usr/bin/env bash
# All that a machine with a GPU is asked, in the order of what matters: whether it is right, then how fast it is.
# It needs torch, torchvision, fastai and pytest, and nothing of nbdev. A part that fails does not keep the others from running.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh FOLDER}
cd "$(dirname "$0")/.."
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt"
timeout 300 python3 -m pytest -m cuda tests/test_fast.py tests/test_resume.py 2>&1 | tee "$out/pytest.log"
timeout 300 python3 benchmarks/bench.py --device cuda --rounds 1 --whole --out "$out/cuda.json" 2>&1 | tee "$out/bench.log"
timeout 120 python3 benchmarks/deterministic.py --out "$out/deterministic.json" 2>&1 | tee "$out/deterministic.log"
