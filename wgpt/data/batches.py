"""Batches of windows, as pure functions of (seed, step): no state to save, nothing to replay.

The shift rule, for a segment of n positions from step s of a clip, and what the model is fed:

    targets  codes[0, s], codes[0, s+1], ..., codes[0, s+n-1]     behind the last step: end of clip
    tokens   codes[:, s-1], codes[:, s], ..., codes[:, s+n-2]     BOS before the clip's first step
    frames   mel of the same steps s-1 ... s+n-2                  silence before the first step

so a position predicts step s+i from steps before it, and no mel frame reaches the target's step.
A row holds several segments; `first_key` keeps them apart. BOS as an input and the end of a clip
as a target are one id, that after the last code (1024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from wgpt.data.augment import MelAugment
from wgpt.data.dataset import Split
from wgpt.data.packing import PackedWindows, Segment, cover
from wgpt.errors import ConfigError, DataError

IGNORED = -1  # a target that is not scored


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs and targets; rows shorter than T are padded on the right.

    tokens: int64 (B, T), or (B, T, K) for codebooks > 1; padding is BOS.
    frames: float32, or float16 as it is stored, (B, T * r, M) log-mel, not normalised, padding is
        silence; None without mel.
    targets: int64 (B, T), codes of codebook 0, V for the end of a clip; IGNORED (-1) where nothing
        is scored.
    clips, steps: int64 (B, T), the clip and the step that each target is of; -1 for padding.
    first_key: int32 (B, T), where the segment of each position begins; None where each row is one
        segment, padding included.
    codes: int64 (B, 1 + n_fine, T), all codebooks of the same steps, -1 at the end of a clip and
        where nothing is scored; None unless asked for.
    """

    tokens: Tensor
    frames: Tensor | None
    targets: Tensor
    clips: Tensor
    steps: Tensor
    first_key: Tensor | None = None
    codes: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        moved = {name: value.to(device, non_blocking=True)
                 for name, value in vars(self).items() if value is not None}  # fmt: skip
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The batch in memory from which a GPU copies without a wait."""
        pinned = {n: value.pin_memory() for n, value in vars(self).items() if value is not None}
        return replace(self, **pinned)


def collate(
    split: Split,
    rows: Sequence[Sequence[Segment]],
    *,
    steps: int = 0,
    mel_source: str | None = None,
    codebooks: int = 1,
    n_fine: int = 0,
    mel_dtype: torch.dtype = torch.float32,
) -> Batch:
    """Reads the segments of each row, one behind the other, and applies the shift rule above.

    steps: T, at least that of the longest row; 0: of the longest.
    mel_dtype: of frames, float32 or float16.
    """
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
    shape = len(rows), max(steps, *(sum(s.stop - s.start for s in row) for row in rows))
    tokens = torch.full((*shape, codebooks), bos, dtype=torch.int64)
    codes = torch.full((shape[0], 1 + n_fine, shape[1]), IGNORED, dtype=torch.int64)
    targets = torch.full(shape, IGNORED, dtype=torch.int64)
    clips, of_steps = (torch.full(shape, -1, dtype=torch.int64) for _ in range(2))
    first_key = torch.zeros(shape, dtype=torch.int32)
    frames = None
    if mel_source is not None:
        n_mels = split.mel_array(mel_source).shape[1]
        frames = torch.full((shape[0], shape[1] * r, n_mels), split.silence, dtype=mel_dtype)
    for row, segments in enumerate(rows):
        at = 0
        for segment in segments:
            n_steps, start = split.clip_steps(segment.clip), segment.start
            end = at + segment.stop - start
            before = max(start - 1, 0)
            read, mel = split.slice(segment.clip, before, min(segment.stop, n_steps), mel_source)
            own = read[:, start - before :]  # (K, n): the segment's own steps
            skip = segment.scored_from - start
            codes[row, :, at + skip : at + own.shape[1]] = own[: 1 + n_fine, skip:]
            targets[row, at + skip : at + own.shape[1]] = own[0, skip:]
            if segment.stop > n_steps:
                targets[row, end - 1] = bos
            first = at + (start == 0)  # position of the first step that was read
            tokens[row, first:end] = read[:codebooks, : end - first].T
            if frames is not None and mel is not None:
                frames[row, first * r : end * r] = mel[: (end - first) * r]
            clips[row, at:end] = segment.clip
            of_steps[row, at:end] = torch.arange(start, segment.stop)
            first_key[row, at:end] = at
            at = end
        first_key[row, at:] = at if len(segments) > 1 else 0
    return Batch(
        tokens=tokens[:, :, 0] if codebooks == 1 else tokens,
        frames=frames,
        targets=targets,
        clips=clips,
        steps=of_steps,
        first_key=first_key if any(len(row) > 1 for row in rows) else None,
        codes=codes if n_fine else None,
    )


class TrainingBatches:
    """Packed training windows: `batch(step)` depends on (seed, step) and the data alone.

    Step k takes the next batch_size windows of data.packing, so any worker can make any batch, an
    epoch sees every step of every clip once, and resuming needs only k.

    Args:
        split: where from.
        batch_size: rows B of the whole batch, over all ranks.
        context_steps: window T.
        seed: 0 <= seed < 2^64.
        mel_source: which mel to read; None for no frames.
        codebooks: codebooks given as input.
        n_fine: residual codebooks in Batch.codes.
        end_of_clip: the end of each clip is a target too.
        augment: what is done to the frames, float32; None for nothing.
        mel_dtype: of the frames, float32 or float16.
        first_step, first_window: step and window where these settings begin (see `windows_at`).
        rank, world_size: this process reads rows [rank * B / world_size, ...) of the same batch.
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
        end_of_clip: bool = False,
        augment: MelAugment | None = None,
        mel_dtype: torch.dtype = torch.float32,
        first_step: int = 0,
        first_window: int = 0,
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
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.mel_source, self.codebooks, self.n_fine = mel_source, codebooks, n_fine
        self.mel_dtype = mel_dtype
        self.augment, self.first_step, self.first_window = augment, first_step, first_window
        self.windows = PackedWindows(split.offsets, context_steps, seed, end_of_clip)
        self.rows = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def windows_at(self, step: int) -> int:
        """Windows that were drawn before a step >= first_step."""
        return self.first_window + (step - self.first_step) * self.batch_size

    def epoch(self, step: int) -> float:
        """Passes over the split before a step."""
        return self.windows_at(step) / self.windows.n_windows

    def segments(self, step: int) -> list[list[Segment]]:
        """What the windows of one step hold, this rank's rows."""
        return [self.windows.window(self.windows_at(step) + row) for row in self.rows]

    def batch(self, step: int) -> Batch:
        """The batch of a step >= first_step."""
        batch = collate(
            self.split,
            self.segments(step),
            steps=min(self.windows.window_steps, self.windows.n_total),
            mel_source=self.mel_source,
            codebooks=self.codebooks,
            n_fine=self.n_fine,
            mel_dtype=self.mel_dtype,
        )
        if self.augment is not None and batch.frames is not None:
            for row, frames in zip(self.rows, batch.frames, strict=True):
                self.augment.apply(frames, self.split.frames_per_step, self.seed, step, row)
        return batch


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

    A clip longer than a window is covered by windows overlapping by half; shorter ones share rows.
    `Batch.clips` names each target's clip, so losses can be summed per clip or per group.

    Args:
        clips: which clips; all by default.
    """
    if context_steps < 1 or batch_size < 1:
        raise ConfigError(
            f"evaluation_batches: context_steps and batch_size must be at least 1, "
            f"got {context_steps} and {batch_size}"
        )
    options: dict[str, Any] = {"mel_source": mel_source, "codebooks": codebooks, "n_fine": n_fine}
    rows: list[list[Segment]] = []
    n_used = context_steps  # of the newest row
    for clip in range(split.n_clips) if clips is None else clips:
        for segment in cover(split.clip_steps(clip), context_steps, clip):
            length = segment.stop - segment.start
            if n_used + length > context_steps:
                if len(rows) == batch_size:
                    yield collate(split, rows, **options)
                    rows = []
                rows.append([])
                n_used = 0
            rows[-1].append(segment)
            n_used += length
    if rows:
        yield collate(split, rows, **options)


def prefetch(
    make: Callable[[int], Batch], start: int, stop: int, *, depth: int = 2, workers: int = 1
) -> Iterator[Batch]:
    """Yield make(start), ..., make(stop - 1), made ahead in `workers` threads, at most `depth` and
    one for each further thread at a time.

    Leaving the loop early ends the threads; an exception in `make` is raised here.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        steps = iter(range(start, stop))
        ahead = deque(pool.submit(make, step) for step in islice(steps, depth + workers - 1))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
