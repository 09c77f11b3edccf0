"""Batches of windows, as pure functions of (seed, step): no state to save, nothing to replay.

The shift rule, for a window of n steps from step s of a clip, and what the model is fed:

    targets  codes[0, s], codes[0, s+1], ..., codes[0, s+n-1]
    tokens   codes[:, s-1], codes[:, s], ..., codes[:, s+n-2]     BOS before the clip's first step
    frames   mel of the same steps s-1 ... s+n-2                  silence before the first step

so position i predicts step s+i from steps before it, and no mel frame reaches the target's step.
BOS is the id after the last code (1024).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgpt.data.augment import MelAugment
from wgpt.data.dataset import Split
from wgpt.errors import ConfigError, DataError

IGNORED = -1  # a target that is not scored


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs and targets; rows shorter than T are padded on the right.

    tokens: int64 (B, T), or (B, T, K) for codebooks > 1; padding is BOS.
    frames: float32 (B, T * r, M) log-mel, not normalised, padding is silence; None without mel.
    targets: int64 (B, T), codes of codebook 0; IGNORED (-1) where nothing is scored.
    codes: int64 (B, 1 + n_fine, T), `targets` and the finer codebooks of the same steps; None
        unless asked for.
    clips, starts: int64 (B,), the clip of each row and the step of its first target.
    """

    tokens: Tensor
    frames: Tensor | None
    targets: Tensor
    clips: Tensor
    starts: Tensor
    codes: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        moved = {name: value.to(device, non_blocking=True)
                 for name, value in vars(self).items() if value is not None}  # fmt: skip
        return replace(self, **moved)


@dataclass(frozen=True)
class Crop:
    """Steps [start, stop) of a clip, of which [scored_from, stop) are targets."""

    clip: int
    start: int
    stop: int
    scored_from: int


def collate(
    split: Split,
    crops: list[Crop],
    *,
    mel_source: str | None = None,
    codebooks: int = 1,
    n_fine: int = 0,
) -> Batch:
    """Read crops and apply the shift rule above."""
    if not 0 <= n_fine < split.n_codebooks:
        raise DataError(
            f"{split.name}: n_fine must lie in [0, {split.n_codebooks - 1}], codebooks after the "
            f"first, got {n_fine}"
        )
    if not 1 <= codebooks <= split.n_codebooks:
        raise DataError(
            f"{split.name}: codebooks must lie in [1, {split.n_codebooks}], got {codebooks}"
        )
    r, bos = split.frames_per_step, split.codebook_size
    n_rows, length = len(crops), max(w.stop - w.start for w in crops)
    tokens = torch.full((n_rows, length, codebooks), bos, dtype=torch.int64)
    targets = torch.full((n_rows, 1 + n_fine, length), IGNORED, dtype=torch.int64)
    frames = None
    if mel_source is not None:
        n_mels = split.mel_array(mel_source).shape[1]
        frames = torch.full((n_rows, length * r, n_mels), split.silence)
    for row, crop in enumerate(crops):
        before = max(crop.start - 1, 0)
        at_clip_start = crop.start == 0
        codes, mel = split.slice(crop.clip, before, crop.stop, mel_source)
        own = codes[:, crop.start - before :]  # (K, n): the crop's own steps
        skip = crop.scored_from - crop.start
        targets[row, :, skip : own.shape[1]] = own[: 1 + n_fine, skip:]
        first = 1 if at_clip_start else 0  # row position of the first step that was read
        known = codes.shape[1] - 1  # the last step is a target only
        tokens[row, first : first + known] = codes[:codebooks, :known].T
        if frames is not None and mel is not None:
            frames[row, first * r : (first + known) * r] = mel[: known * r]
    return Batch(
        tokens=tokens[:, :, 0] if codebooks == 1 else tokens,
        frames=frames,
        targets=targets[:, 0],
        codes=targets if n_fine else None,
        clips=torch.tensor([w.clip for w in crops], dtype=torch.int64),
        starts=torch.tensor([w.start for w in crops], dtype=torch.int64),
    )


