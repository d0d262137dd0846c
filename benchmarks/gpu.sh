#!/usr/bin/env bash
# All that a machine with a GPU is asked, in two parts of less than 8 minutes each: `check`, whether it is right and how fast,
# then `study`, what that costs. It needs torch, torchvision, fastai, pytest-xdist and pytest-timeout, but nothing of nbdev, and no git.
# A step that fails does not keep the others from running, except where the steps are not captured at all.
set -uo pipefail
part=${1:?usage: benchmarks/gpu.sh check|study FOLDER} out=${2:?usage: benchmarks/gpu.sh check|study FOLDER}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
device=${DEVICE:-cuda} n_train=${N_TRAIN:-6400} n_bench=${N_BENCH:-60000} python=${PYTHON:-python3}
mkdir -p "$out"
step() { timeout $(($1*${PATIENCE:-1})) "${@:2}" 2>&1 | tee -a "$out/$part.log"; }
case $part in
check)
  step 90 $python benchmarks/gpu.py check "$out/check.json" --device $device --n_train $n_train
  grep -q '"engine": "graph"' "$out/check.json" || exit 1
  step 100 $python benchmarks/bench.py --device $device --rounds 1 --only fast --whole --n_train $n_bench --out "$out/cuda.json"
  step 150 $python -m pytest -q -n 4 --timeout 60 -m cuda tests/test_fast.py
  step 120 $python benchmarks/bench.py --device $device --rounds 1 --only fast reference --whole --n_train $n_bench --out "$out/cuda.json" ;;
study)
  step 90 $python benchmarks/deterministic.py --device $device --n_train $n_bench --out "$out/deterministic.json"
  step 200 $python benchmarks/gpu.py study "$out/study.json" --device $device --n_train $n_train
  step 110 $python benchmarks/bench.py --device $device --rounds 1 --only plain pytorch 'pytorch compiled' 'fast bf16' --n_train $n_bench --out "$out/ways.json" ;;
esac
