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


def run_emulated(*arguments: str, mutant: Path | None = None) -> tuple[int, str]:
    """Runs pytest with those arguments where CPU tensors stand for CUDA's; status and output."""
    if shutil.which(CXX) is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip(f"needs a C++ compiler ({CXX}) and Python's headers")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "WGPT_EMULATED_GPU": "1"}
    if mutant is not None:
        env["WGPT_EMULATED_MUTANT"] = str(mutant)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_model_trains_and_generates_through_the_cuda_kernels():
    status, said = run_emulated("tests/emulated_gpu")
    assert status == 0 and " passed" in said, said


@pytest.mark.slow
def test_cuda_tests_of_the_ops_pass():
    status, said = run_emulated("tests/ops", "-k", "cuda and not gpu_without")
    passed = re.search(r"(\d+) passed", said)
    assert status == 0 and passed is not None and int(passed[1]) > 100, said


# What an op's host side may do wrong: of an op, one place, what it becomes, and what must be said.
HOST_BUGS = {
    "steps_and_heads_change_places": (
        "flash_attention",
        "tensor.stride(0), tensor.stride(1),\n          tensor.stride(2)};\n}\n\nHeadsView write",
        "tensor.stride(0), tensor.stride(2),\n          tensor.stride(1)};\n}\n\nHeadsView write",
        "exceeds 2 x torch's",
    ),
    "workspace_too_small": (
        "flash_attention",
        "workspace(where, cuda::flash_attention_backward_workspace_bytes(call.shape))",
        "workspace(where, cuda::flash_attention_backward_workspace_bytes(call.shape) / 2)",
        "out of bounds",
    ),
    "default_stream": (
        "mel_embed",
        "cuda::mel_embed_backward(call, scope.stream())",
        "cuda::mel_embed_backward(call, nullptr)",
        "launched on another stream",
    ),
    "lse_in_the_type_of_q": (
        "flash_attention",
        "{shape.batch, shape.heads, shape.q_steps}, accumulation_type(shape.dtype));",
        "{shape.batch, shape.heads, shape.q_steps});",
        "out of bounds",
    ),
    "lse_of_one_head": (
        "flash_attention",
        "{shape.batch, shape.heads, shape.q_steps}, accumulation_type",
        "{shape.batch, 1, shape.q_steps}, accumulation_type",
        "out of bounds",
    ),
    "mel_taken_for_contiguous": (
        "token_concat",
        "shape.mel_step_stride = mel->stride(1);",
        "shape.mel_step_stride = shape.mel_channels;",
        "",
    ),
    "workspace_of_one_token": (
        "token_concat",
        "call.workspace = scratch.mutable_data_ptr();\n  check_launch",
        "call.workspace = workspace(where, 64).mutable_data_ptr();\n  check_launch",
        "out of bounds",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOST_BUGS)
def test_bug_of_the_host_side_is_found(name: str, tmp_path: Path) -> None:
    op, old, new, words = HOST_BUGS[name]
    text = (ROOT / "csrc" / "ops" / f"{op}.cpp").read_text()
    assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
    mutant = tmp_path / f"mutated_{op}.cpp"
    mutant.write_text(text.replace(old, new))
    status, said = run_emulated(f"tests/ops/test_{op}.py", "-x", "-k", "cuda", mutant=mutant)
    assert status == 1 and "1 failed" in said and words in said, said
