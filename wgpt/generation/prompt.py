"""What a caller gives to continue, checked: a wave or a recording, and lengths in seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from wgpt import audio
from wgpt.config import STEP_RATE_HZ
from wgpt.errors import ConfigError

Wave: TypeAlias = np.ndarray | Tensor
Prompt: TypeAlias = np.ndarray | Tensor | str | Path | None  # a wave, a recording's path, nothing


def wave_of(prompt: Prompt) -> Tensor:
    """float32 (L,) on the CPU at 24 kHz; L is 0 for None.

    Raises ConfigError for a wave of another shape or type or with NaN or infinite samples,
    AudioError for a recording that cannot be read.
    """
    if prompt is None:
        return torch.zeros(0)
    if isinstance(prompt, str | Path):
        return torch.from_numpy(audio.read(prompt))
    return checked_wave(prompt)


def n_steps_of(seconds: float, name: str = "seconds") -> int:
    """Whole steps in a time. Raises ConfigError when it is not finite or shorter than a step."""
    if not (math.isfinite(seconds) and round(seconds * STEP_RATE_HZ) >= 1):
        raise ConfigError(f"{name} must be at least one step (1/75 s), got {seconds}")
    return round(seconds * STEP_RATE_HZ)


def checked_wave(wave: Wave) -> Tensor:
    """float32 (L,) on the CPU. Raises ConfigError for another shape or type, or NaN samples."""
    wave = torch.as_tensor(wave).detach().cpu()
    if wave.dim() != 1 or not wave.is_floating_point():
        raise ConfigError(
            f"prompt must be floating point (L,) at 24 kHz, got {wave.dtype} {tuple(wave.shape)}"
            + _advice(wave)
        )
    if not bool(torch.isfinite(wave).all()):
        raise ConfigError("prompt must be finite, got NaN or infinite samples")
    return wave.float()


def _advice(wave: Tensor) -> str:
    """How to make a prompt of a tensor that is none; "" where that is not clear."""
    kind = str(wave.dtype).removeprefix("torch.")
    steps = []
    if kind in ("int16", "int32"):
        steps.append(f"convert the samples with wave.astype('float32') / {2 ** int(kind[3:]) // 2}")
    if wave.dim() == 2 and min(wave.shape) > 0:
        axis = 0 if wave.shape[0] <= wave.shape[1] else 1
        steps.append(f"take the mean over channels with wave.mean({axis})")
    return "".join(f"; {step}" for step in steps)
