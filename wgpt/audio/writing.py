"""Audio files out: mono waves to WAV, FLAC, Ogg Opus or MP3, whole or not at all."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from wgpt.audio.decoders import BLOCK_FRAMES
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import AudioError
from wgpt.files import replacing

logger = logging.getLogger(__name__)

# What `write` makes, by suffix: libsndfile's format and subtype.
WRITERS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "OPUS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)


def write(
    path: str | os.PathLike[str], wave: np.ndarray, sample_rate_hz: int = SAMPLE_RATE_HZ
) -> None:
    """Write a mono wave; the suffix picks .wav and .flac (16 bit), .ogg and .opus (Opus), or .mp3.

    The file appears whole or not at all: it is written under a temporary name in the same folder
    and renamed. Samples beyond +-1 are clipped, and the log says how many.

    Args:
        path: where to; an existing file is replaced.
        wave: (L,) floats, L >= 1, finite; a torch tensor on the CPU works too.
        sample_rate_hz: Hz; Opus takes 8, 12, 16, 24 and 48 kHz only.

    Raises:
        AudioError: unknown suffix, wrong shape, non-finite samples, or a rate the format lacks.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise AudioError(f"{path}: suffix must be one of {', '.join(WRITERS)}, got {suffix!r}")
    container, subtype = WRITERS[suffix]
    if subtype == "OPUS" and sample_rate_hz not in OPUS_RATES_HZ:
        raise AudioError(f"{path}: Opus rate must be one of {OPUS_RATES_HZ}, got {sample_rate_hz}")
    wave = np.asarray(wave, dtype=np.float32)
    if wave.ndim != 1 or wave.size == 0:
        raise AudioError(f"{path}: wave must have shape (L,) with L >= 1, got {wave.shape}")
    if not np.isfinite(wave).all():
        index = int(np.flatnonzero(~np.isfinite(wave))[0])
        raise AudioError(f"{path}: samples must be finite, got {wave[index]} at {index}")
    n_clipped = int(np.count_nonzero(np.abs(wave) > 1.0))
    if n_clipped:
        logger.warning(
            "%s: clipped %d of %d samples (peak %.3g)",
            path, n_clipped, wave.size, np.abs(wave).max(),
        )  # fmt: skip
    import soundfile  # here: training on prepared data needs none

    try:
        # In blocks: libsndfile's Ogg encoders put a whole call's samples on the stack.
        with (
            replacing(path) as temporary,
            soundfile.SoundFile(
                str(temporary), "w", int(sample_rate_hz), 1, subtype, format=container
            ) as file,
        ):
            for start in range(0, wave.size, BLOCK_FRAMES):
                file.write(np.clip(wave[start : start + BLOCK_FRAMES], -1.0, 1.0))
    except soundfile.SoundFileError as error:
        raise OSError(f"{path}: could not be written: {error}") from error
