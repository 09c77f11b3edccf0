"""What is done before encoding: silence cut, level set, long recordings cut at quiet places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec

from wgpt import audio
from wgpt.audio.loudness import MAX_GAIN_DB
from wgpt.audio.silence import keep_spans, sounding
from wgpt.config import MelConfig
from wgpt.data import Dataset, prepare
from wgpt.data.encode import Encoder, Job, hash_file, read_partial
from wgpt.data.treatment import TARGET_LUFS, Plan, Treatment, measure
from wgpt.errors import AudioError

RATE = 24_000
HOP = 320


def noise(seconds: float, gain: float = 0.1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * gain


def treated(path: Path, treatment: Treatment | None = None, piece_s: float = 60):
    """The plan, its pieces, and the facts."""
    recording = audio.Recording(path)
    plan = Plan(measure(recording), treatment or Treatment(), HOP, round(piece_s * RATE))
    return plan, list(plan.pieces(recording)), plan.facts(recording)


def test_spans_by_hand() -> None:
    sound = np.zeros(200, bool)
    sound[[50, 60, 95, 126, 160]] = True  # gaps of 9, 34, 30 and 33 frames
    assert keep_spans(sound, 10, 2003) == [(400, 760), (800, 1420), (1450, 1710)]
    assert keep_spans(np.zeros(5, bool), 10, 50) == []
    edge = np.array([True, False, True])
    assert keep_spans(edge, 10, 37) == [(0, 37)]


def test_the_threshold_follows_the_recording() -> None:
    levels = np.full(1000, -90.0)
    levels[:300] = -20.0
    levels[400:500] = -55.0  # 35 dB down: soft, but sound
    levels[500:600] = -65.0
    is_sound = sounding(levels)
    assert is_sound[:300].all() and is_sound[400:500].all() and not is_sound[500:].any()
    assert not sounding(np.full(100, -75.0)).any()
    rare = np.full(6000, -120.0)
    rare[1000:1050] = -35.0  # one word in a minute of digital silence
    assert np.flatnonzero(sounding(rare)).tolist() == list(range(1000, 1050))


def test_silence_is_cut_and_accounted(tmp_path: Path) -> None:
    parts = [np.zeros(RATE), noise(1), np.zeros(2 * RATE), noise(1, seed=1), np.zeros(RATE // 5),
             noise(1, seed=2), np.zeros(3 * RATE)]  # fmt: skip
    soundfile.write(tmp_path / "a.wav", np.concatenate(parts), RATE, subtype="FLOAT")
    plan, (piece,), facts = treated(tmp_path / "a.wav")
    # 0.1 s at both ends, 0.3 s of the long gap, the short gap whole.
    assert plan.n_samples / RATE == pytest.approx(0.1 + 1 + 0.3 + 1 + 0.2 + 1 + 0.1, abs=0.021)
    assert len(piece) == plan.n_samples // HOP * HOP
    assert facts["done"]["silence_cut_s"] == pytest.approx(9.2 - 3.7, abs=0.03)
    assert facts["done"]["silence_left_s"] == pytest.approx(0.7, abs=0.03)
    assert facts["measured"]["silence_s"] == pytest.approx(6.2, abs=0.03)
    plan, (piece,), facts = treated(tmp_path / "a.wav", Treatment(trim_silence=False))
    assert facts["done"]["silence_cut_s"] == 0 and plan.n_samples == round(9.2 * RATE)


def test_cuts_make_no_click(tmp_path: Path) -> None:
    hum = 1e-3  # -60 dBFS beside sound at -20: below the threshold, and audible if cut hard
    t = np.arange(RATE * 2) / RATE
    quiet = hum * np.cos(2 * np.pi * 50 * t)
    soundfile.write(tmp_path / "a.wav", np.concatenate([noise(1), quiet, noise(1)]), RATE,
                    subtype="FLOAT")  # fmt: skip
    plan, (piece,), _ = treated(tmp_path / "a.wav", Treatment(target_lufs=None))
    (_, stop), (start, _) = plan.spans
    joint = stop - 240
    assert abs(plan.n_samples / RATE - 2.3) < 0.021 and start > stop
    steps = np.abs(np.diff(piece[joint : joint + 480]))
    assert steps.max() < 2e-5 < hum


@pytest.mark.parametrize("gain", [0.003, 0.03, 0.3])
def test_loudness_is_set_within_limits(tmp_path: Path, gain: float) -> None:
    from wgpt.audio.loudness import LoudnessMeter

    soundfile.write(tmp_path / "a.wav", noise(3, gain), RATE, subtype="FLOAT")
    plan, (piece,), facts = treated(tmp_path / "a.wav")
    meter = LoudnessMeter(RATE)
    meter.push(piece)
    got = meter.integrated_lufs()
    if gain == 0.003:  # -50 LUFS: the gain has a limit
        assert plan.gain_db == MAX_GAIN_DB and got < TARGET_LUFS - 5
    else:
        assert got == pytest.approx(TARGET_LUFS, abs=0.2)
    assert facts["done"]["gain_db"] == pytest.approx(plan.gain_db, abs=0.01)


def test_a_gain_never_clips(tmp_path: Path) -> None:
    wave = noise(3, 0.003)
    wave[RATE] = 0.8
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    _, (piece,), _ = treated(tmp_path / "a.wav")
    assert np.abs(piece).max() == pytest.approx(10 ** (-1 / 20), abs=1e-3)


@pytest.mark.parametrize("piece_s", [6, 5.5])  # its end lies in a pause, and in a word
def test_long_recordings_are_cut_at_quiet_places(tmp_path: Path, piece_s: float) -> None:
    words = [noise(0.8, seed=i) if i % 2 else np.zeros(RATE // 5) for i in range(40)]
    wave = np.concatenate(words)  # 20 s: a word of 0.8 s, a pause of 0.2 s
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    plan, pieces, _ = treated(tmp_path / "a.wav", piece_s=piece_s)
    assert [len(piece) // HOP for piece in pieces] == plan.piece_steps
    assert all(0.75 * piece_s * 75 - 1 <= steps <= piece_s * 75 for steps in plan.piece_steps[:-1])
    assert sum(plan.piece_steps) == plan.n_samples // HOP
    for piece in pieces[:-1]:
        assert np.abs(piece[-HOP // 2 :]).max() < 1e-4, "a cut inside a word"


def test_nothing_but_silence_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    with pytest.raises(AudioError, match="must hold sound, got silence throughout"):
        treated(tmp_path / "a.wav")
    assert treated(tmp_path / "a.wav", Treatment(trim_silence=False))[0].n_samples == RATE


def test_tokens_are_those_of_the_treated_wave(tmp_path: Path) -> None:
    wave = np.concatenate([np.zeros(RATE), noise(1), np.zeros(RATE), noise(1, seed=3)])
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    _, (piece,), _ = treated(path)
    encoder = Encoder(FakeCodec(), MelConfig(), ("wave",), Treatment(), 1e9)
    digest, status = hash_file(path)
    job = Job(str(path), digest, status.st_mtime_ns, status.st_size, str(tmp_path / "p"))
    assert encoder.encode_file(job).reason == ""
    arrays, _ = read_partial(tmp_path / "p")
    import torch

    codes = FakeCodec().encode(torch.from_numpy(piece))
    np.testing.assert_array_equal(arrays["tokens"], codes.numpy().T)
    assert len(arrays["mel.wave"]) == codes.shape[1]


@pytest.mark.slow
def test_three_hours_are_prepared_in_little_memory(tmp_path: Path) -> None:
    """A cheap long FLAC: every piece is held alone (the fake codec costs nothing)."""
    second = (noise(1) * 32767).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", RATE, 1, subtype="PCM_16") as file:
        for i in range(3 * 60):
            file.write(np.tile(second, 60) if i % 3 else np.zeros(60 * RATE, np.int16))
    manifest = prepare(tmp_path, tmp_path / "data", codec=FakeCodec(), mel_sources=("decoded-1",))
    totals = manifest["totals"]
    assert manifest["split_by"] == "time" and totals["valid"]["steps"] > 0
    kept_s = sum(total["seconds"] for total in totals.values())
    assert kept_s == pytest.approx(120 * 60, rel=0.01)  # the silent minutes are cut
    data = Dataset(tmp_path / "data")
    lengths = np.diff(data.split("train").offsets)
    assert lengths.max() <= 60 * 75
