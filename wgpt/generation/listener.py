"""Hearing what a model makes: is it silent where its prompt is not, does one token repeat?

A model that collapsed still writes a file, so whoever hands out sound listens first.
"""

from __future__ import annotations

import numpy as np

from wgpt.config import SAMPLE_RATE_HZ, STEP_RATE_HZ
from wgpt.generation.state import Step

SILENT_DBFS = -50.0  # RMS of a frame below this is silence; full scale is 0 dBFS
FRAME_SAMPLES = SAMPLE_RATE_HZ // 10  # 100 ms: longer than a stop consonant, shorter than a pause
REPEAT_S = 2.0  # no sound of speech or music holds one token for so long


class SilenceMeter:
    """Counts silent frames of a sound that comes in pieces."""

    def __init__(self) -> None:
        self._rest = np.zeros(0)  # samples of a frame that is not complete
        self._n_frames = self._n_silent = 0

    def push(self, wave: np.ndarray) -> None:
        """The next samples, float (n,) at 24 kHz, any n."""
        wave = np.concatenate([self._rest, wave])
        n_whole = len(wave) // FRAME_SAMPLES
        frames = wave[: n_whole * FRAME_SAMPLES].reshape(n_whole, FRAME_SAMPLES)
        self._rest = wave[n_whole * FRAME_SAMPLES :]
        self._n_frames += n_whole
        self._n_silent += _n_silent(frames)

    @property
    def share(self) -> float:
        """Silent share of the whole frames so far; of less than a frame, 0 or 1."""
        if not self._n_frames:
            return float(_n_silent(self._rest[None])) if len(self._rest) else 0.0
        return self._n_silent / self._n_frames


def _n_silent(frames: np.ndarray) -> int:
    """How many rows (n, samples) are silent."""
    power = np.square(frames, dtype=np.float64).mean(1)
    return int((power < 10 ** (SILENT_DBFS / 10)).sum())


def silent_share(wave: np.ndarray) -> float:
    """Share of a wave's 100 ms frames, float (L,) at 24 kHz, whose RMS is below -50 dBFS."""
    meter = SilenceMeter()
    meter.push(wave)
    return meter.share


class Listener:
    """Hears a continuation step by step; `warnings` says what is wrong with it."""

    def __init__(self, prompt: np.ndarray, gain: float = 1.0) -> None:
        """prompt: float (L,) at 24 kHz, L is 0 without one; gain: with which the model hears it."""
        self._prompt_share = silent_share(prompt * gain)
        self._meter = SilenceMeter()
        self._token = -1
        self._n_steps = self._n_same = 0
        self._longest = (0, 0)  # steps of the longest repetition, and the step after it

    def hear(self, step: Step) -> None:
        """The next step."""
        self._meter.push(step.made)
        self._n_steps += 1
        self._n_same = self._n_same + 1 if step.tokens[0] == self._token else 1
        self._token = step.tokens[0]
        self._longest = max(self._longest, (self._n_same, self._n_steps))

    def warnings(self) -> list[str]:
        """What is wrong so far, a line each; none if nothing is."""
        found = []
        if self._meter.share > 0.5 >= self._prompt_share:
            found.append(
                f"{self._meter.share:.0%} of the continuation is silent (100 ms frames below "
                f"{SILENT_DBFS:g} dBFS), {self._prompt_share:.0%} of the prompt"
            )
        n_same, end = self._longest
        if n_same >= REPEAT_S * STEP_RATE_HZ:
            found.append(
                f"one token repeats for {n_same / STEP_RATE_HZ:.1f} s, from "
                f"{(end - n_same) / STEP_RATE_HZ:.1f} s on"
            )
        return found
