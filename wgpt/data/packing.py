"""Clips packed into windows: laid end to end in random order and cut, so that nothing is padded.

    epoch e:   | clip 7      E| clip 2   E| clip 9              E| ...    one position a step,
               |     window 4     |     window 0     |     window 1 ...   E: end of clip, if asked

A clip that a window cuts goes on in another window, as a segment of its own. Both the order of the
clips and that of the windows are new in each epoch, and so is the place of the first cut: even a
single long recording gives other windows each time. All of it depends on (seed, epoch) alone. Of
very many clips or windows the order is computed, not held, see MOST_HELD.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

import numpy as np

from wgpt.data.augment import random_stream

_ORDER = 4  # purpose of the random stream; augment.py has the others
_64_BITS = (1 << 64) - 1
# Clips or windows, above which an epoch's order is computed: 2900 hours in windows of 10 s. Another
# value would give runs that exist other windows.
MOST_HELD = 1 << 20


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
        offsets: int64 (n_clips + 1,), first step of each clip, then all; may be memory-mapped.
        window_steps: positions T of a window; the last of an epoch may have fewer.
        seed: 0 <= seed < 2^64.
        end_of_clip: each clip has a position more than steps, its end.
        held: clips and windows up to which an epoch's order is held in memory. A run must see the
            same windows when it is resumed, so it is always MOST_HELD but in tests.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        window_steps: int,
        seed: int,
        end_of_clip: bool = False,
        held: int = MOST_HELD,
    ) -> None:
        self.window_steps, self.seed = window_steps, seed
        self.offsets, self.end_of_clip = offsets, int(end_of_clip)
        self.n_clips = len(offsets) - 1
        self.n_total = int(offsets[-1]) + self.end_of_clip * self.n_clips
        self.n_windows = -(-self.n_total // window_steps)  # of an epoch
        self.held = held
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    def window(self, index: int) -> list[Segment]:
        """The segments of window index >= 0, in order; they fill it unless it ends its epoch."""
        epoch, place = divmod(index, self.n_windows)
        order = self._epoch(epoch)
        begin = order.window(place) * self.window_steps
        length = min(self.window_steps, self.n_total - begin)
        begin = (begin + order.first) % self.n_total
        segments = []
        while length:
            clip, start, n_positions = order.clip_at(begin)
            stop = min(start + length, n_positions)
            segments.append(Segment(clip, start, stop, scored_from=start))
            begin, length = (begin + stop - start) % self.n_total, length - (stop - start)
        return segments

    def _order(self, epoch: int) -> _HeldOrder | _ComputedOrder:
        stream = random_stream(self.seed, epoch, 0, _ORDER)
        if max(self.n_windows, self.n_clips) > self.held:
            first = int(stream.integers(self.n_total))
            windows = Permutation(self.n_windows, stream)
            return _ComputedOrder(first, self.offsets, self.end_of_clip, windows)
        n_positions = np.diff(self.offsets) + self.end_of_clip
        clips = stream.permutation(self.n_clips)
        first = int(stream.integers(self.n_total))
        ends = np.cumsum(n_positions[clips])
        return _HeldOrder(first, clips, ends, n_positions, stream.permutation(self.n_windows))


@dataclass(frozen=True, eq=False)
class _HeldOrder:
    """An epoch: clips in random order, where each ends, the first cut, and windows in order."""

    first: int
    clips: np.ndarray
    ends: np.ndarray
    n_positions: np.ndarray
    windows: np.ndarray

    def window(self, place: int) -> int:
        return int(self.windows[place])

    def clip_at(self, position: int) -> tuple[int, int, int]:
        """(clip, position inside it, its positions) of a position of all clips end to end."""
        at = int(np.searchsorted(self.ends, position, side="right"))
        clip = int(self.clips[at])
        before = int(self.ends[at - 1]) if at else 0
        return clip, position - before, int(self.n_positions[clip])


@dataclass(frozen=True, eq=False)
class _ComputedOrder:
    """An epoch of very many clips: they lie as they are stored, and no array of them is held.

    Which clips share a window is then the same in each epoch but for the first cut; none sees
    another, so it changes only what shares a batch, as the order of the windows does.
    """

    first: int
    offsets: np.ndarray
    end_of_clip: int
    windows: Permutation

    def window(self, place: int) -> int:
        return self.windows(place)

    def clip_at(self, position: int) -> tuple[int, int, int]:
        """(clip, position inside it, its positions) of a position of all clips end to end."""

        def begin(clip: int) -> int:
            return int(self.offsets[clip]) + clip * self.end_of_clip

        clip = bisect.bisect_right(range(len(self.offsets) - 1), position, key=begin) - 1
        return clip, position - begin(clip), begin(clip + 1) - begin(clip)


class Permutation:
    """A random order of 0 ... n - 1 that is computed where it is asked for.

    A Feistel network over the smallest even number of bits that holds n (Luby & Rackoff, 1988; six
    rounds), applied again while the result is n or more: a bijection whatever the round function.
    """

    def __init__(self, n: int, stream: np.random.Generator) -> None:
        self.n = n
        self.half = max((n - 1).bit_length() + 1, 2) // 2
        self.keys = [int(key) for key in stream.integers(0, 1 << 63, 6)]

    def __call__(self, i: int) -> int:
        """The number at place i, both in [0, n)."""
        mask = (1 << self.half) - 1
        while True:
            left, right = i >> self.half, i & mask
            for key in self.keys:
                left, right = right, left ^ (_mix(right + key) & mask)
            i = left << self.half | right
            if i < self.n:
                return i


def _mix(x: int) -> int:
    """64 bits to 64 bits, each of the result depending on all: the finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64_BITS
    return x ^ x >> 31


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
