"""What a machine with a GPU is asked, in about 7 minutes and without a network. `make gpu` runs it.

Small things first, then figures, then sanitizers and counters. Each step has its own log and time
limit; a step that fails or is over its limit does not stop the others. A step that has passed is
not run again: call once more to resume, or remove the folder to begin anew. Afterwards the folder
holds `gpu.md` (one table) and `gpu.tgz` (everything), also when the run was cut off.

PYTHON needs torch (CUDA), pytest and numpy; soundfile and soxr are not needed. A folder `.gpu/` may
bring what is slow to make there: `_C.*.so` and `libwgpt_ops.so` (built with nvcc elsewhere),
`gpu_golden` and `gpu_driver`. What it does not hold is built.

--dry walks the path without a GPU: probes and kernels on the emulator, ops and training steps on
the CPU.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".gpu"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass(frozen=True)
class Step:
    """One command of the run. `check` reads its log and says what is wrong, or None."""

    name: str
    limit_s: float
    command: list[str]
    check: Callable[[str], str | None] = lambda log: None
    needs: str = ""  # a program without which there is nothing to run


def tests_passed(log: str) -> str | None:
    """A run of pytest that passed no test has shown nothing, whatever its exit status."""
    passed = re.search(r"(\d+) passed", log)
    if passed is None or int(passed[1]) == 0:
        return "zero tests ran: none collected, or all skipped"
    return None


def driver_passed(log: str) -> str | None:
    """Every result of gpu_driver was right, and there were some."""
    found = re.search(r'{"results": (\d+), "wrong": (\d+)}', log)
    if found is None or int(found[1]) == 0:
        return "gpu_driver gave no results"
    return f"{found[2]} of {found[1]} results are wrong" if int(found[2]) else None


def run_step(step: Step, out: Path, env: dict[str, str]) -> dict[str, object]:
    """Run `step` within its limit, its output in <name>.log; returns its row of the table."""
    if step.needs and shutil.which(step.needs) is None:
        return {"step": step.name, "result": f"skipped: no {step.needs} here", "s": 0.0}
    log = out / f"{step.name}.log"
    begin = time.monotonic()
    with log.open("w") as file:
        # A session of its own, so that a stopped step leaves no child on the GPU.
        process = subprocess.Popen(step.command, cwd=ROOT, env=env, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            status = process.wait(step.limit_s)
            result = "passed" if status == 0 else f"failed: exit status {status}"
        except subprocess.TimeoutExpired:
            result = f"failed: over its limit of {step.limit_s:g} s"
        except BaseException:
            stop(process)
            raise
        stop(process)
    wrong = step.check(log.read_text(errors="replace"))
    if wrong and not result.startswith("failed: over"):
        result = f"failed: {wrong}"
    return {"step": step.name, "result": result, "s": round(time.monotonic() - begin, 1)}


def stop(process: subprocess.Popen) -> None:
    """End the step's whole session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_steps(steps: list[Step], out: Path, facts: dict[str, str], env: dict[str, str]) -> int:
    """Run what has not passed yet; table and archive are written after every step.

    Returns the number of steps that failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = out / "steps.json"
    rows: dict[str, dict] = json.loads(state.read_text()) if state.exists() else {}
    for step in steps:
        if rows.get(step.name, {}).get("result") == "passed":
            print(f"{step.name}: passed before")
            continue
        print(f"{step.name} ...", flush=True)
        try:
            rows[step.name] = run_step(step, out, env) | {"command": " ".join(step.command)}
        except OSError as error:  # a program that cannot be started
            rows[step.name] = {"step": step.name, "result": f"failed: {error}", "s": 0.0,
                               "command": " ".join(step.command)}  # fmt: skip
        print(f"{step.name}: {rows[step.name]['result']}, {rows[step.name]['s']} s", flush=True)
        state.write_text(json.dumps(rows))
        write_table(out, facts, [rows[s.name] for s in steps if s.name in rows])
        pack(out)
    return sum(str(rows[s.name]["result"]).startswith("failed") for s in steps)


def write_table(out: Path, facts: dict[str, str], rows: list[dict]) -> None:
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| step | result | s | command |", "|---|---|---|---|"]
    for row in rows:
        # The name stands for the folder: no path of the machine belongs in a result.
        command = str(row["command"]).replace(str(ROOT) + "/", "").replace(sys.executable, "python")
        cells = (row["step"], row["result"], row["s"], f"`{command}`".replace("|", "\\|"))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


def pack(out: Path) -> None:
    with tarfile.open(out / "gpu.tgz", "w:gz") as archive:
        for path in sorted([*out.iterdir(), *out.glob("runs/losses.json")]):
            if path.is_file() and path.name != "gpu.tgz":
                archive.add(path, path.name)


def carried_modules() -> list[Path]:
    """The extension's two parts, brought from elsewhere; none where one of them is missing."""
    parts = [list(CARRIED.glob(name)) for name in ("_C.*.so", "libwgpt_ops.so")]
    return [*parts[0], *parts[1]] if all(parts) else []


