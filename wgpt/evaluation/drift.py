"""Rollout drift: how far a model that reads its own output moves from real sound, in time.

The validation clips are halved, alternately. From the one half come the prompts, which the model
continues; the other half is the reference. Second by second, over all rollouts together:

    log_mel_db   mean over mel bins of |mean log-mel of the rollouts - that of the reference|, dB
    token_tv     total variation between the histograms of their coarse tokens, 0 (equal) to 1

A few seconds of sound never have the histogram of many, so the same distances are given for real
sound: as many random seconds of the first half as there are rollouts (`floor`), and those seconds
decoded from the codebooks that the model samples (`codec`), which is the best it could do.

Trained listeners (listeners.py) judge whole rollouts beside their prompts: one piece of real sound
of the prompt's group, and one of another group, after the codec too, give the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from wgpt.config import HOP_SAMPLES, STEP_RATE_HZ
from wgpt.data.dataset import Split
from wgpt.errors import ConfigError, DataError
from wgpt.evaluation.codec_ceiling import DB_PER_NEPER, with_decoded_mel
from wgpt.evaluation.listeners import Listeners
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.ops.runtime import one_thread

PROMPT_S = 3.0
N_FLOOR_DRAWS = 200
MOST_ROLLOUTS = 3600  # and most seconds of each
_SECOND = round(STEP_RATE_HZ)  # steps


def drift(
    generator: AudioGenerator,
    split: Split,
    seconds: int,
    n_clips: int = 8,
    seed: int = 0,
    listeners: Listeners | None = None,
) -> dict[str, Any]:
    """Distances of the model's rollouts to real sound for each second, and their scale.

    Args:
        generator: the model; it samples at temperature 1 from all tokens, as it was trained to.
        split: with the mel source `wave`; prompts are PROMPT_S long, decoded from all codebooks.
        seconds: length of a rollout, at least 1.
        n_clips: rollouts, at least 1; fewer if the split has fewer prompts.
        seed: rollout i samples with seed + i.
        listeners: to judge the rollouts too.

    Returns {seconds: [{second, log_mel_db, token_tv}], floor, codec: {log_mel_db, token_tv},
    n_rollouts, prompt_s, n_codebooks, listeners}: None, or {rows: [{sound, n, and what is installed
    of speaker, confidence, words_per_s}], missing: Listeners.missing}.

    Raises ConfigError for a bad length or count, DataError for a split that is too small.
    """
    check_rollouts(seconds, n_clips)
    prompted, reference = _halves(split)
    prompts = _prompts(split, prompted, n_clips)
    heard, waves, tokens, mel = _roll_out(generator, split, prompts, seconds, seed)
    sounds = _Sounds(split, "wave")
    real = sounds.of([(clip, 0, split.clip_steps(clip)) for clip in reference])
    rows = []
    for second in range(seconds):
        of = slice(second * _SECOND, (second + 1) * _SECOND)
        rolled = _facts(tokens[:, of], mel[:, of], split.codebook_size)
        rows.append({"second": second + 1, **_distance(rolled, real)})
    chunks = [
        (clip, start, start + _SECOND)
        for clip in prompted
        for start in range(0, split.clip_steps(clip) - _SECOND + 1, _SECOND)
    ]
    k = generator.n_codebooks
    decoded = _Sounds(
        with_decoded_mel(split, generator.codec, generator.frontend, k), f"decoded-{k}"
    )
    judged = None
    if listeners is not None:
        rollouts = list(zip(waves, heard, strict=True))
        judged = _judged(listeners, generator, split, prompts, rollouts, reference)
    return {
        "seconds": rows,
        "floor": _floor(sounds, chunks, real, len(prompts), seed),
        "codec": _floor(decoded, chunks, real, len(prompts), seed),
        "n_rollouts": len(prompts),
        "prompt_s": PROMPT_S,
        "n_codebooks": k,
        "listeners": judged,
    }


Facts = tuple[np.ndarray, np.ndarray]  # histogram of the coarse tokens (V,), mean log-mel (M,) dB


def _facts(tokens: np.ndarray, mel: np.ndarray, codebook_size: int) -> Facts:
    """Of tokens (...) and log-mel (..., M)."""
    counts = np.bincount(tokens.ravel(), minlength=codebook_size)
    mean = mel.reshape(-1, mel.shape[-1]).mean(0, dtype=np.float64)
    return counts / counts.sum(), mean * DB_PER_NEPER


def _distance(a: Facts, b: Facts) -> dict[str, float]:
    return {
        "log_mel_db": float(np.abs(a[1] - b[1]).mean()),
        "token_tv": float(np.abs(a[0] - b[0]).sum() / 2),
    }


class _Sounds:
    """Facts of pieces of a split, under one mel source."""

    def __init__(self, split: Split, source: str) -> None:
        self.split, self.source = split, source

    def of(self, pieces: list[tuple[int, int, int]]) -> Facts:
        """Of (clip, first step, step after the last) pieces together."""
        parts = [self.split.slice(*piece, self.source) for piece in pieces]
        mel = [frames.numpy() for _, frames in parts if frames is not None]
        tokens = np.concatenate([codes[0].numpy() for codes, _ in parts])
        return _facts(tokens, np.concatenate(mel), self.split.codebook_size)


def _floor(
    sounds: _Sounds, chunks: list[tuple[int, int, int]], real: Facts, n: int, seed: int
) -> dict[str, float]:
    """Mean distance of n random real seconds to the reference."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(N_FLOOR_DRAWS):
        chosen = rng.choice(len(chunks), n, replace=n > len(chunks))
        found.append(_distance(sounds.of([chunks[i] for i in chosen]), real))
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def check_rollouts(seconds: int, n_clips: int) -> None:
    """Raises ConfigError for a length or a number of rollouts that `drift` does not take."""
    for name, value in (("rollout_s", seconds), ("rollout_clips", n_clips)):
        if not 1 <= value <= MOST_ROLLOUTS:
            raise ConfigError(f"eval: {name} must be in [1, {MOST_ROLLOUTS}], got {value}")


