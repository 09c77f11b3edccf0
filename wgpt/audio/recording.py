"""Audio files in and out: mono float32 waves, read in blocks, bounded before a sample is decoded.

Everything goes through libsndfile (`soundfile`) and soxr. libsndfile lets much through that a
training run must not see (files without samples, data chunks longer than the file, NaN, 512
channels, a rate of 1 Hz); `read` refuses or reports each of them by name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import AudioError
from wgpt.files import replacing

logger = logging.getLogger(__name__)

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 768_000
MAX_CHANNELS = 8
MAX_SECONDS = 3600.0
MAX_PEAK = 10.0  # full scale is 1; beyond this a float file holds integers or noise
BLOCK_FRAMES = 1 << 16
# libsndfile's "length unknown", as of a FLAC written to a pipe, is SF_COUNT_MAX.
UNKNOWN_FRAMES = 1 << 62

# What `find` collects: libsndfile's formats that carry a header and hold sound.
SUFFIXES = frozenset(
    """.wav .wave .wavex .flac .ogg .oga .opus .mp3 .mp2 .mp1 .aiff .aif .aifc .au .snd .caf .rf64
    .w64 .nist .sph .voc .svx .8svx .iff .paf .pvf .avr .ircam .sf .sds .sd2 .xi""".split()
)
# What `write` makes, by suffix: libsndfile's format and subtype.
WRITERS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "OPUS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)


def read(
    path: str | os.PathLike[str],
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    *,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Decode a file to one channel at `sample_rate_hz`.

    Channels are averaged and blocks of 65536 frames are resampled as they come (soxr, HQ), so
    beyond the result itself memory does not grow with the file.

    Args:
        path: any format libsndfile reads.
        sample_rate_hz: rate of the result, Hz.
        max_seconds: longest duration accepted, s; checked on the header first, then on the data.

    Returns:
        float32 (L,), finite, L >= 1; full scale is +-1, but a float file may exceed it.

    Raises:
        AudioError: not audio, out of bounds, non-finite, absurdly loud, damaged, or empty.
    A file shorter than its header claims is read as far as it goes, with a logged warning.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: must be a regular file, got {_kind(path)}")
    # soundfile encodes text strictly, which fails on names that are not UTF-8; bytes pass.
    name = str(path) if os.name == "nt" else os.fsencode(path)
    try:
        with soundfile.SoundFile(name) as file:
            _check_header(path, file, max_seconds)
            if file.frames >= UNKNOWN_FRAMES:
                # soundfile seeks to where it stands after each read, which fails at an end that
                # no header announced; it does not seek in what says it cannot.
                file.seekable = lambda: False
            chunks = list(_resampled(path, file, sample_rate_hz, max_seconds))
    except (soundfile.SoundFileError, OSError) as error:
        why = str(error).rpartition(": ")[2] or "the decoder gave no reason"
        raise AudioError(f"{path}: must be audio that libsndfile reads, got: {why}") from error
    wave = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    if wave.size == 0:
        raise AudioError(f"{path}: must hold samples after resampling to {sample_rate_hz} Hz")
    return wave


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "something else" if path.exists() else "nothing there"


def _check_header(path: Path, file: soundfile.SoundFile, max_seconds: float) -> None:
    """Refuse what the header alone rules out, and report a data chunk that outruns the file."""
    rate, channels, frames = file.samplerate, file.channels, file.frames
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(
            f"{path}: sample rate must lie in [{MIN_RATE_HZ}, {MAX_RATE_HZ}] Hz, got {rate}"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{path}: channels must lie in [1, {MAX_CHANNELS}], got {channels}")
    if frames <= 0:
        raise AudioError(f"{path}: must hold at least one sample, got {frames} frames")
    if frames < UNKNOWN_FRAMES and frames > max_seconds * rate:
        raise AudioError(
            f"{path}: must last at most {max_seconds:g} s, got {frames / rate:.1f} s; "
            "split it or raise max_seconds"
        )
    lie = re.search(r"data\s*: (\d+) \(should be (\d+)\)", file.extra_info)
    if lie:
        logger.warning(
            "%s: truncated or never finished: its header promises %s bytes of samples, "
            "the file holds %s; reading those",
            path,
            *lie.groups(),
        )


def _resampled(
    path: Path, file: soundfile.SoundFile, rate_hz: int, max_seconds: float
) -> Iterator[np.ndarray]:
    """Yield the mono wave in resampled float32 chunks, checking every block."""
    stream = None
    if file.samplerate != rate_hz:
        stream = soxr.ResampleStream(file.samplerate, rate_hz, 1, dtype="float32", quality="HQ")
    n_frames = 0
    while True:
        try:
            block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise AudioError(
                f"{path}: must decode to its end, got damage after frame {n_frames} "
                f"of {file.frames}"
            ) from error
        if len(block) == 0:
            break
        _check_block(path, block, n_frames)
        n_frames += len(block)
        if n_frames > max_seconds * file.samplerate:
            raise AudioError(f"{path}: must last at most {max_seconds:g} s, got more")
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        mono = np.ascontiguousarray(mono)
        yield mono if stream is None else stream.resample_chunk(mono)
    if stream is not None:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
    if n_frames < file.frames < UNKNOWN_FRAMES:
        logger.warning(
            "%s: truncated: its header promises %d frames, %d decoded", path, file.frames, n_frames
        )


def _check_block(path: Path, block: np.ndarray, start: int) -> None:
    peak = np.abs(block).max()  # NaN and Inf survive a maximum, so one pass serves both checks
    if not np.isfinite(peak):
        frame, channel = np.argwhere(~np.isfinite(block))[0]
        raise AudioError(
            f"{path}: samples must be finite, got {block[frame, channel]} "
            f"at frame {start + frame}, channel {channel}"
        )
    if peak > MAX_PEAK:
        raise AudioError(
            f"{path}: samples must lie within +-{MAX_PEAK:g} (full scale is 1), got a peak of "
            f"{peak:g}; float files must not hold integers"
        )


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


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """List the audio files below a folder, by suffix, sorted by path.

    Hidden files and folders are skipped. Links to folders are followed, each real folder once, so
    a loop of links ends. Broken links are listed, so that `read` can say what is wrong.

    Raises:
        AudioError: `folder` is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AudioError(f"{root}: must be a folder, got {_kind(root)}")
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                found.append(Path(here, name))
    return sorted(found)
