"""wgpt: small audio language models that read sound as codec tokens and as mel slices.

Importing this package is cheap: torch and the compiled ops load when something that needs them is
first used, `wgpt.ops` or `wgpt.model` for example.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = (
    "audio",
    "checkpoint",
    "codec",
    "config",
    "data",
    "evaluate",
    "generate",
    "mel",
    "model",
    "ops",
    "sampling",
    "speaker",
    "train",
)

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"wgpt.{name}")
    raise AttributeError(f"module 'wgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