def steps_of(dry: bool, out: Path, arch: str) -> list[Step]:
    """The path, the same for a GPU and for a dry run: only devices and sizes differ."""
    python, device = sys.executable, "cpu" if dry else "cuda"
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    steps = []
    if not dry and not carried_modules():
        make = (
            f"WGPT_CUDA_ARCHS={arch} make dev DEV_PYTHON={python} DEV_CUDA=ON DEV_BUILD=build/gpu"
        )
        steps.append(Step("build", 200, ["bash", "-c", make]))
    info = "from wgpt import ops; i = ops.info(); print(i); "
    info += "" if dry else "assert i['cuda_archs'], 'this build has no CUDA kernels'"
    steps.append(Step("module", 60, [python, "-c", info]))
    if dry:
        golden = [*pytest, "tests/simt/test_simt_wrappers.py", "-k", "golden or ldmatrix"]
        steps.append(Step("golden", 60, golden, tests_passed))
    else:
        steps.append(Step("golden", 60, ["bash", "-c", golden_command(arch, out)]))
    driver, build = driver_program(dry, arch)
    steps.append(Step("driver-build", 150, ["bash", "-c", build]))
    mode = "--small" if dry else "--check"
    steps.append(Step("driver", 90, [*driver, mode], driver_passed))
    tests = ["tests/ops"] if dry else ["tests/ops", "tests/training/test_on_gpu.py"]
    chosen = "cpu and hand_computed" if dry else "cuda"
    selected = [*pytest, *tests, "--continue-on-collection-errors", "-k", chosen]
    steps.append(Step("tests", 120, selected, tests_passed))
    losses = [python, "benchmarks/train_on_gpu.py", f"--device={device}", f"--out={out}/runs"]
    if dry:
        losses += ["--max-steps=2", "--dtype=fp32", "--batch=1"]
    steps.append(Step("losses", 90, losses))
    attention = [python, "benchmarks/bench_attention.py", f"--device={device}", "--quick"]
    attention += ["--resume", f"--out={out}/attention.json", "--case-limit=2"]
    attention += [f"--time-limit={2 if dry else 70}"]
    steps.append(Step("attention", 85, attention))
    train = [python, "benchmarks/bench_train.py", f"--device={device}", "--resume"]
    train += [f"--out={out}/train.json", f"--presets={'hybrid-xs' if dry else 'hybrid'}"]
    if dry:
        train += ["--dtype=fp32", "--batch=1", "--steps=16", "--rounds=1", "--contestants", "wgpt",
                  "eager"]  # fmt: skip
    else:
        train += ["--dtype=bf16", "--time-limit=30"]
    steps.append(Step("train", 120, train))
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *driver, "--small"]
        steps.append(Step(tool, 40, command, driver_passed, "compute-sanitizer"))
    # The first 40 kernels: the short ops, and attention with heads of 64.
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "-c", "40"]
    steps.append(Step("ncu", 60, [*ncu, *driver, "--bench"], kernels_profiled, "ncu"))
    return steps


