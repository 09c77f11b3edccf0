"""PEP 517 backend: scikit-build-core, plus torch where the target environment has none.

The extension needs torch's headers and libtorch_cpu at build time. In an isolated build torch
would be downloaded once more just for that, although wgpt depends on it anyway. So this backend
looks into the environment that the package is being installed to, builds against a torch found
there, and asks for one only otherwise. The stable ABI makes the choice harmless: a binary built
with the headers of any torch >= 2.10 runs under every other.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch==2.13.0"
OLDEST_TORCH = (2, 10)


def _site_packages() -> list[Path]:
    """Where the target environment's packages lie; pip's isolation hides only sys.path."""
    schemes: list[dict[str, str]] = [{}]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and "include-system-site-packages = true" in config.read_text().lower():
        schemes.append({"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    keys = ("purelib", "platlib")
    return [Path(sysconfig.get_path(key, vars=scheme)) for scheme in schemes for key in keys]


def _torch_version(torch_dir: Path) -> tuple[int, int] | None:
    """(major, minor) from the headers, which is what the build needs; None without them."""
    header = torch_dir / "include/torch/headeronly/version.h"
    if not header.exists():
        return None
    words = [
        line.split() for line in header.read_text().splitlines() if "define TORCH_VERS" in line
    ]
    value = {parts[1]: parts[2] for parts in words if len(parts) == 3}
    try:
        return int(value["TORCH_VERSION_MAJOR"]), int(value["TORCH_VERSION_MINOR"])
    except (KeyError, ValueError):
        return None


def find_torch_dir() -> Path | None:
    """The torch package folder to build against: $WGPT_TORCH_DIR, else the target environment's."""
    named = os.environ.get("WGPT_TORCH_DIR")
    candidates = [Path(named)] if named else [path / "torch" for path in _site_packages()]
    for torch_dir in candidates:
        version = _torch_version(torch_dir)
        if version is not None and version >= OLDEST_TORCH:
            return torch_dir
    return None


def _torch_requirements() -> list[str]:
    return [] if find_torch_dir() else [TORCH_REQUIREMENT]


def _point_cmake_at_torch() -> None:
    torch_dir = find_torch_dir()
    if torch_dir is not None:  # otherwise CMake asks Python, which sees the build requirement
        os.environ["WGPT_TORCH_DIR"] = str(torch_dir)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _backend.get_requires_for_build_wheel(config_settings) + _torch_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _backend.get_requires_for_build_editable(config_settings) + _torch_requirements()


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    _point_cmake_at_torch()
    return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    _point_cmake_at_torch()
    return _backend.build_editable(wheel_directory, config_settings, metadata_directory)
