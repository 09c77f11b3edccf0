"""Splits made by hand."""

import numpy as np

from wgpt.data.dataset import Split


def split_of(clips: list[list[int]], size: int = 4, groups=None) -> Split:
    tokens = np.concatenate([np.array(c, dtype=np.uint16) for c in clips])[:, None]
    offsets = np.cumsum([0, *map(len, clips)])
    return Split("made", tokens, offsets, {}, groups or ["."] * len(clips), 1, size, 0.0)
