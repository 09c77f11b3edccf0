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
    "push_to_hub",
    "training",
]


def load(
    name_or_folder: str | Path,
    device: str = "cpu",
    *,
    download: bool = False,
    weight_dtype: str = "fp32",
) -> AudioGenerator:
    """Opens a trained model to generate with.

    Args:
        name_or_folder: a run folder, a model folder that a run wrote, `starter`, the model in
            the package, or `user/model` on the Hugging Face Hub (`user/model@revision`).
        device: auto, cpu, cuda or cuda:N.
        download: let a model of the Hub be downloaded; without it, only the Hub's cache on this
            machine is looked at.
        weight_dtype: in which generation holds the weights: fp32, or on the CPU bf16 or int8, for
            which a step reads half or a quarter of the bytes.

    Raises:
        ConfigError, CodecError: name the file that is missing, damaged or does not fit.
    """
    from wgpt.generation import AudioGenerator

    return AudioGenerator.load(name_or_folder, device, download=download, weight_dtype=weight_dtype)


def push_to_hub(
    run: str | Path,
    repository: str,
    *,
    license: str,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads a trained model, or a codec, to the Hugging Face Hub: `wgpt.load("user/model")`,
    `wgpt.codec.load("user/codec")`.

    With it go its card, with a header that the Hub reads, and its codec where that is a folder of
    this machine. It needs `pip install 'wgpt[download]'`, and `hf auth login` once.

    Args:
        run: a run folder, RUN@step-500, a model folder, `starter`, or the folder of a codec.
        repository: `user/model`; made where there is none.
        license: of the weights, as the Hub spells it: `mit`, `cc-by-4.0`, `other`. The recordings
            that the model was trained on may ask for one.
        private: for a new repository.
        revision: branch to upload to; None: main.

    Returns the repository's URL. Raises ConfigError, and CodecError where the codec has changed.
    """
    from wgpt.runs import pretrained

    return pretrained.push_to_hub(
        run, repository, license=license, private=private, revision=revision
    )
