"""Many channels to one: by what each channel is, and not where they cancel."""

from __future__ import annotations

import numpy as np

# ITU-R BS.775: centre and front pair lead, surrounds are 3 dB lower, the effects channel is left
# out. The front pair weighs 1 here, so the centre, which both sides would carry, weighs 2^0.5.
_WEIGHTS = {"L": 1.0, "R": 1.0, "C": 2**0.5, "LFE": 0.0}
_OTHER = 0.5**0.5
# Channels cancel if their sum holds under a tenth of what it would hold were they unrelated:
# a correlation below -0.9, as of a balanced line or a flipped plug.
CANCELLING = 0.1


class Downmix:
    """Weighs the channels of one stream, and watches whether they cancel.

    Args:
        names: what each channel is, as in `decoders.Stream`.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        weights = np.array([_WEIGHTS.get(name, _OTHER) for name in names])
        if len(names) == 1 or not weights.any():
            weights = np.ones(len(names))
        self.names = names
        self.weights = (weights / weights.sum()).astype(np.float32)
        self._powers = np.zeros(len(names))
        self._mixed = 0.0

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """float32 (n, channels) to float32 (n,)."""
        if block.shape[1] == 1:
            return np.ascontiguousarray(block[:, 0])
        mono = block @ self.weights
        self._powers += np.einsum("ij,ij->j", block, block)
        self._mixed += float(mono @ mono)
        return np.ascontiguousarray(mono)

    def loudest_if_cancelling(self) -> int | None:
        """After the last block: the channel to take alone, None if the mix may stay."""
        unrelated = float((np.square(self.weights, dtype=np.float64) * self._powers).sum())
        if np.count_nonzero(self.weights) < 2 or self._mixed >= CANCELLING * unrelated:
            return None
        return int(np.argmax(self._powers * (self.weights > 0)))

    def take_only(self, channel: int) -> None:
        """Take one channel from now on."""
        self.weights = np.zeros_like(self.weights)
        self.weights[channel] = 1.0
