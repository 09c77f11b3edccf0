"""Synthetic sound is deterministic, varied, within range, and fails with a clear message."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from wgpt.codec.training import music, phrases, synth
from wgpt.errors import SynthesisError

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed"
)


@pytest.mark.parametrize("seconds", [0.01, 1.0, 7.3])
def test_music_has_the_asked_length_and_level(seconds):
    wave = synth.render_music(seconds, seed=3)
    assert wave.dtype == np.float32
    assert wave.shape == (round(seconds * 24_000),)
    assert 0.4 < np.abs(wave).max() <= 0.9001


def test_music_repeats_for_a_seed_and_differs_between_seeds():
    assert np.array_equal(synth.render_music(2, 1), synth.render_music(2, 1))
    assert not np.array_equal(synth.render_music(2, 1), synth.render_music(2, 2))


def test_music_seeds_vary_in_brightness():
    def centroid_hz(wave: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(wave)) ** 2
        return float((power * np.fft.rfftfreq(wave.size, 1 / 24_000)).sum() / power.sum())

    centroids = [centroid_hz(synth.render_music(3, seed)) for seed in range(8)]
    assert max(centroids) > 1.3 * min(centroids)


def test_note_has_its_pitch():
    for timbre in music.TIMBRES:
        wave = music._note(timbre, 440.0, 24_000, 24_000, 0.3)
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(wave.size)))
        peak_hz = int(spectrum.argmax())
        nearest = min((440, 220, 880), key=lambda f: abs(f - peak_hz))  # organ: octave below
        assert abs(peak_hz - nearest) <= 4, timbre


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_music_refuses_a_length_that_is_not_positive(seconds):
    with pytest.raises(SynthesisError, match="must be > 0"):
        synth.render_music(seconds, 0)


def test_sentences_vary_and_follow_the_language():
    rng = np.random.default_rng(0)
    english = {phrases.sentence(rng, "en-gb-scotland") for _ in range(300)}
    assert len(english) > 290
    assert not any("{" in text or "}" in text for text in english)
    assert all(text[0].isupper() and text[-1] in ".?!" for text in english)
    for voice in synth.VOICES + synth.HELD_OUT_VOICES:
        assert phrases.sentence(rng, voice.language)
    with pytest.raises(ValueError, match="phrase book"):
        phrases.sentence(rng, "xx")


def test_held_out_voices_are_not_training_voices():
    training = {voice.name for voice in synth.VOICES}
    variants = {voice.variant for voice in synth.VOICES}
    assert len(training) == len(synth.VOICES)
    for voice in synth.HELD_OUT_VOICES:
        assert voice.name not in training
        assert voice.variant not in variants


def test_pauses_are_cut_to_the_longest_allowed():
    wave = np.concatenate([np.ones(10), np.zeros(100), np.ones(10), np.zeros(50)])
    wave = wave.astype(np.float32)
    kept = synth._shorten_pauses(wave, 20)
    assert np.count_nonzero(kept) == 20
    assert 40 <= kept.size <= 62


def test_missing_espeak_is_said_with_what_to_do(monkeypatch):
    monkeypatch.setattr(synth.shutil, "which", lambda _: None)
    with pytest.raises(SynthesisError, match="install it"):
        synth.synthesize_speech("hello")


@needs_espeak
def test_speech_repeats_and_differs_between_voices():
    first = synth.synthesize_speech("The river is wide.", synth.VOICES[0])
    again = synth.synthesize_speech("The river is wide.", synth.VOICES[0])
    other = synth.synthesize_speech("The river is wide.", synth.VOICES[2])
    assert first.dtype == np.float32
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)
    assert 0.5 < first.size / 24_000 < 4
    assert np.abs(first).max() > 0.05


@needs_espeak
def test_speech_speed_changes_the_length():
    slow = synth.synthesize_speech("The river is wide and deep.", speed_wpm=110)
    fast = synth.synthesize_speech("The river is wide and deep.", speed_wpm=220)
    assert slow.size > 1.4 * fast.size


@needs_espeak
def test_speech_that_begins_with_a_dash_is_spoken_not_parsed():
    assert synth.synthesize_speech("--version of the story").size > 12_000


@needs_espeak
def test_speech_refuses_an_empty_text_and_an_unknown_voice():
    with pytest.raises(SynthesisError, match="empty"):
        synth.synthesize_speech("  ")
    with pytest.raises(SynthesisError, match="could not speak"):
        synth.synthesize_speech("hello", synth.Voice("xx-nowhere", "m1", 50, 160))
