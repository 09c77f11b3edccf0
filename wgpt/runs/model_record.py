"""What a model folder says of itself beside the weights: what the model was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wgpt.config import STEP_RATE_HZ, MelConfig, from_json
from wgpt.errors import ConfigError


@dataclass(frozen=True)
class ModelRecord:
    """config.json of a model folder, without the model's shape.

    preset: name of the shape; mel, mel_source: of its slices; codec: {source, identity, ...}
    of its tokens; context_steps: length T of its training windows, None where nobody wrote it down.
    """

    preset: str
    mel: MelConfig
    mel_source: str | None
    codec: dict[str, Any]
    context_steps: int | None

    @classmethod
    def read(cls, folder: Path) -> ModelRecord:
        """Of a model folder. Raises ConfigError when `wgpt train` or `pack` did not write it."""
        path = folder / "config.json"
        try:
            facts = json.loads(path.read_text())
            mel, mel_source = from_json(MelConfig, facts["mel"], str(path)), facts["mel_source"]
            codec = facts["codec"]
            codec["source"], codec["identity"]["sha256"]  # needed by whoever reads them
            context_steps = facts.get("context_steps") or _context_of_run(folder)
            return cls(facts["preset"], mel, mel_source, codec, context_steps)
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; a model folder holds config.json and model.safetensors"
            ) from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: was not written by `wgpt train`: no {error}") from None


def _context_of_run(folder: Path) -> int | None:
    """Context of the run that a model folder lies in, steps: earlier versions wrote it there."""
    for run in (folder.parent, folder.parent.parent):  # RUN/model, RUN/checkpoints/step-N
        try:
            settings = json.loads((run / "config.json").read_text())["train"]
            return round(settings["context_s"] * STEP_RATE_HZ)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run
    return None
