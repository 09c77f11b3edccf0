"""What is done to a recording before it is encoded: measured in one reading, applied in the next.

Silence is cut (`audio.silence`), the level is brought to a target (`audio.loudness`), and what is
longer than a piece is cut at its quietest place. Nothing here holds more than a piece in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from wgpt.audio.loudness import LoudnessMeter, gain_db
from wgpt.audio.recording import Recording
from wgpt.audio.silence import FADE_S, EnergyMeter, keep_spans, sounding
from wgpt.errors import AudioError

# Longer recordings are cut into clips of at most this many seconds, each encoded as if it began in
# silence: the codec's memory grows with the clip (a minute took 440 MB with an 8-filter codec).
PIECE_SECONDS = 60
CUT_WITHIN = 0.25  # the cut is the quietest frame of the last quarter of a piece
TARGET_LUFS = -18.0


@dataclass(frozen=True)
class Treatment:
    """What to do to recordings: `target_lufs` None leaves the level alone."""

    trim_silence: bool = True
    target_lufs: float | None = TARGET_LUFS
    piece_seconds: int = PIECE_SECONDS


@dataclass(frozen=True)
class Measured:
    """One reading of a recording.

    levels_dbfs float32 (frames,) of 10 ms; n_samples at the reading's rate; digest of the samples.
    """

    n_samples: int
    levels_dbfs: np.ndarray
    frame_samples: int
    peak: float
    loudness_lufs: float
    full_scale_share: float
    digest: str


def measure(recording: Recording) -> Measured:
    """Read a recording once, or twice where its channels turn out to cancel.

    Raises:
        AudioError, OSError: as Recording.blocks.
    """
    energy, meter = EnergyMeter(recording.sample_rate_hz), LoudnessMeter(recording.sample_rate_hz)
    peak, digest = 0.0, hashlib.sha256()
    for block in recording.blocks():
        if len(block):
            energy.push(block)
            meter.push(block)
            peak = max(peak, float(np.abs(block).max()))
            digest.update(block.tobytes())
    if recording.settle_channels():
        return measure(recording)
    return Measured(
        energy.n_samples, energy.levels_dbfs(), energy.frame_samples, peak,
        meter.integrated_lufs(), recording.full_scale_share, digest.hexdigest(),
    )  # fmt: skip


class Plan:
    """What becomes of one recording: spans kept, gain, pieces.

    Args:
        measured: of the recording.
        treatment: what to do.
        hop_samples: samples per step.
        piece_samples: longest piece.

    Raises:
        AudioError: nothing but silence, or under one step of sound.
    """

    def __init__(
        self, measured: Measured, treatment: Treatment, hop_samples: int, piece_samples: int
    ) -> None:
        self.measured, self.hop_samples = measured, hop_samples
        self.is_sound = sounding(measured.levels_dbfs)
        self.spans = [(0, measured.n_samples)]
        if treatment.trim_silence and len(measured.levels_dbfs):
            self.spans = keep_spans(self.is_sound, measured.frame_samples, measured.n_samples)
            if not self.spans:
                raise AudioError("must hold sound, got silence throughout")
        self.n_samples = sum(stop - start for start, stop in self.spans)
        if self.n_samples < hop_samples:
            raise AudioError(
                f"must last at least one step of {hop_samples} samples, got {self.n_samples}"
            )
        self.gain_db = gain_db(measured.loudness_lufs, measured.peak, treatment.target_lufs)
        self.piece_steps = self._cut(piece_samples)

    def _kept_levels(self) -> np.ndarray:
        """Levels of the frames that are kept, end to end."""
        size, levels = self.measured.frame_samples, self.measured.levels_dbfs
        return np.concatenate([levels[a // size : -(-b // size)] for a, b in self.spans])

    def _cut(self, piece_samples: int) -> list[int]:
        """Steps of each piece, whole steps only; cuts lie at quiet frames."""
        hop, n_steps = self.hop_samples, self.n_samples // self.hop_samples
        longest = piece_samples // hop
        if n_steps <= longest:
            return [n_steps]
        levels, size = self._kept_levels(), self.measured.frame_samples
        pieces, start = [], 0
        while n_steps - start > longest:
            earliest = start + max(int(longest * (1 - CUT_WITHIN)), 1)
            a, b = earliest * hop // size, (start + longest) * hop // size
            quietest = a + int(np.argmin(levels[a:b])) if b > a else a
            stop = min(max(round((quietest + 0.5) * size / hop), start + 1), start + longest)
            pieces.append(stop - start)
            start = stop
        return [*pieces, n_steps - start]

    def pieces(self, recording: Recording) -> Iterator[np.ndarray]:
        """Reads the recording again: yields each piece, float32 (steps * hop,)."""
        lengths = iter(self.piece_steps)
        wanted = next(lengths) * self.hop_samples
        parts: list[np.ndarray] = []
        n_held = 0
        for part in self._treated(recording):
            while n_held + len(part) >= wanted:
                take = wanted - n_held
                yield np.concatenate([*parts, part[:take]])
                part, parts, n_held = part[take:], [], 0
                steps = next(lengths, None)
                if steps is None:
                    return
                wanted = steps * self.hop_samples
            parts.append(part)
            n_held += len(part)
        raise AudioError("must not change while it is read")

    def _treated(self, recording: Recording) -> Iterator[np.ndarray]:
        """The kept spans in blocks, with the gain, faded over 5 ms on either side of a cut."""
        gain = np.float32(10 ** (self.gain_db / 20))
        n_fade = round(FADE_S * recording.sample_rate_hz)
        ramp = (np.arange(n_fade, dtype=np.float32) + 0.5) / max(n_fade, 1)
        place, first = 0, 0
        for block in recording.blocks():
            begin, place = place, place + len(block)
            while first < len(self.spans) and self.spans[first][1] <= begin:
                first += 1
            for start, stop in self.spans[first:]:
                if start >= place:
                    break
                a, b = max(start, begin), min(stop, place)
                part = block[a - begin : b - begin] * gain
                if start > 0 and a < start + n_fade:
                    n = min(start + n_fade, b) - a
                    part[:n] *= ramp[a - start : a - start + n]
                fall = stop - n_fade
                if stop < self.measured.n_samples and b > fall:
                    c = max(fall, a)
                    part[c - a :] *= ramp[::-1][c - fall : b - fall]
                yield part

    def facts(self, recording: Recording) -> dict[str, Any]:
        """What was found and what was done, in plain JSON values."""
        measured, rate = self.measured, recording.sample_rate_hz
        kept = sum(stop - start for start, stop in self.spans)
        silent = float(np.count_nonzero(~self.is_sound)) * measured.frame_samples / rate
        cut = (measured.n_samples - kept) / rate
        lufs = measured.loudness_lufs
        return {
            "seconds": kept / rate,
            "sound_sha256": measured.digest,
            "measured": {
                "seconds": round(measured.n_samples / rate, 6),
                "rate_hz": recording.rate_hz,
                "channels": recording.n_channels,
                "kind": recording.kind,
                "loudness_lufs": round(lufs, 2) if math.isfinite(lufs) else None,
                "peak": round(measured.peak, 5),
                "full_scale_share": round(measured.full_scale_share, 8),
                "silence_s": round(silent, 3),
            },
            "done": {
                "gain_db": round(self.gain_db, 2),
                "silence_cut_s": round(cut, 3),
                "silence_left_s": round(max(silent - cut, 0.0), 3),
            },
        }
