"""Does a mel slice belong to the step that it stands beside, or to one that is to be predicted?"""

from __future__ import annotations

import logging
from typing import Any

from wgpt.audio.mel import MelFrontend
from wgpt.data.batches import evaluation_batches
from wgpt.data.dataset import Split
from wgpt.errors import DataError

LAGS = range(-3, 4)  # steps
MARGIN = 0.02
_STEPS = 6000  # of sound that are compared: 80 s

log = logging.getLogger(__name__)


def leak_check(
    split: Split, source: str, codec: Any, frontend: MelFrontend, context_steps: int
) -> dict[int, float]:
    """Compares the frames that a model reads with mel slices of the decoded tokens, shifted by each
    of LAGS steps.

    The tokens of step t are the sound of step t, so its slice is most like that of the sound which
    all codebooks of steps up to t decode to. What is looked at are evaluation batches: a slip in
    the arrays, in the dataset or in the batches shows.

    Args:
        split: with the mel source.
        source: which mel; of the true audio or of decoded audio, with the causal window.
        codec: that of the data; frontend: of the data's mel settings.
        context_steps: window of the batches.

    Returns the mean absolute difference in nats by lag; a lag above 0 is the future.

    Raises DataError if another lag fits better than 0 by MARGIN. Where one fits a little better, as
    in sounds that do not change, nothing can be told, and a warning says so.
    """
    sums, n_compared = dict.fromkeys(LAGS, 0.0), 0
    clips = _spread(split)
    r = split.frames_per_step
    decoded = {}
    for clip in clips:
        wave = codec.decode(split.clip(clip)[0])
        decoded[clip] = frontend(wave).reshape(split.clip_steps(clip), r, -1).float().cpu()
    for batch in evaluation_batches(split, context_steps, source, clips=clips):
        assert batch.frames is not None
        frames = batch.frames.unflatten(1, (-1, r))
        for row, of_clip in enumerate(batch.clips):
            for clip in set(of_clip.tolist()) & decoded.keys():
                at = (of_clip == clip).nonzero().flatten()
                read = batch.steps[row, at] - 1  # the step whose slice position `at` reads
                inside = (read >= -min(LAGS)) & (read < len(decoded[clip]) - max(LAGS))
                slices, read = frames[row, at[inside]], read[inside]
                n_compared += slices.numel()
                for lag in LAGS:
                    difference = slices - decoded[clip][read + lag]
                    sums[lag] += float(difference.abs().sum())
    if not n_compared:
        raise DataError(
            f"{split.name}: no clip has {len(LAGS)} steps, too short to tell where its mel belongs"
        )
    found = {lag: total / n_compared for lag, total in sums.items()}
    best = min(found, key=lambda lag: found[lag])
    if best and found[best] > (1 - MARGIN) * found[0]:
        log.warning(
            "leak check: mel %s of %s is as like the sound of its neighbours as that of its own "
            "step: nothing can be told of such sound",
            source, split.name,
        )  # fmt: skip
    elif best:
        where = "after" if best > 0 else "before"
        raise DataError(
            f"{split.name}: mel source {source}: the slice beside a token is most like the sound "
            f"{abs(best)} step(s) {where} it ({found[best]:.2f} nats off, {found[0]:.2f} at its "
            "own step)" + (": the model would be told what it is to predict" if best > 0 else "")
            + "; prepare the data anew with this version of wgpt"
        )  # fmt: skip
    return found


def _spread(split: Split) -> list[int]:
    """Clips from all over the split, of _STEPS steps or a little more together."""
    chosen: list[int] = []
    n_steps = 0
    stride = max(split.n_clips // 50, 1)
    for clip in sorted(range(split.n_clips), key=lambda clip: (clip % stride, clip)):
        if n_steps < _STEPS:
            chosen.append(clip)
            n_steps += split.clip_steps(clip)
    return sorted(chosen)
