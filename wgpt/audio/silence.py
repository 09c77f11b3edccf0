"""Where a recording is silent, by energy, and which spans of it to keep."""

from __future__ import annotations

import numpy as np

FRAME_S = 0.01
# Silence is 40 dB under the recording's loud frames (their 95th percentile). Of 216 s of dialogue
# (fillets-nl) that is 22 % and nearly what lies under -50 dBFS there, of orchestral music 1.5 %.
BELOW_LEVEL_DB = 40.0
LEVEL_PERCENTILE = 95.0
ALL_SILENT_DBFS = -70.0  # what is quieter is silence in any recording
MAX_GAP_S = 0.3  # longer silence inside is cut to this; half stays on either side of the cut
EDGE_S = 0.1  # what stays of silence at the beginning and the end
FADE_S = 0.005
_FLOOR = 1e-12


class EnergyMeter:
    """Levels of a wave that comes in blocks: dBFS of each whole frame of 10 ms.

    Args:
        rate_hz: of the wave.
    """

    def __init__(self, rate_hz: int) -> None:
        self.frame_samples = round(FRAME_S * rate_hz)
        self._rest = np.zeros(0, np.float32)
        self._levels: list[np.ndarray] = []
        self.n_samples = 0

    def push(self, block: np.ndarray) -> None:
        """Measure float32 (n,)."""
        self.n_samples += len(block)
        block = np.concatenate([self._rest, block])
        n_whole = len(block) // self.frame_samples
        frames = block[: n_whole * self.frame_samples].reshape(n_whole, self.frame_samples)
        power = np.einsum("ij,ij->i", frames, frames) / self.frame_samples
        self._levels.append((10 * np.log10(power + _FLOOR)).astype(np.float32))
        self._rest = block[n_whole * self.frame_samples :]

    def levels_dbfs(self) -> np.ndarray:
        """float32 (frames,), each at least -120."""
        return np.concatenate(self._levels) if self._levels else np.zeros(0, np.float32)


def sounding(levels_dbfs: np.ndarray) -> np.ndarray:
    """bool (frames,): which frames are not silence, by the recording's own level."""
    loud = levels_dbfs[levels_dbfs > ALL_SILENT_DBFS]
    if len(loud) == 0:
        return np.zeros(len(levels_dbfs), bool)
    # Of what is not digital silence: a word in a minute of it is still heard, a click is not all.
    level = float(np.percentile(loud, LEVEL_PERCENTILE))
    return levels_dbfs > max(level - BELOW_LEVEL_DB, ALL_SILENT_DBFS)


def keep_spans(is_sound: np.ndarray, frame_samples: int, n_samples: int) -> list[tuple[int, int]]:
    """Sample ranges [start, stop) to keep of a recording, in order; none if all of it is silent.

    Args:
        is_sound: bool (frames,), see `sounding`.
        frame_samples: samples per frame.
        n_samples: of the recording; what is left after the last whole frame counts like it.
    """
    places = np.flatnonzero(is_sound)
    if len(places) == 0:
        return []
    edge, half_gap = round(EDGE_S / FRAME_S), round(MAX_GAP_S / FRAME_S / 2)
    jumps = np.flatnonzero(np.diff(places) - 1 > 2 * half_gap)
    first = np.concatenate([[places[0] - edge], places[jumps + 1] - half_gap])
    last = np.concatenate([places[jumps] + 1 + half_gap, [places[-1] + 1 + edge]])
    spans = [
        (max(int(a), 0) * frame_samples, min(int(b) * frame_samples, n_samples))
        for a, b in zip(first, last, strict=True)
    ]
    if spans[-1][1] > len(is_sound) * frame_samples - frame_samples:
        spans[-1] = (spans[-1][0], n_samples)
    return spans
