"""How like real sound continuations are: log-mel statistics over many prompts, and periodicity.

A continuation is no prediction: many are right, and the distance to the one true rest rewards blur.
So the slices of all continuations together are compared with those of real sound as distributions:
the Frechet distance between their Gaussians (Dowson and Landau, 1982; what FID and FAD compute on a
network's features). It grows with a wrong spectrum, too little or too much variety, and, since a
feature holds the change over 53 ms too, with wrong movement. Beside it stands the mean distance of
each continuation's average spectrum to that of its own true rest: whether it keeps to the voice, or
the instruments, of its prompt. Slices hold no phase, so noise of the right colour scores well in
both: `periodicity` says how clearly voices and notes sound. None knows words or melodies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ
from wgpt.evaluation.codec_ceiling import DB_PER_NEPER
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.prompt import n_steps_of
from wgpt.generation.sampling import Sampling

# Slices are clipped this far below the loudest bin of their prompt (43 dB, what our pictures show):
# deeper down little is audible and the logarithm makes it weigh as much as the sound.
RANGE_NEPERS = 10.0
SPAN_STEPS = 4
# Periods between 60 and 400 Hz, in samples, on frames of 43 ms and as much as a period more.
LAGS = np.arange(SAMPLE_RATE_HZ // 400, SAMPLE_RATE_HZ // 60 + 1)
FRAME_SAMPLES = 1024


@dataclass(frozen=True)
class Statistics:
    """Gaussian of the features of some sound: mean (D,) and covariance (D, D), float64.

    D is 2M for log-mel slices (`statistics`).
    """

    mean: np.ndarray
    covariance: np.ndarray


def statistics(mels: Sequence[np.ndarray], prompt_steps: int, skip_prompt: bool) -> Statistics:
    """Of log-mel slices (T, M) of several sounds, one a step, natural logarithm.

    Each sound begins with a prompt of prompt_steps, which says how loud it is; its own slices are
    left out with skip_prompt. A feature is a slice and its change over SPAN_STEPS steps.
    """
    half, features = SPAN_STEPS // 2, []
    for mel in mels:
        mel = _clipped(mel, prompt_steps)[prompt_steps if skip_prompt else 0 :]
        features.append(np.hstack([mel[half:-half], mel[SPAN_STEPS:] - mel[:-SPAN_STEPS]]))
    rows = np.concatenate(features)
    return Statistics(rows.mean(0), np.cov(rows.T))


def _clipped(mel: np.ndarray, prompt_steps: int) -> np.ndarray:
    return np.maximum(mel, mel[:prompt_steps].max() - RANGE_NEPERS).astype(np.float64)


def _spectra(mels: Sequence[np.ndarray], prompt_steps: int) -> np.ndarray:
    """Mean clipped log-mel behind the prompt of each sound, dB, (n, M)."""
    return DB_PER_NEPER * np.stack([_clipped(m, prompt_steps)[prompt_steps:].mean(0) for m in mels])


def squared_frechet(a: Statistics, b: Statistics) -> float:
    """|mean a - mean b|^2 + trace(A + B - 2 (A B)^1/2), of any features."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    square = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    return float(max(square, 0.0))


def frechet_db(a: Statistics, b: Statistics) -> float:
    """Root of the mean over features of `squared_frechet`, in dB."""
    return float(DB_PER_NEPER * np.sqrt(squared_frechet(a, b) / len(a.mean)))


