"""Teacher-forced NLL, accuracy and perplexity of a model, clip by clip, and paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from wgpt.config import STEP_RATE_HZ
from wgpt.data.batches import evaluation_batches
from wgpt.data.dataset import Split
from wgpt.model import HybridModel


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
    """Teacher-forced scores over every token of the clips, by the window rule of data.loader.

    One for codebook 0, then, `with_fine`, one for each of the model's residual codebooks.
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
            hidden = model.hidden(on_device.tokens, on_device.frames)
            logits = model.head(hidden)
        scored = on_device.targets >= 0
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            on_device.targets.flatten(),
            ignore_index=-1,
            reduction="none",
        )
        losses = losses.view_as(scored).double().sum(1)
        correct = ((logits.argmax(-1) == on_device.targets) & scored).sum(1)
        per_row = torch.stack([losses, correct.double(), scored.sum(1).double()]).cpu().numpy()
        for row, clip in enumerate(batch.clips.tolist()):
            sums[0, :, clip] += per_row[:, row]
            if fine is None:
                continue
            assert on_device.codes is not None
            codes = on_device.codes[row : row + 1]  # row by row: logits of T * n_fine * V
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                nll, hit = fine.nll(hidden[row : row + 1], codes)
            known = fine.known_targets(codes)
            facts = torch.stack([nll.double(), hit.double(), known.double()], 1).sum((0, 3))
            sums[1:, :, clip] += facts.T.cpu().numpy()
    model.train(was_training)
    names = [name, *(f"{name}, codebook {k}" for k in range(1, len(sums)))]
    return [to_score(n, s, split, clips) for n, s in zip(names, sums, strict=True)]


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
    a: Score, b: Score, group: str | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """NLL of a minus b in nats per token with a 95 % bootstrap interval over clips (2000 draws)."""
    of = np.array([group is None or g == group for g in a.groups], dtype=bool)
    gap, n_tokens = (a.nll - b.nll)[of], a.n_tokens[of]
    draws = np.random.default_rng(seed).integers(0, len(gap), (2000, len(gap)))
    means = gap[draws].sum(1) / n_tokens[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gap.sum() / n_tokens.sum()), float(low), float(high)
