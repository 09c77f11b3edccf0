#!/usr/bin/env bash
# Everything a GPU is for, in one call of under nine minutes and without a network: build for the GPU
# at hand, record the golden files the emulator must reproduce, run all tests with CUDA required, run
# compute-sanitizer where it is, run the GPU benchmarks. What `make gpu` does.
#
# PYTHON must hold torch (CUDA), pybind11, cmake, ninja, pytest and wgpt's dependencies. Results go to
# $OUT, or benchmarks/results/gpu: JSON, and the same as markdown tables. Exit status: 0 when the
# build and the tests passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
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

echo "== golden files: what this GPU answers to each device wrapper's probes"
nvcc -std=c++17 -O2 -arch=native -Icsrc -Ibenchmarks benchmarks/gpu_golden.cu -o build/gpu_golden \
  && build/gpu_golden > "$OUT/golden.jsonl" && cp "$OUT/golden.jsonl" tests/simt/golden.jsonl

echo "== tests, CUDA required"
WGPT_REQUIRE_CUDA=1 timeout "$TEST_LIMIT_S" "$PYTHON" -m pytest -q --maxfail=20 ${ARGS:-} \
  2>&1 | tee "$OUT/tests.log"
tests=$?

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    echo "== compute-sanitizer $tool, small shapes"
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -x \
      tests/ops -k "cuda and hand_computed" 2>&1 \
      | tee "$OUT/sanitizer-$tool.log" | tail -3
  done
fi

echo "== benchmarks"
for script in benchmarks/bench_*.py; do
  echo "-- $script"
  name=$(basename "$script" .py)
  timeout "$BENCH_LIMIT_S" "$PYTHON" "$script" --device cuda --resume --out "$OUT/$name.json" 2>&1 \
    | tee "$OUT/$name.log" || echo "$script: stopped or failed; run again, finished rows are kept"
done
"$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("bench_*.json")):
    result = json.loads(path.read_text())
    columns = list(dict.fromkeys(k for row in result["rows"] for k, v in row.items() if not isinstance(v, (list, dict))))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in result["rows"]:
        values = (row.get(name) for name in columns)
        lines.append(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    facts = "\n".join(f"- {name}: {value}" for name, value in result["machine"].items())
    path.with_suffix(".md").write_text(facts + "\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n")
PY
exit "$tests"
