"""Recordings in: mono float32 waves, read in blocks as often as wanted, bounded in memory.

libsndfile lets much through that a training run must not see (files without samples, data chunks
longer than the file, NaN, 512 channels, a rate of 1 Hz); reading refuses or notes each by name.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wgpt.audio.decoders import Stream, open_streams
from wgpt.audio.downmix import Downmix
from wgpt.audio.folder import describe
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import AudioError
from wgpt.files import is_bad_day

logger = logging.getLogger(__name__)

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 768_000
MAX_CHANNELS = 8
MAX_SECONDS = 3600.0
FULL_SCALE = 0.9999
MAX_PEAK = 10.0  # full scale is 1; beyond this a float file holds integers or noise


class Recording:
    """One audio file, to be read from front to back as often as wanted.

    Args:
        path: any format libsndfile reads; with PyAV also M4A, AAC, MP4, WebM, WMA and video.
        sample_rate_hz: rate of the blocks, Hz.
        max_seconds: longest duration accepted, s; checked on the header, then on the data.

    Attributes:
        notes: what was odd but did not stop reading, each once, in order.
        rate_hz, n_channels, kind: of the file (of its first stream), known after a reading.
        full_scale_share: share of samples at full scale in the last reading, in [0, 1]: clipping.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate_hz: int = SAMPLE_RATE_HZ,
        *,
        max_seconds: float = math.inf,
    ) -> None:
        self.path, self.sample_rate_hz, self.max_seconds = Path(path), sample_rate_hz, max_seconds
        self.notes: list[str] = []
        self.rate_hz, self.n_channels, self.kind = 0, 0, ""
        self.full_scale_share = 0.0
        self._only: dict[int, int] = {}  # stream to the one channel that is taken of it
        self._cancelling: dict[int, int] = {}  # found in the reading that ended last
        if not self.path.is_file():
            raise AudioError(f"{path}: must be a regular file, got {describe(self.path)}")

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the wave in float32 blocks (n,) of some 65536 frames of the file each.

        Channels are mixed by what they are (`downmix`), blocks resampled as they come (soxr, HQ).

        Raises:
            AudioError: not audio, out of bounds, non-finite, absurdly loud, damaged.
            OSError: the machine's fault, such as an I/O error or a lack of memory.
        """
        import soxr  # here: training on prepared data needs none

        seconds, n_samples, n_full = 0.0, 0, 0
        self._cancelling = {}
        try:
            for index, stream in enumerate(open_streams(self.path, self._note)):
                self._check_stream(stream)
                if index == 0:
                    self.rate_hz, self.n_channels = stream.rate_hz, len(stream.channels)
                    self.kind = stream.kind
                downmix = Downmix(stream.channels)
                if index in self._only:
                    downmix.take_only(self._only[index])
                resampler = None
                if stream.rate_hz != self.sample_rate_hz:
                    resampler = soxr.ResampleStream(
                        stream.rate_hz, self.sample_rate_hz, 1, dtype="float32", quality="HQ"
                    )
                n_frames = 0
                for block in stream.blocks:
                    n_full += self._check_block(block, n_frames)
                    n_samples += block.size
                    n_frames += len(block)
                    if seconds + n_frames / stream.rate_hz > self.max_seconds:
                        raise AudioError(
                            f"{self.path}: must last at most {self.max_seconds:g} s, got more"
                        )
                    mono = downmix(block)
                    yield mono if resampler is None else resampler.resample_chunk(mono)
                if resampler is not None:
                    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
                seconds += n_frames / stream.rate_hz
                loudest = downmix.loudest_if_cancelling()
                if loudest is not None:
                    self._cancelling[index] = loudest
            self.full_scale_share = n_full / max(n_samples, 1)
        except OSError as error:
            if is_bad_day(error):
                raise
            raise AudioError(f"{self.path}: must be readable, got: {error.strerror}") from error

    def settle_channels(self) -> bool:
        """After a whole reading: whether channels cancelled in it, so that it must be repeated.

        Later readings take the loudest of the cancelling channels alone.
        """
        found, self._cancelling = self._cancelling, {}
        for index, channel in found.items():
            self._only[index] = channel
            self._note(
                "its channels cancel: their sum is far quieter than each; "
                f"channel {channel + 1} of {self.n_channels} is taken alone"
            )
        return bool(found)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s: %s", self.path, text)

    def _check_stream(self, stream: Stream) -> None:
        """Refuse what the header alone rules out."""
        rate, n_channels, n_frames = stream.rate_hz, len(stream.channels), stream.n_frames
        if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
            raise AudioError(
                f"{self.path}: sample rate must lie in [{MIN_RATE_HZ}, {MAX_RATE_HZ}] Hz, "
                f"got {rate}"
            )
        if not 1 <= n_channels <= MAX_CHANNELS:
            raise AudioError(
                f"{self.path}: channels must lie in [1, {MAX_CHANNELS}], got {n_channels}"
            )
        if n_frames is not None and n_frames <= 0:
            raise AudioError(f"{self.path}: must hold at least one sample, got {n_frames} frames")
        if n_frames is not None and n_frames > self.max_seconds * rate:
            raise AudioError(
                f"{self.path}: must last at most {self.max_seconds:g} s, "
                f"got {n_frames / rate:.1f} s; split it or raise max_seconds"
            )

    def _check_block(self, block: np.ndarray, start: int) -> int:
        """Refuse samples no training run must see; returns how many are at full scale."""
        levels = np.abs(block)
        peak = levels.max()  # NaN and Inf survive a maximum: one pass serves both checks
        if not np.isfinite(peak):
            frame, channel = np.argwhere(~np.isfinite(block))[0]
            raise AudioError(
                f"{self.path}: samples must be finite, got {block[frame, channel]} "
                f"at frame {start + frame}, channel {channel}"
            )
        if peak > MAX_PEAK:
            raise AudioError(
                f"{self.path}: samples must lie within +-{MAX_PEAK:g} (full scale is 1), got a "
                f"peak of {peak:g}; float files must not hold integers"
            )
        return int(np.count_nonzero(levels >= FULL_SCALE)) if peak >= FULL_SCALE else 0


def read(
    path: str | os.PathLike[str],
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    *,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Decode a file to one channel at `sample_rate_hz`.

    Blocks are decoded, mixed, resampled and appended one by one, so beyond the result itself (and
    an eighth of room to grow) memory does not grow with the file.

    Args:
        path: see `Recording`.
        sample_rate_hz: rate of the result, Hz.
        max_seconds: longest duration accepted, s; checked on the header first, then on the data.

    Returns:
        float32 (L,), finite, L >= 1; full scale is +-1, but a float file may exceed it.

    Raises:
        AudioError: not audio, out of bounds, non-finite, absurdly loud, damaged, or empty.
    What is odd but readable (a file shorter than its header claims, channels that cancel, files
    joined end to end) is a logged warning.
    """
    recording = Recording(path, sample_rate_hz, max_seconds=max_seconds)
    samples = bytearray()
    for block in recording.blocks():
        samples += block.tobytes()
    if recording.settle_channels():
        samples = bytearray()
        for block in recording.blocks():
            samples += block.tobytes()
    if not samples:
        raise AudioError(f"{path}: must hold samples after resampling to {sample_rate_hz} Hz")
    return np.frombuffer(samples, dtype=np.float32)