class TrainingBatches:
    """Random training windows: `batch(step)` depends on (seed, step) and the data alone.

    A window's clip is drawn with probability proportional to its length, its start evenly among
    those that fit (0 for a clip no longer than the context). The draws of step k come from numpy's
    Philox keyed by (seed, k), so any worker can make any batch, and resuming needs only k.

    Args:
        split: where from.
        batch_size: rows B of the whole batch, over all ranks.
        context_steps: longest window T.
        seed: 0 <= seed < 2^64.
        mel_source: which mel to read; None for no frames.
        codebooks: codebooks given as input.
        n_fine: finer codebooks in Batch.codes.
        augment: what is done to the frames; None for nothing.
        rank, world_size: this process reads rows [rank * B / world_size, ...) of the same draw.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        context_steps: int,
        seed: int,
        mel_source: str | None,
        codebooks: int = 1,
        n_fine: int = 0,
        augment: MelAugment | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        rules = [
            ("batch_size", "at least 1", batch_size, batch_size >= 1),
            ("context_steps", "at least 1", context_steps, context_steps >= 1),
            ("seed", "in [0, 2^64)", seed, 0 <= seed < 1 << 64),
            ("batch_size", f"divisible by {world_size} ranks", batch_size,
             world_size >= 1 and batch_size % world_size == 0),
            ("rank", f"in [0, {world_size})", rank, 0 <= rank < world_size),
        ]  # fmt: skip
        for name, rule, got, holds in rules:
            if not holds:
                raise ConfigError(f"batches: {name} must be {rule}, got {got}")
        if split.n_steps == 0:
            raise DataError(f"{split.name}: must hold at least one clip to draw batches from")
        if mel_source is not None:
            split.mel_array(mel_source)
        self.split, self.batch_size, self.context_steps = split, batch_size, context_steps
        self.seed, self.mel_source, self.codebooks = seed, mel_source, codebooks
        self.n_fine, self.augment = n_fine, augment
        self.rows = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def crops(self, step: int) -> list[Crop]:
        """The windows of one step, this rank's rows."""
        offsets = self.split.offsets
        bits = np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64))
        draws = np.random.Generator(bits).random((self.batch_size, 2))
        chosen = []
        for row in self.rows:
            place = min(int(draws[row, 0] * self.split.n_steps), self.split.n_steps - 1)
            clip = int(np.searchsorted(offsets, place, side="right")) - 1
            n_starts = max(int(offsets[clip + 1] - offsets[clip]) - self.context_steps, 0) + 1
            start = min(int(draws[row, 1] * n_starts), n_starts - 1)
            stop = min(start + self.context_steps, self.split.clip_steps(clip))
            chosen.append(Crop(clip, start, stop, scored_from=start))
        return chosen

    def batch(self, step: int) -> Batch:
        """The batch of a step >= 0."""
        batch = collate(
            self.split,
            self.crops(step),
            mel_source=self.mel_source,
            codebooks=self.codebooks,
            n_fine=self.n_fine,
        )
        if self.augment is not None and batch.frames is not None:
            for row, frames in zip(self.rows, batch.frames, strict=True):
                self.augment.apply(frames, self.split.frames_per_step, self.seed, step, row)
        return batch


def cover(n_steps: int, context_steps: int, clip: int = 0) -> list[Crop]:
    """Cover a clip so that each step is scored once, by windows overlapping by half.

    The first window scores all it holds; a later one scores what its predecessors did not, so
    each of its targets has at least context_steps / 2 earlier inputs in the window.
    """
    stride = max(context_steps // 2, 1)
    found, start, done = [], 0, 0
    while done < n_steps:
        stop = min(start + context_steps, n_steps)
        found.append(Crop(clip, start, stop, scored_from=done))
        start, done = start + stride, stop
    return found


def evaluation_batches(
    split: Split,
    context_steps: int,
    mel_source: str | None,
    *,
    batch_size: int = 8,
    codebooks: int = 1,
    n_fine: int = 0,
    clips: list[int] | None = None,
) -> Iterator[Batch]:
    """Evaluation batches in a fixed order: every step of every clip is a target exactly once.

    `Batch.clips` names each row's clip, so losses can be summed per clip or per group.

    Args:
        clips: which clips; all by default.
    """
    if context_steps < 1 or batch_size < 1:
        raise ConfigError(
            f"evaluation_batches: context_steps and batch_size must be at least 1, "
            f"got {context_steps} and {batch_size}"
        )
    options: dict[str, Any] = {"mel_source": mel_source, "codebooks": codebooks, "n_fine": n_fine}
    waiting: list[Crop] = []
    for clip in range(split.n_clips) if clips is None else clips:
        for window in cover(split.clip_steps(clip), context_steps, clip):
            waiting.append(window)
            if len(waiting) == batch_size:
                yield collate(split, waiting, **options)
                waiting = []
    if waiting:
        yield collate(split, waiting, **options)


def prefetch(
    make: Callable[[int], Batch], start: int, stop: int, *, depth: int = 2
) -> Iterator[Batch]:
    """Yield make(start), ..., make(stop - 1), made ahead in one thread, at most `depth` waiting.

    Leaving the loop early ends the thread; an exception in `make` is raised here.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for step in range(start, stop):
                if closed.is_set():
                    return
                put(make(step))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
