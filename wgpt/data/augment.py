"""Random choices of a training step beyond its windows: mel noise, mel drops, steps to score.

Like the windows (batches.py) they are pure functions of (seed, step): each row of a batch has a
stream of numpy's Philox of its own, keyed by (seed, step), its counter set to (row, purpose), so
any process can make any row, resuming needs only the step, and one choice does not move another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NOISE, _DROP, _SCORED = 1, 2, 3  # purposes; the windows' own draws have purpose 0


def _stream(seed: int, step: int, row: int, purpose: int) -> np.random.Generator:
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, row, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True, eq=False)
class MelAugment:
    """What is done to log-mel frames while training, and only then.

    mean, inv_std: float32 (M,), the normalisation constants of the training split.
    noise: standard deviation of Gaussian noise, in units of the training split's.
    drop: share of steps whose frames are replaced by the mean (zero after normalisation).
    drop_span_steps: length of a dropped span; spans may overlap, `drop` counts what they cover.
    """

    mean: Tensor
    inv_std: Tensor
    noise: float = 0.0
    drop: float = 0.0
    drop_span_steps: int = 1

    def apply(self, frames: Tensor, r: int, seed: int, step: int, row: int) -> None:
        """Changes one row's frames, float32 (T * r, M), r frames a step, in place."""
        if self.noise:
            drawn = _stream(seed, step, row, _NOISE).standard_normal(
                tuple(frames.shape), dtype=np.float32
            )
            frames += torch.from_numpy(drawn) * (self.noise / self.inv_std)
        if self.drop:
            dropped = self.dropped(len(frames) // r, _stream(seed, step, row, _DROP))
            frames.view(-1, r, frames.shape[1])[torch.from_numpy(dropped)] = self.mean

    def dropped(self, n_steps: int, stream: np.random.Generator) -> np.ndarray:
        """Which of n_steps are dropped, bool (n_steps,): each with probability `drop`.

        A span begins at a step with probability 1 - (1 - drop)^(1 / span), so that a step, which
        `span` beginnings can cover, is left with probability 1 - drop.
        """
        span = self.drop_span_steps
        begins = stream.random(n_steps + span - 1) < 1 - (1 - self.drop) ** (1 / span)
        covered = np.convolve(begins, np.ones(span))[span - 1 : span - 1 + n_steps]
        return covered > 0.5


def scored_steps(n_steps: int, share: float, seed: int, step: int, rows: range) -> Tensor:
    """A random share of the steps of each row, int64 (len(rows), max(1, round(share * T))).

    Drawn without replacement, sorted.
    """
    n_chosen = max(1, round(share * n_steps))
    chosen = [
        np.sort(_stream(seed, step, row, _SCORED).permutation(n_steps)[:n_chosen]) for row in rows
    ]
    return torch.from_numpy(np.stack(chosen))
