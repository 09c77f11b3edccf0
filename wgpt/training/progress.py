"""How far a training has come: its best validation, and when to give up hoping for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """What a resumed run must know besides weights and optimizer; plain JSON in every checkpoint.

    best_step is the step whose weights RUN/model holds: that of the lowest validation NLL or,
    without validation data, of the newest save. best and newest are figures of validations
    (`nll_nats`, `accuracy`, ...), empty before the first. n_worse counts those since the best.
    """

    best_step: int = 0
    n_worse: int = 0
    best: dict[str, float] = field(default_factory=dict)
    newest: dict[str, float] = field(default_factory=dict)

    def add_validation(self, step: int, figures: dict[str, float]) -> bool:
        """Takes in a validation; True if its `nll_nats` is the lowest so far."""
        self.newest = figures
        if figures["nll_nats"] < self.best.get("nll_nats", math.inf):
            self.best_step, self.best, self.n_worse = step, figures, 0
            return True
        self.n_worse += 1
        return False

    def is_exhausted(self, patience: int) -> bool:
        """Whether the last `patience` validations brought nothing; never for 0."""
        return 0 < patience <= self.n_worse
