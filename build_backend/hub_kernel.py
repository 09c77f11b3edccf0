"""The ops as a kernel of the Hugging Face Hub: a folder that its `kernels` package loads.

    python build_backend/hub_kernel.py --out KERNEL

    KERNEL/README.md                                        its card
    KERNEL/build/torch-stable-abi210-cpu-x86_64-linux/      one build variant: metadata.json,
                                                            wgpt/ops, wgpt/errors.py, the binaries

    ops = kernels.get_local_kernel(Path("KERNEL"))
    ops.flash_attention(q, k, v)

What is copied is the wgpt that this Python imports, its imports made relative. The library of ops
is one for every torch from 2.10 on; `_C` is there for the Pythons that the build made it for. A
build with CUDA kernels becomes a second variant, `cu130` of CUDA 13.0, beside that of the CPU.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NAME = "wgpt-ops"
VERSION = 1  # of the kernel's interface: the Hub's branch v1
IMPORTS = (  # as wgpt/ops and wgpt/errors.py write them
    (r"^(\s*)from wgpt import _C$", r"\1from . import _C"),
    (r"^(\s*)from wgpt\.errors import ", r"\1from .errors import "),
    (r"^(\s*)from wgpt\.ops import ", r"\1from . import "),
    (r"^(\s*)from wgpt\.ops\.(\w+) import ", r"\1from .\2 import "),
)
CARD = """---
license: mit
library_name: kernels
tags:
- kernel
---

# wgpt-ops

Attention with a backward for CPUs (AVX2, AVX-512, AMX, NEON) and GPUs, rotary positions, norms,
feed-forward layers and a fused cross entropy, deterministic, in one binary for every torch from
2.10 on. Loaded by [kernels](https://github.com/huggingface/kernels):

```python
from kernels import get_kernel
ops = get_kernel("user/wgpt-ops", version=1, trust_remote_code=True)
ops.flash_attention(q, k, v)  # (B, T, H, D)
with ops.use_for_sdpa():      # scaled_dot_product_attention of a model that stays as it is
    model(x)
```
"""


def relative(source: str, where: str) -> str:
    """The source of a module of ours with relative imports.

    Raises SystemExit where an import of wgpt is left: IMPORTS does not know its form.
    """
    for pattern, replacement in IMPORTS:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.split(".")[0] == "wgpt" for name in names):
            raise SystemExit(f"{where}:{node.lineno}: an import that cannot be made relative")
    return source


def write_variant(package: Path, folder: Path, backend: dict[str, Any]) -> None:
    """One build variant of the package."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [package / "errors.py", *sorted((package / "ops").glob("*.py"))]:
        source = relative(path.read_text(), str(path))
        if path.name == "__init__.py":
            source = source.replace("Path(__file__).parents[1]", "Path(__file__).parent")
        (folder / path.name).write_text(source)
    for path in sorted(package.glob("*.so")):
        shutil.copy(path, folder / path.name)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    metadata = {
        "id": f"_{NAME.replace('-', '_')}_{backend['type']}_{digest.hexdigest()[:8]}",
        "name": NAME,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": backend,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_kernel(out: Path) -> list[str]:
    """All variants of the installed wgpt; returns their names."""
    spec = importlib.util.find_spec("wgpt")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "no wgpt: install the package (pip install .), or in a source tree: make dev"
        )
    package = Path(spec.origin).parent
    code = "import json, torch\nfrom wgpt import _C\nprint(json.dumps(_C.build_info()))"
    facts = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    build = json.loads(facts.stdout)
    machine = f"{platform.machine()}-{platform.system().lower()}"
    backends: dict[str, dict[str, Any]] = {"cpu": {"type": "cpu"}}
    if build["cuda_archs"]:
        archs = [re.sub(r"(\d)(a?)$", r".\1\2", arch) for arch in build["cuda_archs"]]
        archs += [re.sub(r"(\d)$", r".\1+PTX", arch) for arch in build["cuda_ptx"]]
        major, minor, *_ = build["cuda_toolkit"].split(".")
        backends[f"cu{major}{minor}"] = {"type": "cuda", "archs": archs}
    target = build["torch_target"].replace(".", "")
    variants = {
        f"torch-stable-abi{target}-{name}-{machine}": backend for name, backend in backends.items()
    }
    for name, backend in variants.items():
        write_variant(package, out / "build" / name, backend)
    (out / "README.md").write_text(CARD)
    return list(variants)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the kernel")
    for name in write_kernel(parser.parse_args().out):
        print(name)


if __name__ == "__main__":
    main()
