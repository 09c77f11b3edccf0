"""Audio made on the spot: procedural music (numpy only) and espeak-ng speech.

Both exist so that the package can be tried, tested and trained without downloading anything.
Everything is deterministic: the same seed gives the same samples (speech: with the same
espeak-ng version). Speech needs the ``espeak-ng`` program; music needs numpy alone.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

import numpy as np

from wgpt.codec.training import phrases
from wgpt.codec.training.music import render_music
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import SynthesisError

__all__ = ["HELD_OUT_VOICES", "VOICES", "Voice", "render_music", "speech_clip",
           "synthesize_speech"]  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """One espeak-ng speaker: a language, a variant of its voice, and its habits."""

    language: str  # espeak-ng language code; its prefix picks the phrase book
    variant: str  # espeak-ng voice variant, e.g. "m3"
    pitch: int  # base pitch, espeak's 0..99
    speed_wpm: int  # base speed, words per minute

    @property
    def name(self) -> str:
        return f"{self.language}+{self.variant}"


def _voice(spec: str) -> Voice:
    name, pitch, speed_wpm = spec.split()
    language, variant = name.split("+")
    return Voice(language, variant, int(pitch), int(speed_wpm))


VOICES: tuple[Voice, ...] = tuple(
    _voice(spec)
    for spec in (
        "en-us+m1 45 165", "en-us+m3 38 150", "en-us+f2 55 170", "en-us+f4 60 155",
        "en-us+m6 50 180", "en-us+Annie 52 160", "en-us+Alex 42 172", "en-us+david 40 150",
        "en-gb+m2 44 158", "en-gb+f1 58 165", "en-gb+m4 35 145", "en-gb+f3 62 175",
        "en-gb+steph 55 160", "en-gb+edward 40 155", "en-gb+adam 46 170", "en-gb+m8 48 160",
        "en-gb-scotland+m5 42 160", "en-gb-scotland+f2 56 150", "en-029+m3 48 165",
        "en-029+f4 57 172", "en-gb-x-rp+belinda 54 158", "en-us+caleb 44 168",
        "de+m2 42 155", "de+f3 58 160", "fr-fr+m4 45 160", "fr-fr+f1 60 165",
        "es+m5 47 165", "es+f2 59 170", "it+m1 44 160", "it+f4 57 168",
    )
)  # fmt: skip

# Speakers that no training may hear: the codec is judged on them.
HELD_OUT_VOICES: tuple[Voice, ...] = tuple(
    _voice(spec)
    for spec in (
        "en-us+m7 43 160", "en-us+f5 57 165", "en-gb+linda 55 158", "en-gb+benjamin 41 165",
        "en-us+Michael 45 155", "pt-br+Andrea 58 160",
    )
)  # fmt: skip


def synthesize_speech(
    text: str,
    voice: Voice = VOICES[0],
    *,
    pitch: int | None = None,
    speed_wpm: int | None = None,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
) -> np.ndarray:
    """Speak a text with espeak-ng.

    Args:
        text: what to say, in the language of the voice; not empty.
        voice: the speaker.
        pitch: 0..99, default the voice's own.
        speed_wpm: words per minute, 80..450, default the voice's own.
        sample_rate_hz: rate of the result (espeak-ng speaks at 22 050 Hz; soxr resamples).

    Returns:
        float32 (L,) in [-1, 1].

    Raises:
        SynthesisError: espeak-ng is not installed, or it refused the voice or the text.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise SynthesisError(
            "synth: speech needs the program 'espeak-ng', which is not on PATH; install it with "
            "your package manager (Debian: apt-get install espeak-ng), or use music instead"
        )
    if not text.strip():
        raise SynthesisError("synth: text to speak must not be empty")
    pitch = voice.pitch if pitch is None else pitch
    speed_wpm = voice.speed_wpm if speed_wpm is None else speed_wpm
    # The text goes through stdin, so a text that begins with "-" is not read as an option.
    command = [program, "-v", voice.name, "-p", str(pitch), "-s", str(speed_wpm), "--stdin"]
    done = subprocess.run(
        [*command, "--stdout"], input=text.encode(), capture_output=True, check=False
    )
    if done.returncode != 0 or len(done.stdout) < 48:
        reason = done.stderr.decode(errors="replace").strip() or f"exit {done.returncode}"
        raise SynthesisError(
            f"synth: espeak-ng could not speak with voice {voice.name!r}: {reason}"
        )
    return _from_espeak_wav(done.stdout, sample_rate_hz)


def _from_espeak_wav(data: bytes, sample_rate_hz: int) -> np.ndarray:
    """Samples of a WAV that was written to a pipe (its lengths are placeholders)."""
    import soxr

    rate_hz = int.from_bytes(data[24:28], "little")
    start = data.index(b"data") + 8
    n_samples = (len(data) - start) // 2
    wave = np.frombuffer(data, "<i2", n_samples, start).astype(np.float32) / 32768
    if rate_hz != sample_rate_hz:
        wave = soxr.resample(wave, rate_hz, sample_rate_hz)
    return np.clip(wave, -1, 1).astype(np.float32)


def speech_clip(
    rng: np.random.Generator, voice: Voice, seconds: float, sample_rate_hz: int = SAMPLE_RATE_HZ
) -> tuple[np.ndarray, str]:
    """A speaker says random sentences for about `seconds` (at most; it ends with a whole one).

    Pitch and speed vary a little from clip to clip, the level by 6 dB, and the pauses that
    espeak-ng leaves are cut to 0.15 s.

    Returns:
        (float32 (L,), the text). At least one sentence, even when that is longer.
    """
    pitch = int(np.clip(voice.pitch + rng.integers(-8, 9), 0, 99))
    speed_wpm = int(voice.speed_wpm + rng.integers(-15, 25))
    parts: list[np.ndarray] = []
    texts: list[str] = []
    total = 0
    while True:
        text = phrases.sentence(rng, voice.language)
        wave = synthesize_speech(
            text, voice, pitch=pitch, speed_wpm=speed_wpm, sample_rate_hz=sample_rate_hz
        )
        wave = _shorten_pauses(wave, int(0.15 * sample_rate_hz))
        if parts and total + wave.size > seconds * sample_rate_hz:
            break
        parts.append(wave)
        texts.append(text)
        total += wave.size
    clip = np.concatenate(parts)
    gain = 0.9 * 10 ** (-rng.uniform(0, 6) / 20) / max(float(np.abs(clip).max()), 1e-3)
    return (clip * gain).astype(np.float32), " ".join(texts)


def _shorten_pauses(wave: np.ndarray, longest_samples: int, floor: float = 2e-3) -> np.ndarray:
    """Cut every run below `floor` that is longer than `longest_samples` down to that length."""
    loud = np.flatnonzero(np.abs(wave) > floor)
    if loud.size == 0:
        return wave[:longest_samples]
    keep = np.zeros(wave.size, bool)
    edges = np.concatenate([[0], loud, [wave.size]])
    gaps = np.diff(edges)
    keep[: min(wave.size, loud[-1] + longest_samples)] = True
    for at in np.flatnonzero(gaps > longest_samples):
        keep[edges[at] + longest_samples : edges[at + 1]] = False
    return wave[keep]
