"""Drawing tokens from logits: temperature, top-k, top-p, one seed a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wgpt.errors import ConfigError, GenerationError

FINE_TEMPERATURE = 0.8  # of the residual codebooks; measured in docs/log.md


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits: the coarse ones, and those of the residual codebooks.

    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: keep the k most likely; 0 keeps all.
    top_p: keep the smallest set of most likely tokens with at least this probability; 1 keeps all.
    fine_temperature, fine_top_k: the same for codebooks 1 and up, which top_p does not touch.
        Cooler than the coarse one: what a residual codebook adds at random is heard as noise
        (docs/closed-loop.md).
    end_of_clip: a model with an end-of-clip token may end the clip; False: it continues.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    fine_temperature: float = FINE_TEMPERATURE
    fine_top_k: int = 0
    end_of_clip: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "fine_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be finite and at least 0, got {value}")
        for name in ("top_k", "fine_top_k"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")


class Sampler:
    """draw(logits) gives one coarse token a row, draw.fine(logits) one of a residual codebook, each
    row by its own seed.

    One uniform number a token and row, taken by the inverse of the cumulative distribution in
    float64 on the CPU: a row draws what it would draw alone, and the same on every device up to
    rounding of the logits.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise ConfigError(f"seed must be in [0, 2^63), got {seed}")
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.entropy_nats = np.zeros(len(seeds))  # float64 (B,), of the latest coarse ones
        self.ended = np.zeros(len(seeds), bool)  # rows that drew the end of their clip
        self._n_drawn = 0

    def __call__(self, logits: Tensor, end_token: int | None = None) -> Tensor:
        """int64 (B,) on the device of logits (B, V); its distributions' entropies are kept.

        end_token: V, the last entry of logits (B, V + 1), ends the clip. A row that draws it is
        noted in `ended` and draws again from the codes, since the other rows of its batch may have
        more to say. The first token of a continuation is always a code.
        """
        sampling = self.sampling
        rules = (sampling.temperature, sampling.top_k, sampling.top_p)
        codes = logits[:, :end_token]
        may_end = sampling.end_of_clip and self._n_drawn > 0
        tokens, self.entropy_nats = self._draw(logits if may_end else codes, *rules)
        self._n_drawn += 1
        if end_token is not None and may_end:
            for row in (tokens == end_token).nonzero()[:, 0].tolist():
                self.ended[row] = True
                tokens[row] = self._draw_row(row, _float64(codes[row]), *rules)[0]
        return tokens

    def fine(self, logits: Tensor) -> Tensor:
        """int64 (B,) on the device of logits (B, V) of a residual codebook."""
        return self._draw(logits, self.sampling.fine_temperature, self.sampling.fine_top_k, 1.0)[0]

    def _draw(
        self, logits: Tensor, temperature: float, top_k: int, top_p: float
    ) -> tuple[Tensor, np.ndarray]:
        """Tokens int64 (B,) and entropies float64 (B,), nats."""
        rows = _float64(logits)
        drawn, entropies = np.empty(len(rows), dtype=np.int64), np.zeros(len(rows))
        for i, row in enumerate(rows):
            drawn[i], entropies[i] = self._draw_row(i, row, temperature, top_k, top_p)
        return torch.from_numpy(drawn).to(logits.device), entropies

    def _draw_row(
        self, i: int, row: np.ndarray, temperature: float, top_k: int, top_p: float
    ) -> tuple[int, float]:
        uniform = float(torch.rand((), dtype=torch.float64, generator=self._generators[i]))
        return _pick(row, uniform, temperature, top_k, top_p)


def _float64(logits: Tensor) -> np.ndarray:
    """Logits as float64 on the CPU, of the same shape."""
    return logits.detach().double().cpu().numpy()


def _pick(
    logits: np.ndarray, uniform: float, temperature: float, top_k: int, top_p: float
) -> tuple[int, float]:
    """The token of one row (V,) for a number in [0, 1), and the entropy in nats."""
    if temperature == 0:
        return int(logits.argmax()), 0.0
    if not np.isfinite(logits).all():
        raise GenerationError("generate: the model gives logits that are not finite")
    order: np.ndarray | None = None
    if 0 < top_k < len(logits):  # sorting 1024 for 100 of them costs 40 us
        order = np.sort(np.argpartition(logits, -top_k)[-top_k:])
    if top_k or top_p < 1:
        order = np.arange(len(logits)) if order is None else order
        order = order[np.argsort(-logits[order], kind="stable")]
        logits = logits[order]
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        weights = np.exp((logits - logits.max()) / temperature)
    if top_p < 1:
        share = np.cumsum(weights)
        n_kept = int(np.searchsorted(share, top_p * share[-1])) + 1
        weights = weights[:n_kept]
    cumulative = np.cumsum(weights)
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    place = min(place, len(weights) - 1)
    share = weights / cumulative[-1]
    entropy = -float(share @ np.log(np.maximum(share, 1e-300)))
    return int(place if order is None else order[place]), max(entropy, 0.0)