def kernels_profiled(log: str) -> str | None:
    """ncu has counters of at least one kernel: it may not be allowed to read them."""
    return None if "Duration" in log else "no kernel was profiled; the log says why"


def driver_program(dry: bool, arch: str) -> tuple[list[str], str]:
    """gpu_driver, and the shell command that builds it."""
    if dry:
        emulated = "import sys; sys.path.insert(0, 'tests/simt'); import emulator, os; "
        emulated += "program = emulator.build_driver(); "
        run = f"{emulated}os.execv(program, [str(program), *sys.argv[1:]])"
        return [sys.executable, "-c", run], f'{sys.executable} -c "{emulated}"'
    if (CARRIED / "gpu_driver").exists():
        return [str(CARRIED / "gpu_driver")], "true"
    build = "mkdir -p build && nvcc -std=c++17 -O3 -lineinfo --expt-relaxed-constexpr --threads 5 "
    build += f"-Icsrc -Ibenchmarks -arch=sm_{arch} -x cu benchmarks/gpu_driver.cpp "
    build += "csrc/kernels/cuda/*.cu -o build/gpu_driver"
    return [str(ROOT / "build/gpu_driver")], build


def golden_command(arch: str, out: Path) -> str:
    program = CARRIED / "gpu_golden"
    build = ""
    if not program.exists():
        program = ROOT / "build/gpu_golden"
        build = "mkdir -p build && nvcc -std=c++17 -O2 -Icsrc -Ibenchmarks "
        build += f"-arch=sm_{arch} benchmarks/gpu_golden.cu -o {program} && "
    # The emulator must then answer the same; pytest's failure is the finding.
    return (
        f"set -e; {build}{program} > {out}/golden.jsonl; cp {out}/golden.jsonl tests/simt/; "
        f"{sys.executable} -m pytest -q tests/simt/test_simt_wrappers.py -k golden"
    )


def machine(dry: bool) -> tuple[dict[str, str], str]:
    """What the figures depend on, and the architecture to build for."""
    import torch

    facts = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"}
    facts["torch"] = torch.__version__
    facts["command"] = "make gpu" + (" DRY=1" if dry else "")
    if dry:
        return facts | {"gpu": "none: a dry run, nothing here is a measurement"}, ""
    major, minor = torch.cuda.get_device_capability()  # raises without a GPU, with torch's reason
    smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    facts |= {"gpu": torch.cuda.get_device_name(), "driver": smi.stdout.strip() or "unknown"}
    return facts, {(9, 0): "90a"}.get((major, minor), f"{major}{minor}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="without a GPU: tiny, on the CPU")
    parser.add_argument(
        "--out", type=Path, help="folder (benchmarks/results/gpu; dry: build/gpu-dry)"
    )
    args = parser.parse_args()
    default = ROOT / ("build/gpu-dry" if args.dry else "benchmarks/results/gpu")
    out = (args.out or default).resolve()
    for module in [] if args.dry else carried_modules():
        shutil.copy(module, ROOT / "wgpt")
    env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    first = ROOT
    if args.dry and not list((ROOT / "wgpt").glob("_C.*.so")):
        # Nothing is compiled in the tree: the installed package runs. Without this, Python would
        # put the tree first.
        env["PYTHONSAFEPATH"], first = "1", ROOT / "benchmarks"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(first), env.get("PYTHONPATH")]))
    if not args.dry:
        env["WGPT_REQUIRE_CUDA"] = "1"
    facts, arch = machine(args.dry)
    n_failed = run_steps(steps_of(args.dry, out, arch), out, facts, env)
    print((out / "gpu.md").read_text())
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