def _halves(split: Split) -> tuple[list[int], list[int]]:
    """Clips to prompt with and clips to compare with: alternating, group by group."""
    clips = sorted(range(split.n_clips), key=lambda clip: (split.groups[clip], clip))
    if len(clips) < 2:
        raise DataError(
            f"{split.name}: rollouts need at least 2 clips, one to prompt with and one to compare "
            f"with, got {len(clips)}"
        )
    return clips[::2], clips[1::2]


def _pieces(split: Split, clips: list[int]) -> list[tuple[int, int]]:
    """(clip, first step) of all PROMPT_S pieces."""
    steps = round(PROMPT_S * STEP_RATE_HZ)
    return [
        (clip, start)
        for clip in clips
        for start in range(0, split.clip_steps(clip) - steps + 1, steps)
    ]


def _judged(
    listeners: Listeners,
    generator: AudioGenerator,
    split: Split,
    prompts: list[tuple[int, int]],
    rollouts: list[tuple[np.ndarray, np.ndarray]],
    reference: list[int],
) -> dict[str, Any]:
    """What listeners say of rollouts, each with its prompt's wave, and of real sound likewise."""
    k, sounds = generator.n_codebooks, {"rollouts": rollouts}
    for whose, same in (("the prompt's group", True), ("another group", False)):
        sounds[f"real sound of {whose}, {k} codebook(s)"] = [
            (_decoded(generator, split, piece, k), rollouts[i][1])
            for i, piece in _beside(split, prompts, reference, same)
        ]
    rows = [
        {"sound": name, "n": len(pairs), **listeners.judge(pairs)}
        for name, pairs in sounds.items()
        if pairs
    ]
    return {"rows": rows, "missing": listeners.missing}


def _beside(
    split: Split, prompts: list[tuple[int, int]], reference: list[int], same: bool
) -> Iterator[tuple[int, tuple[int, int]]]:
    """For each prompt that has one its number and a piece of the reference, of its group or not."""
    pieces = _pieces(split, reference)
    for i, (clip, _) in enumerate(prompts):
        group = split.groups[clip]
        fitting = [piece for piece in pieces if (split.groups[piece[0]] == group) == same]
        if fitting:
            yield i, fitting[i % len(fitting)]


def _decoded(generator: AudioGenerator, split: Split, piece: tuple[int, int], k: int) -> np.ndarray:
    """float32 wave of a PROMPT_S piece, from k codebooks."""
    clip, start = piece
    tokens, _ = split.slice(clip, start, start + round(PROMPT_S * STEP_RATE_HZ))
    return generator.codec.decode(tokens[:k]).cpu().numpy()


def _prompts(split: Split, clips: list[int], n: int) -> list[tuple[int, int]]:
    """Up to n (clip, first step) of different PROMPT_S pieces, spread evenly over the clips."""
    pieces = _pieces(split, clips)
    if not pieces:
        raise DataError(
            f"{split.name}: a prompt takes {PROMPT_S:g} s, got no clip that long among the "
            f"{len(clips)} to prompt with"
        )
    n = min(n, len(pieces))
    return [pieces[i * len(pieces) // n] for i in range(n)]


def _roll_out(
    generator: AudioGenerator, split: Split, prompts: list[tuple[int, int]], seconds: int, seed: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """The prompts' waves; waves (n, L), coarse tokens (n, T) and log-mel (n, T, r * M) of their
    continuations."""
    n_prompt, n_steps = round(PROMPT_S * STEP_RATE_HZ), seconds * _SECOND
    heard = [_decoded(generator, split, prompt, split.n_codebooks) for prompt in prompts]
    waves_in = [torch.from_numpy(wave) for wave in heard]
    seeds = [seed + i for i in range(len(prompts))]
    with one_thread():
        sampling = Sampling(fine_temperature=1.0, end_of_clip=False)
        gains = [1.0] * len(prompts)  # prepared data have the level of training
        batches = generator.steps_batch(waves_in, n_steps, sampling, seeds, gains)
        bar = tqdm(batches, "rollouts", n_steps, unit="step", disable=None, leave=False)
        steps = list(bar)
    tokens = np.array([[step.tokens[0] for step in batch] for batch in steps]).T
    waves = np.array([[step.wave for step in batch] for batch in steps]).swapaxes(0, 1)
    waves = waves.reshape(len(prompts), n_steps * HOP_SAMPLES)
    with torch.inference_mode():  # behind the prompt: a first slice reaches back into it
        mel = generator.frontend(torch.cat([torch.stack(waves_in), torch.from_numpy(waves)], 1))
    r = mel.shape[1] // (n_prompt + n_steps)
    frames = mel[:, n_prompt * r :].reshape(len(prompts), n_steps, r, -1).numpy()
    return heard, waves, tokens, frames
