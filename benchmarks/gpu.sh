#!/usr/bin/env bash
# Everything a GPU is for, in one call of under nine minutes and without a network: build for the GPU
# at hand, run all tests with CUDA required, run the GPU benchmarks. What `make gpu` does.
#
# PYTHON must hold torch (CUDA), pybind11, cmake, ninja, pytest and wgpt's dependencies. Results go to
# $OUT, or build/gpu-results. Exit status: 0 when the build and the tests passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu-results}
JOBS=${JOBS:-$(nproc)}
TEST_LIMIT_S=${TEST_LIMIT_S:-230}
BENCH_LIMIT_S=${BENCH_LIMIT_S:-50}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

archs=$("$PYTHON" - <<'PY'
import torch
major, minor = torch.cuda.get_device_capability()  # raises without a GPU, with torch's own reason
print({(9, 0): "90a"}.get((major, minor), f"{major}{minor}"))
PY
) || exit 1
echo "== build for sm_$archs"
WGPT_CUDA_ARCHS=$archs make dev DEV_PYTHON="$PYTHON" DEV_CUDA=ON DEV_BUILD=build/gpu JOBS="$JOBS" \
  2>&1 | tee "$OUT/build.log" || exit 1
"$PYTHON" -m wgpt.doctor | tee "$OUT/doctor.txt"

echo "== tests, CUDA required"
WGPT_REQUIRE_CUDA=1 timeout "$TEST_LIMIT_S" "$PYTHON" -m pytest -q --maxfail=20 ${ARGS:-} \
  2>&1 | tee "$OUT/tests.log"
tests=$?

echo "== benchmarks"
for script in benchmarks/bench_*.py; do
  echo "-- $script"
  timeout "$BENCH_LIMIT_S" "$PYTHON" "$script" --device cuda 2>&1 \
    | tee "$OUT/$(basename "$script" .py).log" || echo "$script: stopped or failed"
done
exit "$tests"
