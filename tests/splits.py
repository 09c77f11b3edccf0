"""Splits made by hand, and the codec of prepared ones."""

import numpy as np

from wgpt import codec
from wgpt.data.dataset import Dataset, Split


def split_of(clips: list[list[int]], size: int = 4, groups=None) -> Split:
    tokens = np.concatenate([np.array(c, dtype=np.uint16) for c in clips])[:, None]
    offsets = np.cumsum([0, *map(len, clips)])
    return Split("made", tokens, offsets, {}, groups or ["."] * len(clips), 1, size, 0.0)


def codec_of(dataset: Dataset) -> codec.Codec:
    """The codec that a data set's tokens are of."""
    return codec.load(dataset.manifest["codec"]["source"])
