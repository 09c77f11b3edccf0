"""wgpt: small audio language models that read sound as codec tokens and as mel slices.

    import wgpt
    model = wgpt.load("starter")                      # a run, a model folder, or a packaged name
    wave = model.generate("x.wav", seconds=10)        # float32 (L,) at model.sample_rate_hz

Importing this package is cheap: torch and the compiled ops load when something that needs them is
called or imported, `wgpt.ops` or `wgpt.training` for example.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from wgpt.errors import WgptError

if TYPE_CHECKING:
    from wgpt import audio, codec, data, evaluation, generation, model, ops, training
    from wgpt.generation import AudioGenerator
else:  # hidden from type checkers: they would take any misspelt name for a module

    def __getattr__(name: str) -> ModuleType:
        """Imports a package of __all__ at its first use."""
        if name in __all__:
            return importlib.import_module(f"wgpt.{name}")
        raise AttributeError(f"module 'wgpt' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "WgptError",
    "__version__",
    "audio",
    "codec",
    "data",
    "evaluation",
    "generation",
    "load",
    "model",
    "ops",
    "training",
]


def load(name_or_folder: str | Path, device: str = "cpu") -> AudioGenerator:
    """Opens a trained model to generate with.

    Args:
        name_or_folder: a run folder, a model folder that a run wrote, or `starter`, the model in
            the package.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError, CodecError: name the file that is missing, damaged or does not fit.
    """
    from wgpt.generation import AudioGenerator

    return AudioGenerator.load(name_or_folder, device)
