"""Procedural music in numpy: a small additive synthesiser and a composer of four-bar loops."""

from __future__ import annotations

import numpy as np

from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import SynthesisError

_SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
_PROGRESSIONS = (  # scale degrees of one chord per bar
    (0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 4, 3), (1, 4, 0, 0), (0, 2, 3, 4),
)  # fmt: skip
TIMBRES = ("piano", "organ", "strings", "pluck", "bell", "reed")


def _note(
    timbre: str, freq_hz: float, n_samples: int, sample_rate_hz: int, phase: float
) -> np.ndarray:
    """One note as a sum of partials below 0.42 of the sample rate, float32 (n_samples,)."""
    t = np.arange(n_samples, dtype=np.float32) / sample_rate_hz
    duration = n_samples / sample_rate_hz
    h = np.arange(1, 17, dtype=np.float32)
    release = np.clip((duration - t) / 0.03, 0, 1)
    if timbre == "bell":
        ratios, amps = np.array([1, 2.0, 2.98, 4.07, 5.4]), np.array([1, 0.6, 0.4, 0.25, 0.15])
        decays = np.array([2.0, 3, 4.5, 6, 8])
    elif timbre == "piano":
        ratios, amps, decays = h * np.sqrt(1 + 2e-4 * h * h), h**-1.3, 1.2 + 0.5 * h
    elif timbre == "pluck":
        ratios, amps, decays = h, h**-1.0, 2.5 + 1.1 * h
    elif timbre == "organ":
        ratios, decays = np.array([0.5, 1, 2, 3, 4, 6, 8]), np.zeros(7)
        amps = np.array([0.4, 1, 0.7, 0.4, 0.3, 0.2, 0.1])
    elif timbre == "reed":
        ratios, amps, decays = h[::2], h[::2] ** -1.1, np.zeros(8)
    else:  # strings
        ratios, amps, decays = h, h**-1.2, np.zeros(16)
    attack_s = {"strings": 0.08, "organ": 0.02, "reed": 0.03}.get(timbre, 0.004)
    base = 2 * np.pi * freq_hz * t
    if timbre in ("strings", "reed"):
        base = base + 0.004 * freq_hz / 5.5 * np.sin(2 * np.pi * 5.5 * t + phase)
    wave = np.zeros(n_samples, np.float32)
    for k, (ratio, amp, decay) in enumerate(zip(ratios, amps, decays, strict=True)):
        if ratio * freq_hz > 0.42 * sample_rate_hz:
            break
        partial = np.sin(base * np.float32(ratio) + np.float32(phase * (k + 1)))
        wave += np.float32(amp) * (partial * np.exp(-decay * t) if decay else partial)
    return wave * np.clip(t / attack_s, 0, 1) * release


def _drum(kind: str, rng: np.random.Generator, sample_rate_hz: int) -> np.ndarray:
    """One hit of kick, snare or hat, float32."""
    seconds = {"kick": 0.25, "snare": 0.18, "hat": 0.06}[kind]
    t = np.arange(int(seconds * sample_rate_hz), dtype=np.float32) / sample_rate_hz
    if kind == "kick":
        wave = np.sin(2 * np.pi * (48 * t + 3.2 * (1 - np.exp(-t * 35)))) * np.exp(-t * 14)
        return wave.astype(np.float32)
    noise = rng.standard_normal(t.size).astype(np.float32)
    if kind == "hat":
        return 0.25 * np.diff(noise, prepend=np.float32(0)) * np.exp(-t * 70)
    return (0.3 * noise + 0.5 * np.sin(2 * np.pi * 185 * t)) * np.exp(-t * 22)


def render_music(seconds: float, seed: int, *, sample_rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """A short piece: chords, bass, a melody and drums, in a random key, scale, tempo and timbre.

    Args:
        seconds: length, > 0.
        seed: picks everything; the same seed and length give the same samples.
        sample_rate_hz: rate of the result.

    Returns:
        float32 (round(seconds * sample_rate_hz),), peak between 0.45 and 0.9.

    Raises:
        SynthesisError: seconds is not positive.
    """
    if not seconds > 0:
        raise SynthesisError(f"synth: seconds of music must be > 0, got {seconds}")
    rng = np.random.default_rng(seed)
    n_samples = round(seconds * sample_rate_hz)
    mix = np.zeros(n_samples, np.float32)
    scale = _SCALES[str(rng.choice(sorted(_SCALES)))]
    key = int(rng.integers(43, 56))  # MIDI note of the tonic
    beat_s = 60 / float(rng.uniform(70, 150))
    chord_timbre, lead_timbre, bass_timbre = (str(rng.choice(TIMBRES)) for _ in range(3))
    progression = _PROGRESSIONS[int(rng.integers(len(_PROGRESSIONS)))]
    has_drums, has_lead = rng.random() < 0.6, rng.random() < 0.9
    arpeggio = rng.random() < 0.5

    def pitch_hz(degree: int, octave: int = 0) -> float:
        midi = key + 12 * (degree // 7 + octave) + scale[degree % 7]
        return float(440 * 2 ** ((midi - 69) / 12))

    def add(wave: np.ndarray, at_s: float, gain: float) -> None:
        start = int(at_s * sample_rate_hz)
        part = wave[: max(0, n_samples - start)]
        mix[start : start + part.size] += np.float32(gain) * part

    def play(
        timbre: str, degree: int, octave: int, at_s: float, long_s: float, gain: float
    ) -> None:
        n_left = n_samples - int(at_s * sample_rate_hz)
        n = max(1, min(int(long_s * sample_rate_hz), n_left))
        phase = float(rng.uniform(0, 2 * np.pi))
        add(_note(timbre, pitch_hz(degree, octave), n, sample_rate_hz, phase), at_s, gain)

    degree = int(rng.integers(7, 14))
    bar = 0
    while bar * 4 * beat_s < seconds:
        start_s, root = bar * 4 * beat_s, progression[bar % len(progression)]
        for voice, step in enumerate((0, 2, 4)):
            if arpeggio:
                for beat in range(4):
                    at_s = start_s + (beat + voice / 3) * beat_s
                    play(chord_timbre, root + step, 0, at_s, 0.6 * beat_s, 0.16)
            else:
                play(chord_timbre, root + step, 0, start_s, 3.9 * beat_s, 0.13)
        for beat in (0, 2):
            play(bass_timbre, root, -1, start_s + beat * beat_s, 1.6 * beat_s, 0.25)
        at = 0.0
        while has_lead and at < 4:
            long = float(rng.choice([0.5, 0.5, 1.0, 1.0, 2.0]))
            degree = int(np.clip(degree + rng.integers(-2, 3), 5, 17))
            if rng.random() < 0.85:
                play(lead_timbre, degree, 0, start_s + at * beat_s, 0.95 * long * beat_s, 0.22)
            at += long
        for eighth in range(8 if has_drums else 0):
            at_s = start_s + eighth * beat_s / 2
            add(_drum("hat", rng, sample_rate_hz), at_s, 0.3)
            if eighth % 4 == 0:
                add(_drum("kick", rng, sample_rate_hz), at_s, 0.5)
            if eighth % 4 == 2:
                add(_drum("snare", rng, sample_rate_hz), at_s, 0.3)
        bar += 1
    gain = 0.9 * 10 ** (-rng.uniform(0, 6) / 20) / max(float(np.abs(mix).max()), 1e-6)
    return (mix * gain).astype(np.float32)
