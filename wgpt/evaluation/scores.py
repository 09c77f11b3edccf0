"""Teacher-forced NLL, accuracy and perplexity of a model, clip by clip, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from wgpt.config import STEP_RATE_HZ
from wgpt.data.batches import evaluation_batches
from wgpt.data.dataset import Split
from wgpt.model import HybridModel

N_DRAWS = 2000
LEAST_GROUPS = 8  # below, the bootstrap draws clips
LEAST_DRAWN = 5  # below, an interval would mean nothing


@dataclass(frozen=True, eq=False)
class Score:
    """Sums over the scored tokens of each clip.

    nll: float64 (n_clips,), nats; correct, n_tokens: int64 (n_clips,); groups names each clip's.
    """

    name: str
    nll: np.ndarray
    correct: np.ndarray
    n_tokens: np.ndarray
    groups: list[str]

    def row(self, group: str | None = None) -> dict[str, Any]:
        """Figures over one group of clips, or all: nats, share, perplexity, bits per second."""
        of = np.array([group is None or g == group for g in self.groups], dtype=bool)
        n_tokens = int(self.n_tokens[of].sum())
        nll = float(self.nll[of].sum()) / max(n_tokens, 1)
        return {
            "model": self.name,
            "group": group or "all",
            "nll_nats": nll,
            "accuracy": float(self.correct[of].sum()) / max(n_tokens, 1),
            "perplexity": math.inf if nll > 700 else math.exp(nll),  # a model gone astray
            "bits_per_s": nll / math.log(2) * STEP_RATE_HZ,
            "n_tokens": n_tokens,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row over all clips and, where there are several groups, one for each."""
        names = sorted(set(self.groups))
        return [self.row()] + ([self.row(name) for name in names] if len(names) > 1 else [])


def score(name: str, model: HybridModel, split: Split, **options: Any) -> Score:
    """Teacher-forced score of the coarse codebook; options as in `codebook_scores`."""
    return codebook_scores(name, model, split, **options, with_fine=False)[0]


@torch.inference_mode()
def codebook_scores(
    name: str,
    model: HybridModel,
    split: Split,
    *,
    context_steps: int,
    mel_source: str | None = "wave",
    batch_size: int = 8,
    clips: list[int] | None = None,
    dtype: str = "fp32",
    with_fine: bool = True,
) -> list[Score]:
    """Teacher-forced scores over every token of the clips, by the window rule of data.batches.

    One for codebook 0, then, `with_fine`, one for each of the model's residual codebooks. A model
    with an end of clip pays for the probability it spends on it; the ends are not scored.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    fine = model.fine if with_fine else None
    sums = np.zeros((1 + (model.config.n_fine if fine else 0), 3, split.n_clips))
    source = mel_source if model.config.mel_dim else None
    options: dict[str, Any] = {"batch_size": batch_size, "clips": clips, "n_fine": len(sums) - 1}
    options["codebooks"] = model.n_codebooks_read
    for batch in evaluation_batches(split, context_steps, source, **options):
        on_device = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            hidden = model.hidden(on_device.tokens, on_device.frames, first_key=on_device.first_key)
            logits = model.head(hidden)
        scored = on_device.targets >= 0
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            on_device.targets.flatten(),
            ignore_index=-1,
            reduction="none",
        )
        correct = (logits.argmax(-1) == on_device.targets) & scored
        _add(sums[0], [losses.view_as(scored), correct, scored], batch.clips)
        if fine is None:
            continue
        assert on_device.codes is not None
        for row in range(len(batch.clips)):  # row by row: logits of T * n_fine * V
            codes = on_device.codes[row : row + 1]
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                nll, hit = fine.nll(hidden[row : row + 1], codes)
            known = fine.known_targets(codes)
            for k in range(model.config.n_fine):
                _add(sums[1 + k], [nll[:, k], hit[:, k], known[:, k]], batch.clips[row])
    model.train(was_training)
    names = [name, *(f"{name}, codebook {k}" for k in range(1, len(sums)))]
    return [to_score(n, s, split, clips) for n, s in zip(names, sums, strict=True)]


def _add(sums: np.ndarray, values: list[torch.Tensor], clips: torch.Tensor) -> None:
    """Adds values, each of as many positions as clips, to the sums (3, n_clips) of their clips."""
    of = clips.flatten().numpy()
    real = of >= 0
    for into, value in zip(sums, values, strict=True):
        weights = value.flatten().double().cpu().numpy()
        into += np.bincount(of[real], weights[real], len(into))


def to_score(name: str, sums: np.ndarray, split: Split, clips: list[int] | None = None) -> Score:
    """The Score of sums float64 (3, n_clips): NLL, correct, tokens; of `clips` alone if given."""
    chosen = list(range(split.n_clips)) if clips is None else clips
    return Score(
        name,
        sums[0, chosen],
        sums[1, chosen].astype(np.int64),
        sums[2, chosen].astype(np.int64),
        [split.groups[i] for i in chosen],
    )


def paired_difference(
    a: Sequence[Score], b: Sequence[Score], group: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """NLL of a minus b in nats per token, and its 95 % bootstrap interval.

    Drawn anew are the groups (speakers, scenes, tracks), whose clips are alike, or the clips where
    there are fewer than LEAST_GROUPS groups; and the models of both, where there are several.

    Args:
        a, b: scores of the same clips by models that differ in their seed alone.
        group: only these clips; None: all.
        seed: of the draws.

    Returns {nll_nats, low, high, drawn: "groups" or "clips", n_drawn, n_seeds: of a and b}; low and
    high are None for fewer than LEAST_DRAWN of them.
    """
    groups = np.array(a[0].groups)
    chosen = np.ones(len(groups), bool) if group is None else groups == group
    names, unit = np.unique(groups[chosen], return_inverse=True)
    drawn = "groups" if len(names) >= LEAST_GROUPS else "clips"
    if drawn == "clips":
        unit = np.arange(int(chosen.sum()))
    n_units = int(unit.max()) + 1

    def by_unit(values: np.ndarray) -> np.ndarray:
        return np.bincount(unit, values[chosen], n_units)

    nll_a, nll_b = (np.array([by_unit(one.nll) for one in scores]) for scores in (a, b))
    n_tokens = by_unit(a[0].n_tokens)
    rng = np.random.default_rng(seed)
    draws = np.empty(N_DRAWS)
    for i in range(N_DRAWS):
        weights = np.bincount(rng.integers(0, n_units, n_units), minlength=n_units)
        of_a, of_b = (values[rng.integers(0, len(values), len(values))].mean(0)
                      for values in (nll_a, nll_b))  # fmt: skip
        draws[i] = weights @ (of_a - of_b) / (weights @ n_tokens)
    low, high = map(float, np.quantile(draws, [0.025, 0.975]))
    is_enough = n_units >= LEAST_DRAWN
    return {
        "nll_nats": float((nll_a.mean(0) - nll_b.mean(0)).sum() / n_tokens.sum()),
        "low": low if is_enough else None,
        "high": high if is_enough else None,
        "drawn": drawn,
        "n_drawn": n_units,
        "n_seeds": [len(a), len(b)],
    }
