"""Clips packed into windows: laid end to end in random order and cut, so that nothing is padded.

    epoch e:   | clip 7      E| clip 2   E| clip 9              E| ...    one position a step,
               |     window 4     |     window 0     |     window 1 ...   E: end of clip, if asked

A clip that a window cuts goes on in another window, as a segment of its own. Both the order of the
clips and that of the windows are new in each epoch, and so is the place of the first cut: even a
single long recording gives other windows each time. All of it depends on (seed, epoch) alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from wgpt.data.augment import random_stream

_ORDER = 4  # purpose of the random stream; augment.py has the others


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of a clip, of which [scored_from, stop) are targets.

    Position t is step t; behind the n steps of a clip, position n is its end.
    """

    clip: int
    start: int
    stop: int
    scored_from: int


class PackedWindows:
    """The endless sequence of training windows over clips: `window(i)` is a list of segments.

    Args:
        n_positions: int (n_clips,), positions of each clip, at least 1.
        window_steps: positions T of a window; the last of an epoch may have fewer.
        seed: 0 <= seed < 2^64.
    """

    def __init__(self, n_positions: np.ndarray, window_steps: int, seed: int) -> None:
        self.n_positions = np.asarray(n_positions, dtype=np.int64)
        self.window_steps, self.seed = window_steps, seed
        self.n_total = int(self.n_positions.sum())
        self.n_windows = -(-self.n_total // window_steps)  # of an epoch
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def window(self, index: int) -> list[Segment]:
        """The segments of window index >= 0, in order; they fill it unless it ends its epoch."""
        epoch, place = divmod(index, self.n_windows)
        order, ends, first, windows = self._epoch(epoch)
        begin = int(windows[place]) * self.window_steps
        length = min(self.window_steps, self.n_total - begin)
        begin = (begin + first) % self.n_total
        segments = []
        while length:
            at = int(np.searchsorted(ends, begin, side="right"))
            clip, start = int(order[at]), begin - (int(ends[at - 1]) if at else 0)
            stop = min(start + length, int(self.n_positions[clip]))
            segments.append(Segment(clip, start, stop, scored_from=start))
            begin, length = (begin + stop - start) % self.n_total, length - (stop - start)
        return segments

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Clips in order, where each ends, the first cut, and the windows in order."""
        stream = random_stream(self.seed, epoch, 0, _ORDER)
        order = stream.permutation(len(self.n_positions))
        first = int(stream.integers(self.n_total))
        return (
            order,
            np.cumsum(self.n_positions[order]),
            first,
            stream.permutation(self.n_windows),
        )


def cover(n_steps: int, context_steps: int, clip: int = 0) -> list[Segment]:
    """Covers a clip so that each step is scored once, by windows overlapping by half.

    The first window scores all it holds; a later one scores what its predecessors did not, so
    each of its targets has at least context_steps / 2 earlier inputs in the window.
    """
    stride = max(context_steps // 2, 1)
    found, start, done = [], 0, 0
    while done < n_steps:
        stop = min(start + context_steps, n_steps)
        found.append(Segment(clip, start, stop, scored_from=done))
        start, done = start + stride, stop
    return found
