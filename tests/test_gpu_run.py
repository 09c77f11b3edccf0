"""`make gpu`: it sees each failure, goes on after it, resumes, and walks its path without a GPU."""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks" / "gpu.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import train_on_gpu  # noqa: E402

FACTS = {"date": "today", "gpu": "none"}
WITHOUT_AUDIO = "raise ImportError('this machine has none')\n"


def python(code):
    return [sys.executable, "-c", code]


def run(tmp_path, *steps):
    n_failed = gpu.run_steps(list(steps), tmp_path, FACTS, dict(os.environ))
    return n_failed, (tmp_path / "gpu.md").read_text()


def test_crashing_step_is_reported_and_the_next_one_runs(tmp_path):
    crash = gpu.Step("driver", 20, python("import os; print('begun', flush=True); os.abort()"))
    n_failed, table = run(tmp_path, crash, gpu.Step("next", 20, python("print('here')")))
    assert n_failed == 1
    assert "| driver | failed: exit status -6 |" in table
    assert "| next | passed |" in table
    assert (tmp_path / "driver.log").read_text().startswith("begun")
    with tarfile.open(tmp_path / "gpu.tgz") as archive:
        assert {"driver.log", "next.log", "gpu.md", "steps.json"} <= set(archive.getnames())


def test_program_that_is_not_there_is_reported(tmp_path):
    n_failed, table = run(tmp_path, gpu.Step("driver", 20, ["/nowhere/gpu_driver"]))
    assert n_failed == 1
    assert "| driver | failed: " in table


def test_step_over_its_limit_is_stopped_with_its_children(tmp_path):
    mark = tmp_path / "child"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    n_failed, table = run(tmp_path, gpu.Step("slow", 0.5, python(code)))
    assert n_failed == 1
    assert "| slow | failed: over its limit of 0.5 s |" in table
    time.sleep(2.5)
    assert not mark.exists()


@pytest.mark.parametrize("body", ["", "import pytest\ndef test_a(): pytest.skip('no GPU')\n"])
def test_run_of_zero_tests_is_a_failure(tmp_path, body):
    file = tmp_path / "test_nothing.py"
    file.write_text(body)
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, str(file)]
    n_failed, table = run(tmp_path, gpu.Step("tests", 60, pytest_run, gpu.tests_passed))
    assert n_failed == 1
    assert "| tests | failed: zero tests ran" in table


@pytest.mark.parametrize(
    "log, words",
    [
        ("", "gpu_driver gave no results"),
        ('{"results": 0, "wrong": 0}', "gpu_driver gave no results"),
        ('{"results": 9, "wrong": 2}', "2 of 9 results are wrong"),
    ],
)
def test_driver_that_finds_something_wrong_is_a_failure(tmp_path, log, words):
    step = gpu.Step("driver", 20, python(f"print({log!r})"), gpu.driver_passed)
    n_failed, table = run(tmp_path, step)
    assert n_failed == 1 and f"| driver | failed: {words} |" in table


def test_losses_that_are_not_the_cpus_are_wrong():
    """Of the first steps each counts, of the last quarter the mean."""
    plain = [7 - i / 100 for i in range(200)]
    late = [*plain[:150], *(loss + 0.04 for loss in plain[150:])]
    assert train_on_gpu.compare(plain, plain, "fp32")["right"]
    assert train_on_gpu.compare(late, plain, "fp32")["right"]
    assert not train_on_gpu.compare([plain[0], plain[1] + 0.01, *plain[2:]], plain, "fp32")["right"]
    assert not train_on_gpu.compare([loss + 0.02 for loss in late], plain, "fp32")["right"]
    lost = [*plain[:3], float("nan"), *plain[4:]]
    assert not train_on_gpu.compare(lost, plain, "bf16")["right"]


def test_second_run_repeats_only_what_failed(tmp_path):
    count = tmp_path / "count"
    good = gpu.Step("good", 20, python(f"open({str(count)!r}, 'a').write('x')"))
    assert run(tmp_path, good, gpu.Step("bad", 20, python("raise SystemExit(3)")))[0] == 1
    assert run(tmp_path, good, gpu.Step("bad", 20, python("pass")))[0] == 0
    assert count.read_text() == "x"


def test_build_is_left_out_only_where_both_parts_were_brought(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CARRIED", tmp_path)
    for part, builds in (("_C.cpython-311.so", True), ("libwgpt_ops.so", False)):
        (tmp_path / part).touch()
        names = [step.name for step in gpu.steps_of(False, tmp_path / "out", "90a")]
        assert ("build" in names) == builds == (not gpu.carried_modules())


def test_only_the_run_on_the_cpu_is_taken_up_again(tmp_path, monkeypatch):
    """A failed step whose own run was taken up again would fail forever."""
    trained = []
    monkeypatch.setattr(train_on_gpu, "read_losses", lambda run: [1.0])
    monkeypatch.setattr(train_on_gpu, "train", lambda data, out, *args, **kw: trained.append(out))
    arguments = ["train_on_gpu.py", "--device=cpu", f"--out={tmp_path}", "--max-steps=1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--dtype=fp32"])
    assert train_on_gpu.main() == 0
    assert trained == [tmp_path / "cpu-fp32-ours"]


def test_missing_tool_is_a_skip_with_its_reason(tmp_path):
    step = gpu.Step("memcheck", 20, ["no-such-tool"], needs="no-such-tool")
    n_failed, table = run(tmp_path, step)
    assert n_failed == 0
    assert "skipped: no no-such-tool here" in table


@pytest.mark.skipif(
    sys.version_info < (3, 11) and not list((ROOT / "wgpt").glob("_C.*.so")),
    reason="Python 3.10 cannot leave out a source tree without a compiled module",
)
def test_dry_run_needs_neither_gpu_nor_network_nor_audio_packages(tmp_path):
    for name in ("soundfile", "soxr", "pystoi", "gradio"):
        (tmp_path / f"{name}.py").write_text(WITHOUT_AUDIO)
    command = [sys.executable, "benchmarks/gpu.py", "--dry", f"--out={tmp_path / 'out'}"]
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-n", "true"], capture_output=True).returncode == 0:
        command = [unshare, "-n", *command]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("module", "golden", "driver", "tests", "losses", "attention", "train"):
        assert f"| {step} | passed |" in done.stdout
    assert "nothing here is a measurement" in done.stdout
