"""Uniform, unigram and bigram models of codebook 0."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from wgpt.data.dataset import Split
from wgpt.evaluation.scores import Score, to_score

_CHUNK_STEPS = 1 << 22  # counted at once: 100 MB


def baselines(train: Split, split: Split, clips: list[int] | None = None) -> list[Score]:
    """Uniform, unigram and bigram models of codebook 0, fitted on `train`, scored on `split`, on
    `clips` of it if given.

    Unigram: add-one counts. Bigram: Witten-Bell interpolation with it, n(h) / (n(h) + d(h)) of the
    weight on the counts after h, d(h) the number of different followers (Witten and Bell, 1991);
    the history of a clip's first token is the begin-of-clip token. Nothing is tuned on `split`.
    """
    size = train.codebook_size
    counts = _pair_counts(train)
    unigram = (counts.sum(0) + 1) / (counts.sum() + size)
    n_after = counts.sum(1, keepdims=True)
    n_kinds = (counts > 0).sum(1, keepdims=True)
    bigram = np.where(
        n_after > 0, (counts + n_kinds * unigram) / np.maximum(n_after + n_kinds, 1), unigram
    )
    tables = {
        "uniform": np.full_like(bigram, 1 / size),
        "unigram": np.broadcast_to(unigram, bigram.shape),
        "bigram": bigram,
    }
    scores = []
    for name, table in tables.items():
        sums = np.zeros((3, split.n_clips))
        best = table.argmax(1)
        for clip, previous, token in _pairs(split, clips):
            sums[0, clip] = -np.log(table[previous, token]).sum()
            sums[1, clip] = (best[previous] == token).sum()
            sums[2, clip] = len(token)
        scores.append(to_score(name, sums, split, clips))
    return scores


def _pair_counts(split: Split) -> np.ndarray:
    """How often each token follows each history, float64 (V + 1, V)."""
    size = split.codebook_size
    counts = np.zeros((size + 1) * size, dtype=np.int64)
    for start in range(0, split.n_steps, _CHUNK_STEPS):
        stop = min(start + _CHUNK_STEPS, split.n_steps)
        tokens = split.tokens[start:stop, 0].astype(np.int64)
        before = np.concatenate([[size], split.tokens[max(start - 1, 0) : stop - 1, 0]])
        history = before[-len(tokens) :].astype(np.int64)
        first = split.offsets[(split.offsets >= start) & (split.offsets < stop)] - start
        history[first] = size
        counts += np.bincount(history * size + tokens, minlength=len(counts))
    return counts.reshape(size + 1, size).astype(np.float64)


def _pairs(split: Split, clips: list[int] | None) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """(clip, history, token) of each clip, int64 (T,) both."""
    for clip in range(split.n_clips) if clips is None else clips:
        token = split.clip(clip)[0][0].numpy()
        yield clip, np.concatenate([[split.codebook_size], token[:-1]]), token
