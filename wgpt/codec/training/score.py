"""Measures of a copy of a sound: distortion, intelligibility, quality."""

from __future__ import annotations

import math

import numpy as np
import soxr


def si_sdr_db(estimate: np.ndarray, target: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019), no mean removed."""
    scale = float(estimate @ target) / max(float(target @ target), 1e-12)
    kept = scale * target
    error = estimate - kept
    return 10 * math.log10(max(float(kept @ kept), 1e-12) / max(float(error @ error), 1e-12))


def stoi(estimate: np.ndarray, target: np.ndarray, sample_rate_hz: int) -> float | None:
    """Short-time objective intelligibility (Taal et al., 2011), None without pystoi."""
    try:
        from pystoi import stoi as measure
    except ImportError:
        return None
    return float(measure(target, estimate, sample_rate_hz, extended=False))


def pesq(estimate: np.ndarray, target: np.ndarray, sample_rate_hz: int) -> float | None:
    """Wideband PESQ (ITU-T P.862.2), 1 to 4.64; None without pesq, or where it finds no speech in
    the target or no sound in the estimate."""
    try:
        from pesq import BufferTooShortError, NoUtterancesError
        from pesq import pesq as measure
    except ImportError:
        return None
    if not (target.any() and estimate.any()):
        return None
    pair = (soxr.resample(wave, sample_rate_hz, 16_000) for wave in (target, estimate))
    try:
        return float(measure(16_000, *pair, "wb"))
    except (BufferTooShortError, NoUtterancesError, ValueError):  # the last where it is NaN
        return None
