"""Knowing when a stream has collapsed into silence or a loop of tokens."""

from __future__ import annotations

import math

import numpy as np

from wgpt.config import STEP_RATE_HZ
from wgpt.errors import ConfigError

SILENCE_DBFS = -60.0  # RMS of a step below this is silence; full scale is 0 dBFS
LONGEST_PERIOD_STEPS = 8  # a loop of tokens up to this long (107 ms) counts as repetition


class StuckDetector:
    """Says when a stream has collapsed: for `after_s` seconds only silence, or only a short loop.

    Silence: every step's RMS is below -60 dBFS. A loop: the coarse tokens repeat with a period of
    1 to 8 steps. Neither is decided by a single step, so a pause in speech does not end it.
    """

    def __init__(self, after_s: float) -> None:
        if not (math.isfinite(after_s) and after_s * STEP_RATE_HZ >= 1):
            raise ConfigError(
                f"end_when_stuck_s must be at least one step (1/75 s), or 0 for never, got "
                f"{after_s}"
            )
        self.after_s = after_s
        self._n_enough = round(after_s * STEP_RATE_HZ)
        self._n_silent = 0
        self._n_repeats = [0] * LONGEST_PERIOD_STEPS  # by period - 1
        self._latest: list[int] = []

    def reason(self, wave: np.ndarray, token: int) -> str | None:
        """Why the stream is stuck after this step's samples and coarse token; None if it is not."""
        level = math.sqrt(float(np.square(wave, dtype=np.float64).mean()))
        self._n_silent = self._n_silent + 1 if level < 10 ** (SILENCE_DBFS / 20) else 0
        for i in range(LONGEST_PERIOD_STEPS):
            same = i < len(self._latest) and self._latest[-1 - i] == token
            self._n_repeats[i] = self._n_repeats[i] + 1 if same else 0
        self._latest = [*self._latest[1 - LONGEST_PERIOD_STEPS :], token]
        if self._n_silent >= self._n_enough:
            return f"silence (below {SILENCE_DBFS:g} dBFS) for {self.after_s:g} s"
        for i, n_repeats in enumerate(self._n_repeats):
            if n_repeats >= self._n_enough:
                return f"the same {i + 1} token(s) repeated for {self.after_s:g} s"
        return None
