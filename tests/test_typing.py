"""The public API as a user's type checker sees it: examples/, and the Python of README and docs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names that examples in prose use without making them.
PREAMBLE = """\
from __future__ import annotations
import numpy as np
from torch import Tensor
"""
PUBLIC = '''\
"""What a user's checker must know of the public names: none of them is Any."""
from collections.abc import Iterator
from typing import assert_type

import numpy as np
from torch import Tensor

import wgpt
from wgpt import ops
from wgpt.generation import AudioGenerator


def check(q: Tensor, tokens: Tensor) -> None:
    model = wgpt.load("starter")
    assert_type(model, AudioGenerator)
    assert_type(model.sample_rate_hz, int)
    assert_type(model.generate("x.wav", seconds=10), np.ndarray)
    assert_type(model.stream("x.wav"), Iterator[np.ndarray])
    assert_type(ops.flash_attention(q, q, q), Tensor)
    assert_type(ops.flash_attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ops.token_concat(tokens, q), Tensor)
    assert_type(ops.mel_embed(q, q, q, q, q), Tensor)
    assert_type(ops.linear(q, q), Tensor)
    assert_type(ops.feed_forward(q, q, q), Tensor)
    assert_type(ops.rotary_qkv(q, q, q), tuple[Tensor, Tensor, Tensor])
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with every example as a module."""
    folder = tmp_path_factory.mktemp("typed")
    for script in (ROOT / "examples").glob("*.py"):
        shutil.copy(script, folder)
    for page in PAGES:
        for n, block in enumerate(BLOCK.findall(page.read_text())):
            (folder / f"{page.stem.lower()}_{n}.py").write_text(PREAMBLE + block)
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):  # one program each
        blocks = BLOCK.findall(page.read_text())
        (folder / f"tutorial_{page.stem.replace('-', '_')}.py").write_text(
            PREAMBLE + "".join(blocks)
        )
    assert (folder / "readme_0.py").exists()
    (folder / "public.py").write_text(PUBLIC)
    return folder


def check(command, sources):
    env = {**os.environ, "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=sources, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_examples_pass_mypy_strict(sources, pytestconfig):
    pytest.importorskip("mypy", reason="mypy is not installed (the extra dev)")
    # silent: errors in the package's own files are those of `make check`, not a user's.
    options = ["--strict", "--follow-imports=silent", "--no-error-summary"]
    cache = pytestconfig.cache.mkdir("mypy-strict")  # torch's stubs take most of the time
    check([sys.executable, "-m", "mypy", *options, f"--cache-dir={cache}", "."], sources)


def test_examples_pass_pyright(sources):
    pytest.importorskip("pyright", reason="pyright is not installed (the extra dev)")
    if shutil.which("node") is None:
        pytest.skip("pyright needs node, which is not here")
    os.environ.setdefault("PYRIGHT_PYTHON_GLOBAL_NODE", "1")
    pyright = [sys.executable, "-m", "pyright"]
    if subprocess.run([*pyright, "--version"], capture_output=True).returncode:
        pytest.skip("pyright's npm package is not here and cannot be fetched")
    (sources / "pyrightconfig.json").write_text(
        f'{{"extraPaths": ["{ROOT}"], "pythonVersion": "3.11", "include": ["."]}}'
    )
    check([*pyright, "--pythonpath", sys.executable], sources)
