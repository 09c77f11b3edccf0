"""The ops, and whole models, launch their CUDA kernels on the emulator: a process of its own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from emulator import CXX, ROOT


def run_emulated(*arguments: str) -> str:
    """Runs pytest with those arguments where CPU tensors stand for CUDA's; what it printed."""
    if shutil.which(CXX) is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip(f"needs a C++ compiler ({CXX}) and Python's headers")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "WGPT_EMULATED_GPU": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_model_trains_and_generates_through_the_cuda_kernels():
    assert "passed" in run_emulated("tests/emulated_gpu")


@pytest.mark.slow
def test_cuda_tests_of_the_ops_pass():
    passed = re.search(r"(\d+) passed", run_emulated("tests/ops", "-k", "cuda and not gpu_without"))
    assert passed is not None and int(passed[1]) > 100
