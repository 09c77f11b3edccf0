"""The mel front end: librosa's filterbank, no look ahead, and slices that equal the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wgpt.audio.mel import MelFrontend, hz_to_mel, lookahead_samples, mel_filterbank, mel_to_hz
from wgpt.audio.mel_stream import MelStream
from wgpt.config import MelConfig
from wgpt.errors import ConfigError

# librosa 0.11.0, librosa.filters.mel(sr=24000, n_fft=W, n_mels=64, fmin=0, fmax=12000):
# per W: sum, sum of squares, count of positive entries; (band, bin, weight) samples.
LIBROSA = {
    1024: (
        (2.7298778922115616, 0.018939838315197077, 994),
        [(0, 2, 0.0170363039), (0, 1, 0.00851815194), (0, 3, 0.0125738103), (1, 4, 0.0150084738),
         (5, 13, 0.0154153099), (13, 31, 0.0162289795), (24, 59, 0.0126734814),
         (25, 62, 0.0123398621), (25, 63, 0.00935569033), (40, 140, 0.00547752297),
         (40, 139, 0.00504540978), (63, 485, 0.00162284391), (63, 486, 0.0015674039)],
    ),
    600: (
        (1.5984429470317991, 0.011011615492540101, 582),
        [(0, 1, 0.0145376446), (0, 2, 0.00905297324), (1, 2, 0.0100111589), (5, 8, 0.0171477627),
         (24, 34, 0.00996004511), (40, 83, 0.00427731639), (63, 284, 0.00160332897)],
    ),
    2048: (
        (5.460802479030207, 0.03787706212748093, 1989),
        [(0, 4, 0.0170363039), (1, 9, 0.0188607145), (13, 64, 0.0133811329),
         (25, 124, 0.0123398621), (40, 280, 0.00547752297), (63, 971, 0.00159754627)],
    ),
}  # fmt: skip


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("window", LIBROSA)
def test_filterbank_equals_librosa(window: int) -> None:
    bank = mel_filterbank(MelConfig(window_samples=window)).double()
    assert bank.shape == (window // 2 + 1, 64)
    (total, square, n_positive), samples = LIBROSA[window]
    assert bank.sum().item() == pytest.approx(total, rel=1e-7)
    assert bank.square().sum().item() == pytest.approx(square, rel=1e-7)
    # An edge that falls on a bin (as band edges of W = 600 do) is 0 up to rounding.
    assert int((bank > 1e-8).sum()) == n_positive
    for band, k, weight in samples:
        assert bank[k, band].item() == pytest.approx(weight, rel=3e-7)


def test_slaney_scale_has_its_two_branches() -> None:
    hz = torch.tensor([0.0, 200 / 3, 1000.0, 6400.0, 12_000.0], dtype=torch.float64)
    mel = hz_to_mel(hz)
    torch.testing.assert_close(mel[:4], torch.tensor([0.0, 1.0, 15.0, 42.0], dtype=torch.float64))
    torch.testing.assert_close(mel_to_hz(mel), hz)


def test_filters_are_triangles_of_unit_area() -> None:
    # Over a very fine spectrum the sum times the bin width tends to the area.
    config = MelConfig(window_samples=1 << 16)
    bank = mel_filterbank(config).double()
    area = bank.sum(dim=0) * (config.sample_rate_hz / config.window_samples)
    torch.testing.assert_close(area, torch.ones(64, dtype=torch.float64), atol=1e-3, rtol=0)
    assert ((bank > 0).double().diff(dim=0) > 0).sum(dim=0).max() <= 1  # one support each


def test_filterbank_refuses_empty_bands() -> None:
    with pytest.raises(ConfigError, match="every band must hold a bin"):
        mel_filterbank(MelConfig(window_samples=64))


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("window", [200, 600, 1024, 2048])
def test_slices_equal_the_definition_in_float64(window: int, r: int) -> None:
    config = MelConfig(window_samples=window, frames_per_step=r, n_mels=16)
    wave = noise(320 * 9 + 17)
    got = MelFrontend(config)(wave)
    assert got.shape == (9 * r, 16) and got.dtype == torch.float32
    n = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * math.pi * n / window)  # periodic: the denominator is W
    bank = mel_filterbank(config).double().numpy()
    padded = np.concatenate([np.zeros(window), wave.double().numpy()])
    for f in range(9 * r):
        end = (f + 1) * 320 // r  # samples [end - W, end), zeros before the file
        spectrum = np.fft.rfft(padded[end : end + window] * hann)
        expected = np.log(np.maximum(np.abs(spectrum) ** 2 @ bank, config.floor))
        np.testing.assert_allclose(got[f].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("window", [600, 1024, 2048])
def test_no_slice_sees_past_its_step(window: int, r: int) -> None:
    frontend = MelFrontend(MelConfig(window_samples=window, frames_per_step=r))
    wave = noise(320 * 70)
    before = frontend(wave)
    for t in (0, 1, 2, 30, 31, 32, 68):
        changed = wave.clone()
        changed[(t + 1) * 320 :] = noise(320 * 70 - (t + 1) * 320, seed=1) * 100
        after = frontend(changed)
        assert torch.equal(after[: (t + 1) * r], before[: (t + 1) * r])
        assert not torch.equal(after[(t + 1) * r], before[(t + 1) * r])


@pytest.mark.parametrize(("window", "ahead"), [(1024, 192), (2048, 704)])
def test_the_causality_test_catches_a_centred_window(window: int, ahead: int) -> None:
    config = MelConfig(window_samples=window, centered=True, leaky=True)
    assert lookahead_samples(config) == ahead
    frontend = MelFrontend(config)
    wave = noise(320 * 20)
    before = frontend(wave)
    for t in (0, 5, 15):
        changed = wave.clone()
        changed[(t + 1) * 320 :] += 1.0
        assert not torch.equal(frontend(changed)[t], before[t])


def test_a_centred_window_of_one_step_each_way_is_safe_and_a_longer_one_refused() -> None:
    frontend = MelFrontend(MelConfig(window_samples=640, centered=True))
    wave = noise(320 * 20)
    changed = wave.clone()
    changed[6 * 320 :] += 1.0
    assert torch.equal(frontend(changed)[:6], frontend(wave)[:6])
    with pytest.raises(ConfigError, match="leaky=True"):
        MelConfig(window_samples=642, centered=True)
    # Two frames per step put the second window's centre half a step from the end.
    with pytest.raises(ConfigError, match="leaky=True"):
        MelFrontend(MelConfig(window_samples=640, centered=True, frames_per_step=2))


@pytest.mark.parametrize(
    "config",
    [MelConfig(), MelConfig(frames_per_step=4), MelConfig(centered=True, leaky=True)],
    ids=["causal", "4 frames", "centred"],
)
def test_slices_from_equals_the_whole_bit_for_bit(config: MelConfig) -> None:
    # Bit for bit because frames come in blocks of a fixed size and alignment either way.
    frontend, r = MelFrontend(config), config.frames_per_step
    wave = noise(320 * 100 + 5)
    whole = frontend(wave)
    spans = [(0, 1), (0, 100), (7, 1), (8, 9), (31, 2), (32, 32), (63, 37), (99, 1), (5, 0)]
    for start, n in spans:
        part = frontend.slices_from(wave, start, n)
        assert torch.equal(part, whole[start * r : (start + n) * r])


def test_slices_grow_with_the_wave_as_in_generation() -> None:
    frontend = MelFrontend(MelConfig())
    wave = noise(320 * 40)
    grown = [frontend.slices_from(wave[: (t + 1) * 320], t, 1) for t in range(40)]
    assert torch.equal(torch.cat(grown), frontend(wave))


def test_a_batch_equals_its_rows() -> None:
    frontend = MelFrontend(MelConfig())
    waves = torch.stack([noise(320 * 40, seed) for seed in range(3)])
    got = frontend(waves)
    assert got.shape == (3, 40, 64)
    for row, wave in zip(got, waves, strict=True):
        assert torch.equal(row, frontend(wave))


def test_silence_is_the_slice_of_digital_silence() -> None:
    frontend = MelFrontend(MelConfig(floor=1e-4))
    slices = frontend(torch.zeros(960))
    assert torch.equal(slices, frontend.silence.expand(3, 64))
    assert frontend.silence[0].item() == pytest.approx(math.log(1e-4), rel=1e-6)


def test_a_tone_lands_in_its_band() -> None:
    t = torch.arange(24_000) / 24_000
    slices = MelFrontend(MelConfig())(torch.sin(2 * math.pi * 1000 * t))
    edges = mel_to_hz(torch.linspace(0, hz_to_mel(torch.tensor(12_000.0)).item(), 66))
    band = int(slices[40].argmax())
    assert edges[band] < 1000 < edges[band + 2]


def test_bad_input_is_refused() -> None:
    frontend = MelFrontend(MelConfig())
    with pytest.raises(ValueError, match="float32"):
        frontend(torch.zeros(640, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(L,\)"):
        frontend(torch.zeros(1, 1, 640))
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        frontend.slices_from(torch.zeros(640), 1, 2)
    assert frontend(torch.zeros(10)).shape == (0, 64)


@pytest.mark.parametrize(
    "config",
    [
        MelConfig(),
        MelConfig(window_samples=600, centered=True),
        MelConfig(window_samples=300, n_mels=20),
        MelConfig(window_samples=512, frames_per_step=2, n_mels=32),
    ],
)
def test_mel_stream_gives_the_slices_of_the_whole_wave(config):
    frontend = MelFrontend(config)
    wave = 0.1 * torch.randn(2, 23 * 320, generator=torch.Generator().manual_seed(3))
    stream, parts, start = MelStream(frontend), [], 0
    for n in (1, 8, 1, 1, 5, 7):
        parts.append(stream.push(wave[:, start * 320 : (start + n) * 320]))
        start += n
    torch.testing.assert_close(torch.cat(parts, 1), frontend(wave), rtol=0, atol=1e-4)
    alone = MelStream(frontend)
    assert torch.equal(alone.push(wave[1:, :320])[0], parts[0][1])


def test_mel_stream_refuses_a_window_that_sees_ahead():
    with pytest.raises(ConfigError, match="cannot stream"):
        MelStream(MelFrontend(MelConfig(window_samples=2048, centered=True, leaky=True)))
