"""Uniform, unigram and bigram models of codebook 0."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from wgpt.data.dataset import Split
from wgpt.evaluation.scores import Score, to_score


def baselines(train: Split, split: Split) -> list[Score]:
    """Uniform, unigram and bigram models of codebook 0, fitted on `train`, scored on `split`.

    Unigram: add-one counts. Bigram: Witten-Bell interpolation with it, n(h) / (n(h) + d(h)) of the
    weight on the counts after h, d(h) the number of different followers (Witten and Bell, 1991);
    the history of a clip's first token is the begin-of-clip token. Nothing is tuned on `split`.
    """
    size = train.codebook_size
    counts = np.zeros((size + 1, size))
    for previous, token in _pairs(train):
        np.add.at(counts, (previous, token), 1.0)
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
        for clip, (previous, token) in enumerate(_pairs(split)):
            sums[0, clip] = -np.log(table[previous, token]).sum()
            sums[1, clip] = (best[previous] == token).sum()
            sums[2, clip] = len(token)
        scores.append(to_score(name, sums, split))
    return scores


def _pairs(split: Split) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(history, token) of each clip, int64 (T,) both."""
    for clip in range(split.n_clips):
        token = split.clip(clip)[0][0].numpy()
        yield np.concatenate([[split.codebook_size], token[:-1]]), token