def periodicity(wave: np.ndarray, prompt_samples: int) -> float:
    """Mean over frames behind the prompt of the largest autocorrelation at LAGS, 1 for a tone.

    wave: float (L,) at 24 kHz, with at least FRAME_SAMPLES + 400 behind the prompt. The
    correlation of a frame with the samples a lag later is normalised by both energies, so white
    noise gives 0.09 and noise of music's spectrum about 0.5. Frames 43 dB below the
    prompt's mean power are left out; none left gives 0.
    """
    wave = wave.astype(np.float64)
    quiet = np.square(wave[:prompt_samples]).mean() * np.exp(-RANGE_NEPERS)
    n_all = FRAME_SAMPLES + int(LAGS[-1])
    starts = range(prompt_samples, len(wave) - n_all + 1, HOP_SAMPLES)
    frames = np.stack([wave[start : start + n_all] for start in starts])
    head = frames[:, :FRAME_SAMPLES]
    size = 2 * n_all  # no wrapping around
    spectrum = np.fft.rfft(frames, size) * np.fft.rfft(head, size).conj()
    correlations = np.fft.irfft(spectrum, size)[:, LAGS]
    energy = np.pad(np.square(frames).cumsum(1), ((0, 0), (1, 0)))
    own, later = energy[:, FRAME_SAMPLES], energy[:, LAGS + FRAME_SAMPLES] - energy[:, LAGS]
    loud = own > quiet * FRAME_SAMPLES
    if not loud.any():
        return 0.0
    own, later, correlations = own[loud, None], later[loud], correlations[loud]
    later = np.maximum(later, 1e-6 * own)  # so little is lost in the sums, and no similarity
    return float((correlations / np.sqrt(own * later)).max(1).mean())


@torch.inference_mode()
def distances(
    waves: Sequence[np.ndarray],
    prompt_s: float,
    generators: Mapping[str, AudioGenerator],
    reference: Sequence[np.ndarray],
    sampling: Sampling,
) -> dict[str, dict[str, float]]:
    """Distances to real sound of what models make of prompts, beside the codec's own.

    Args:
        waves: float32 (L,) at 24 kHz of one length, whole steps: a prompt of prompt_s and its true
            rest, which gives the length of the continuations. They are brought to the loudness
            of the models' training data, which `reference` has.
        generators: models by name, of one codec and mel setting with one slice a step.
        reference: log-mel slices (T, M) of other real sound of the same kind, a clip each.

    Returns {"real sound", "codec, 1 codebook(s)", "codec, K codebook(s)": the true rest, and after
    the codec; then for each model "NAME", and "NAME, its codebook 0" if it has more}, each with
    {frechet_db: all slices against the reference, spectrum_db: mean |difference| of a sound's
    average log-mel and its true rest's, periodicity: mean over sounds}.
    """
    first = next(iter(generators.values()))
    codec, frontend = first.codec, first.frontend
    n_prompt = n_steps_of(prompt_s)
    sampling = dataclasses.replace(sampling, end_of_clip=False)  # as long as the true rest
    n_steps = len(waves[0]) // codec.hop_samples - n_prompt
    real = statistics(reference, n_prompt, skip_prompt=False)

    waves = [wave * np.float32(first.prompt_gain(wave)) for wave in waves]
    whole = [torch.from_numpy(wave) for wave in waves]
    own = _spectra([frontend(wave).numpy() for wave in whole], n_prompt)

    def distance(sounds: Sequence[torch.Tensor]) -> dict[str, float]:
        mels = [frontend(sound.cpu()).numpy() for sound in sounds]
        return {
            "frechet_db": frechet_db(statistics(mels, n_prompt, skip_prompt=True), real),
            "spectrum_db": float(np.abs(_spectra(mels, n_prompt) - own).mean()),
            "periodicity": float(
                np.mean([periodicity(s.cpu().numpy(), n_prompt * HOP_SAMPLES) for s in sounds])
            ),
        }

    codes = [codec.encode(wave) for wave in whole]
    found = {"real sound": distance(whole)}
    for k in (1, codec.n_codebooks):
        found[f"codec, {k} codebook(s)"] = distance([codec.decode(one[:k]) for one in codes])
    prompts = [wave[: len(wave) - n_steps * codec.hop_samples] for wave in waves]
    for name, generator in generators.items():
        gains = [1.0] * len(prompts)
        batches = generator.steps_batch(prompts, n_steps, sampling, range(len(prompts)), gains)
        drawn = np.array([[step.tokens for step in batch] for batch in batches])  # (T, n, K)
        said = torch.from_numpy(drawn).permute(1, 2, 0)
        for k in sorted({1, generator.n_codebooks}, reverse=True):
            sounds = [
                codec.decode(torch.cat([one[:k, :n_prompt], new[:k]], 1))
                for one, new in zip(codes, said, strict=True)
            ]
            alone = k < generator.n_codebooks
            found[f"{name}, its codebook 0" if alone else name] = distance(sounds)
    return found
