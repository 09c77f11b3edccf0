"""Loudness against its definition and against pyloudnorm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wgpt.audio.loudness import MAX_GAIN_DB, LoudnessMeter, _biquads, gain_db


def lufs(wave: np.ndarray, rate_hz: int, block: int = 5000) -> float:
    meter = LoudnessMeter(rate_hz)
    for start in range(0, len(wave), block):
        meter.push(wave[start : start + block].astype(np.float32))
    return meter.integrated_lufs()


def sine(rate_hz: int, hz: float, dbfs: float, seconds: float = 10.0) -> np.ndarray:
    t = np.arange(round(rate_hz * seconds)) / rate_hz
    return 10 ** (dbfs / 20) * np.sin(2 * math.pi * hz * t)


@pytest.mark.parametrize("rate_hz", [16_000, 24_000, 44_100, 48_000])
def test_a_full_scale_sine_of_997_hz_is_at_minus_3_lufs(rate_hz: int) -> None:
    # BS.1770-4, annex 1: "a 0 dB FS, 997 Hz sine wave ... -3.01 LKFS" on one channel.
    assert lufs(sine(rate_hz, 997, 0.0), rate_hz) == pytest.approx(-3.01, abs=0.05)


def test_the_gates_leave_silence_and_quiet_passages_out() -> None:
    # EBU Tech 3341, cases 3 and 4, in one channel: quiet beginnings and ends do not count.
    parts = [sine(24_000, 997, level, s) for level, s in ((-36, 10), (-23, 60), (-36, 10))]
    loud = lufs(parts[1], 24_000)
    assert lufs(np.concatenate(parts), 24_000) == pytest.approx(loud, abs=0.1)
    with_silence = np.concatenate([np.zeros(24_000 * 60), parts[1]])
    assert lufs(with_silence, 24_000) == pytest.approx(loud, abs=0.1)


def test_the_weighting_is_that_of_the_standard() -> None:
    # BS.1770-4, tables 1 and 2: coefficients at 48 kHz.
    shelf, high_pass = _biquads(48_000)
    expected = [
        (shelf[0], [1.53512485958697, -2.69169618940638, 1.19839281085285]),
        (shelf[1], [1.0, -1.69065929318241, 0.73248077421585]),
        (high_pass[0], [1.0, -2.0, 1.0]),
        (high_pass[1], [1.0, -1.99004745483398, 0.99007225036621]),
    ]
    for got, want in expected:
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("rate_hz", [24_000, 48_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_agrees_with_pyloudnorm(rate_hz: int, seed: int) -> None:
    pyloudnorm = pytest.importorskip("pyloudnorm")
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(rate_hz * 12) * 0.1
    wave *= np.repeat(10 ** (rng.uniform(-40, 0, 24) / 20), rate_hz // 2)
    expected = pyloudnorm.Meter(rate_hz).integrated_loudness(wave)
    assert lufs(wave, rate_hz) == pytest.approx(expected, abs=0.1)


def test_it_does_not_depend_on_the_blocks() -> None:
    wave = np.random.default_rng(0).standard_normal(24_000 * 5 + 777) * 0.1
    values = [lufs(wave, 24_000, block) for block in (1, 999, 24_000, 10**6)]
    np.testing.assert_allclose(values, values[0], atol=1e-9)


def test_silence_and_short_waves() -> None:
    assert lufs(np.zeros(24_000), 24_000) == -math.inf
    assert lufs(np.zeros(0), 24_000) == -math.inf
    short = lufs(sine(24_000, 997, -20, 0.05), 24_000)
    assert short == pytest.approx(-23.0, abs=0.5)


def test_gains_by_hand() -> None:
    assert gain_db(-23.0, 0.1, -18.0) == 5.0
    assert gain_db(-10.0, 0.5, -18.0) == -8.0
    assert gain_db(-60.0, 1e-3, -18.0) == MAX_GAIN_DB
    assert gain_db(5.0, 1.0, -18.0) == -MAX_GAIN_DB  # however loud
    assert gain_db(-40.0, 0.5, -18.0) == pytest.approx(-1 - 20 * math.log10(0.5))  # the peak's
    assert gain_db(-math.inf, 0.0, -18.0) == gain_db(-40.0, 0.5, None) == 0.0
