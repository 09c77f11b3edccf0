"""How a training tells where it is: a bar on a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
_MEAN_STEPS = 20  # of the loss that is watched
_RISE_NATS = 1.0  # above its lowest mean: not noise


class Report:
    """Steps, speed and time left, on stderr, and a warning when the loss runs away."""

    def __init__(self, start: int, total: int, is_shown: bool) -> None:
        """start, total: steps done and to do; is_shown: False for all processes but the first."""
        self.start, self.total, self.is_shown = start, total, is_shown
        self.began = self.last_line = time.monotonic()
        self.n_tokens = 0  # since `start`, padding aside
        self._losses: deque[float] = deque(maxlen=_MEAN_STEPS)
        self._lowest, self._has_warned = math.inf, False
        has_bar = is_shown and sys.stderr.isatty()
        self._bar = tqdm(
            initial=start, total=total, unit="step", disable=not has_bar, file=sys.stderr
        )

    def step(self, step: int, nll: float, n_tokens: int) -> None:
        """After each step: its training NLL and the tokens of its batch."""
        self.n_tokens += n_tokens
        now = time.monotonic()
        seconds = max(now - self.began, 1e-9)
        speed = f"nll {nll:.3f}, {self.n_tokens / seconds:.0f} tokens/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update()
        if self.is_shown and self._bar.disable and now - self.last_line >= LINE_EVERY_S:
            rate = (step - self.start) / seconds
            left_min = (self.total - step) / rate / 60
            log.info(
                "step %d of %d: %s, %.3g steps/s, %.3g min left",
                step, self.total, speed, rate, left_min,
            )  # fmt: skip
            self.last_line = now
        self._watch(step, nll)

    def _watch(self, step: int, nll: float) -> None:
        self._losses.append(nll)
        if len(self._losses) < _MEAN_STEPS or self._has_warned:
            return
        mean = sum(self._losses) / _MEAN_STEPS
        self._lowest = min(self._lowest, mean)
        if mean > self._lowest + _RISE_NATS and self.is_shown:
            log.warning(
                "step %d: the training NLL is %.2f, and was %.2f: it diverges; stop with Ctrl-C "
                "and go on from an earlier checkpoint at a lower --lr",
                step, mean, self._lowest,
            )  # fmt: skip
            self._has_warned = True

    def close(self) -> None:
        """Leaves the terminal as it was found."""
        self._bar.close()
