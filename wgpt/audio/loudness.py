"""Loudness after ITU-R BS.1770-4 (LUFS), of one channel, in one pass over blocks of any size,
and the gain that brings a recording to a target: of training data and of prompts alike.
"""

from __future__ import annotations

import functools
import math

import numpy as np

STEP_S = 0.1  # blocks of 400 ms overlap by 300 ms
STEPS_PER_BLOCK = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
MAX_GAIN_DB = 20.0
PEAK_LIMIT_DBFS = -1.0  # a gain never lifts the peak above it
_OFFSET = -0.691
_TAPS_S = 0.35  # the high-pass of 38 Hz has decayed to 1e-7 by then


def _biquads(rate_hz: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The K-weighting's two filters (b, a) at any rate; the standard prints them for 48 kHz only.

    A high shelf (the head) and a high-pass, from their analog centre, quality and gain.
    """
    found = []
    for shelf, centre_hz, quality, gain_db in (
        (True, 1681.9744509555319, 0.7071752369554193, 3.99984385397),
        (False, 38.13547087602444, 0.5003270373238773, 0.0),
    ):
        k = math.tan(math.pi * centre_hz / rate_hz)
        norm = 1 + k / quality + k * k
        if shelf:
            high = 10 ** (gain_db / 20)
            band = high**0.499666774155
            b = np.array([high + band * k / quality + k * k, 2 * (k * k - high),
                          high - band * k / quality + k * k]) / norm  # fmt: skip
        else:
            b = np.array([1.0, -2.0, 1.0])
        a = np.array([1.0, 2 * (k * k - 1) / norm, (1 - k / quality + k * k) / norm])
        found.append((b, a))
    return found


@functools.lru_cache(maxsize=8)
def _kernel(rate_hz: int) -> np.ndarray:
    """The K-weighting's impulse response: numpy has no recursive filter, but it has an FFT."""
    response = np.zeros(int(_TAPS_S * rate_hz))
    response[0] = 1.0
    for b, a in _biquads(rate_hz):
        past_in, past_out = [0.0, 0.0], [0.0, 0.0]
        for i, x in enumerate(response.tolist()):
            y = b[0] * x + b[1] * past_in[0] + b[2] * past_in[1]
            y -= a[1] * past_out[0] + a[2] * past_out[1]
            past_in, past_out = [x, past_in[0]], [y, past_out[0]]
            response[i] = y
    return response


class LoudnessMeter:
    """Measures the integrated loudness of a wave that comes in blocks.

    Args:
        rate_hz: of the wave.
    """

    def __init__(self, rate_hz: int) -> None:
        self._step = round(STEP_S * rate_hz)
        kernel = _kernel(rate_hz)
        self._n_past = len(kernel) - 1
        self._chunk = 10 * self._step  # filtered at once: a second
        self._n_fft = 1 << (self._chunk + self._n_past - 1).bit_length()
        self._response = np.fft.rfft(kernel, self._n_fft)
        self._past = np.zeros(self._n_past)
        self._waiting: list[np.ndarray] = []
        self._n_waiting = 0
        self._powers: list[np.ndarray] = []  # mean square of each whole 100 ms
        self._total, self._n_samples = 0.0, 0

    def push(self, block: np.ndarray) -> None:
        """Measure float32 (n,)."""
        self._waiting.append(block)
        self._n_waiting += len(block)
        if self._n_waiting >= self._chunk:
            joined = np.concatenate(self._waiting)
            n_whole = len(joined) // self._chunk * self._chunk
            for start in range(0, n_whole, self._chunk):
                self._filter(joined[start : start + self._chunk])
            self._waiting, self._n_waiting = [joined[n_whole:]], len(joined) - n_whole

    def _filter(self, chunk: np.ndarray) -> None:
        extended = np.concatenate([self._past, chunk])
        weighted = np.fft.irfft(np.fft.rfft(extended, self._n_fft) * self._response, self._n_fft)
        squares = np.square(weighted[self._n_past : self._n_past + len(chunk)])
        n_steps = len(chunk) // self._step
        steps = squares[: n_steps * self._step].reshape(n_steps, self._step)
        self._powers.append(steps.mean(axis=1))
        self._total += float(squares.sum())
        self._n_samples += len(chunk)
        self._past = extended[len(extended) - self._n_past :]

    def integrated_lufs(self) -> float:
        """Gated loudness of all that came; -inf for silence. Call it once, at the end.

        A wave shorter than a block of 400 ms is taken as one block.
        """
        if self._n_waiting:
            self._filter(np.concatenate(self._waiting))
        steps = np.concatenate(self._powers) if self._powers else np.zeros(0)
        if len(steps) >= STEPS_PER_BLOCK:
            sums = np.cumsum(np.concatenate([[0.0], steps]))
            blocks = (sums[STEPS_PER_BLOCK:] - sums[:-STEPS_PER_BLOCK]) / STEPS_PER_BLOCK
        else:
            blocks = np.array([self._total / max(self._n_samples, 1)])
        gate = 10 ** ((ABSOLUTE_GATE_LUFS - _OFFSET) / 10)
        blocks = blocks[blocks > gate]
        if len(blocks) == 0:
            return -math.inf
        blocks = blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
        return _OFFSET + 10 * math.log10(float(blocks.mean()))


def gain_db(loudness_lufs: float, peak: float, target_lufs: float | None) -> float:
    """Gain that brings a sound to a loudness: within +-MAX_GAIN_DB, its peak below the limit.

    Args:
        loudness_lufs: of the sound, -inf for silence.
        peak: of the sound, full scale is 1.
        target_lufs: None leaves the level alone.
    """
    if target_lufs is None or not math.isfinite(loudness_lufs) or peak == 0:
        return 0.0
    headroom = PEAK_LIMIT_DBFS - 20 * math.log10(peak)
    return max(min(target_lufs - loudness_lufs, MAX_GAIN_DB, headroom), -MAX_GAIN_DB)
