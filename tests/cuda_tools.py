"""Where the programs of the CUDA toolkit are."""

import importlib.util
import os
import shutil
from pathlib import Path


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool: on PATH, in the toolkit, or in the pip packages; else None."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else []:
        folders += sorted(Path(base).glob("cu*/bin"))
    candidates = [shutil.which(name), *(str(folder / name) for folder in folders)]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)
