"""The ops as a kernel of the Hub: a folder that the package `kernels` loads, alone in a process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import wgpt

ROOT = Path(__file__).parents[1]
PACKAGE = Path(wgpt.__file__).parent


@pytest.fixture(scope="module")
def hub_kernel() -> ModuleType:
    path = ROOT / "build_backend" / "hub_kernel.py"
    spec = importlib.util.spec_from_file_location("hub_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernel(hub_kernel: ModuleType, tmp_path: Path) -> Path:
    hub_kernel.write_variant(PACKAGE, tmp_path / "build" / variant(), {"type": "cpu"})
    return tmp_path


def variant() -> str:
    import platform

    return f"torch-stable-abi210-cpu-{platform.machine()}-{platform.system().lower()}"


def run(code: str, kernel: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PACKAGE.parent)}
    names = f"import sys, torch, kernels\nfrom pathlib import Path\nK = Path({str(kernel)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", names + code], capture_output=True, text=True, env=env, cwd=kernel
    )


def test_every_module_of_the_ops_can_be_made_relative(hub_kernel: ModuleType, kernel: Path) -> None:
    folder = kernel / "build" / variant()
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (PACKAGE / "ops").glob("*.py")} <= names
    assert {"errors.py", "metadata.json", "libwgpt_ops.so"} <= names
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["name"] == "wgpt-ops" and metadata["backend"] == {"type": "cpu"}
    source = "from wgpt.ops import cuda, flops  # noqa\nif 1:\n    from wgpt.ops.cuda import x\n"
    assert hub_kernel.relative(source, "a.py") == (
        "from . import cuda, flops  # noqa\nif 1:\n    from .cuda import x\n"
    )
    for bad in ("import wgpt", "import wgpt.ops as ops", "from wgpt.data import Dataset"):
        with pytest.raises(SystemExit, match=r"a\.py:1: an import that cannot be made relative"):
            hub_kernel.relative(bad, "a.py")


@pytest.mark.slow
def test_kernels_loads_it_without_wgpt(kernel: Path) -> None:
    pytest.importorskip("kernels")
    code = """
ops = kernels.get_local_kernel(K)
assert not [name for name in sys.modules if name.split(".")[0] == "wgpt"]
q = torch.randn(2, 33, 2, 32, requires_grad=True)
def both(function):
    out = function(q, q, q)
    return out, torch.autograd.grad(out.square().sum(), q)[0]
for ours, plain in zip(both(ops.flash_attention), both(ops.reference.flash_attention)):
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
with ops.use_for_sdpa():
    x = torch.randn(1, 2, 64, 64)
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
print(ops.info()["cpu_target"])
"""
    result = run(code, kernel)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == wgpt.ops.info()["cpu_target"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [["kernels.get_local_kernel(K)", "import wgpt.ops"],
     ["import wgpt.ops", "kernels.get_local_kernel(K)"]],
)  # fmt: skip
def test_two_copies_in_a_process_are_refused(lines: list[str], kernel: Path) -> None:
    pytest.importorskip("kernels")
    result = run("\n".join(lines), kernel)
    assert "ImportError: wgpt's ops are in this process already, from another" in result.stderr
