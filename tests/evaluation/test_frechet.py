"""Distances of continuations to real sound: known Gaussians, and an order that must hold."""

import numpy as np
import pytest
import torch

from wgpt import codec
from wgpt.audio.mel import MelFrontend
from wgpt.codec.training.synth import render_music
from wgpt.config import MelConfig
from wgpt.evaluation import frechet
from wgpt.evaluation.frechet import Statistics, distances, frechet_db, squared_frechet, statistics
from wgpt.evaluation.tables import distance_table
from wgpt.generation import AudioGenerator, Step
from wgpt.generation.sampling import Sampling


def test_frechet_of_known_gaussians():
    a = Statistics(np.zeros(2), np.diag([4.0, 9.0]))
    b = Statistics(np.array([3.0, 4.0]), np.diag([1.0, 16.0]))
    assert squared_frechet(a, b) == pytest.approx(27)  # 25 + (2 - 1)^2 + (3 - 4)^2
    assert frechet_db(a, b) == pytest.approx(10 / np.log(10) * np.sqrt(27 / 2))
    assert frechet_db(a, a) == pytest.approx(0, abs=1e-6)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [Statistics(turn @ s.mean, turn @ s.covariance @ turn.T) for s in (a, b)]
    assert frechet_db(*turned) == pytest.approx(frechet_db(a, b))


def test_statistics_clip_below_the_prompt_and_leave_it_out():
    mel = np.full((40, 3), -30.0)
    mel[:10] = 1.0
    found = statistics([mel], 10, skip_prompt=True)
    np.testing.assert_allclose(found.mean, [-9, -9, -9, 0, 0, 0])  # 10 nepers below 1
    assert not found.covariance.any()
    assert statistics([mel], 10, skip_prompt=False).covariance.any()


def test_periodicity_tells_tones_from_noise_of_the_same_spectrum():
    t = np.arange(3 * 24_000) / 24_000
    tone = sum(np.sin(2 * np.pi * 110 * k * t + k) / k for k in range(1, 6))
    assert frechet.periodicity(tone, 24_000) > 0.99
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(len(t))
    assert frechet.periodicity(noise, 24_000) == pytest.approx(0.09, abs=0.02)
    music = np.stack([render_music(3.0, seed=seed) for seed in range(4)])
    window, scrambled = np.hanning(1025)[:-1], np.zeros_like(music)
    for start in range(0, music.shape[1] - 1024, 512):  # phases drawn anew, magnitudes kept
        bins = np.fft.rfft(music[:, start : start + 1024] * window)
        turned = bins * np.exp(2j * np.pi * rng.random(bins.shape))
        scrambled[:, start : start + 1024] += np.fft.irfft(turned)
    clear, hoarse = (
        np.mean([frechet.periodicity(wave, 24_000) for wave in waves])
        for waves in (music, scrambled)
    )
    assert clear > hoarse + 0.1
    # What resampling leaves behind the end of a sound is lost in a sum of its energies.
    stopped = np.concatenate([tone[:36_000], 1e-9 * noise[36_000:]])
    assert 0.5 < frechet.periodicity(stopped, 24_000) <= 1
    quiet = np.concatenate([tone[:24_000], 0.001 * noise[24_000:]])  # below the prompt's range
    assert frechet.periodicity(quiet, 24_000) == 0


def test_periodicity_by_hand():
    """A frame, and the lag of a period against the sum written out."""
    wave = np.random.default_rng(1).standard_normal(1424)
    correlations = [
        (wave[:1024] @ wave[lag : lag + 1024])
        / np.sqrt((wave[:1024] @ wave[:1024]) * (wave[lag : lag + 1024] @ wave[lag : lag + 1024]))
        for lag in range(60, 401)
    ]
    whole = np.concatenate([np.ones(320), wave])
    assert frechet.periodicity(whole, 320) == pytest.approx(max(correlations))


def test_distances_put_real_sound_first_and_all_codebooks_before_one(tiny_run):
    generator = AudioGenerator.load(tiny_run)
    waves = [render_music(1.6, seed=seed) for seed in range(3)]
    others = [render_music(1.6, seed=seed) for seed in range(3, 12)]
    reference = [generator.frontend(torch.from_numpy(wave)).numpy() for wave in others]
    found = distances(waves, 0.8, {"tiny": generator}, reference, Sampling())
    assert list(found) == ["real sound", "codec, 1 codebook(s)", "codec, 8 codebook(s)", "tiny"]
    assert found["real sound"]["spectrum_db"] == 0
    spectra = [row["spectrum_db"] for row in found.values()]
    assert 0 < spectra[2] < spectra[1] and 0 < spectra[3]
    clear = [row["periodicity"] for row in found.values()]
    assert clear[0] > clear[3] + 0.1 and clear[2] > clear[1]  # an untrained model is no music
    shown = distance_table({"music": found})
    assert "music: Frechet" in shown and f"{spectra[3]:.2f}" in shown
    assert "music: periodicity" in shown and f"{clear[3]:.2f}" in shown


class Echo:
    """Stands in for an AudioGenerator: "continues" prompt i with given codes (K, T)."""

    def __init__(self, continuations):
        self.codec, self.frontend = codec.load("mini"), MelFrontend(MelConfig())
        self.continuations = continuations
        self.n_codebooks = self.codec.n_codebooks

    def prompt_gain(self, wave):
        return 1.0

    def steps_batch(self, prompts, n_steps, sampling, seeds, gains):
        assert gains == [1.0] * len(prompts)
        assert len(prompts) == len(seeds) == len(self.continuations)
        for step in range(n_steps):
            codes = [tuple(new[:, step].tolist()) for new in self.continuations]
            yield [Step(np.zeros(320, np.float32), one, 0.0) for one in codes]


def test_distances_are_of_what_follows_the_prompt():
    """Sounds that differ after the prompt alone, whose long prompts are the codec's."""
    n_prompt, n_rest = 150, 30
    waves = [render_music((n_prompt + n_rest) / 75, seed=seed) for seed in (0, 1)]
    mini, frontend = codec.load("mini"), MelFrontend(MelConfig())
    rests = [mini.encode(torch.from_numpy(wave))[:, n_prompt:] for wave in waves]
    other = mini.encode(torch.from_numpy(render_music(n_rest / 75, seed=9)))
    models = {"true rest": Echo(rests), "another": Echo([other, other])}
    reference = [frontend(torch.from_numpy(render_music(2.0, seed=5))).numpy()]
    found = distances(waves, n_prompt / 75, models, reference, Sampling())
    ceiling, true, another = (
        found[name] for name in ("codec, 8 codebook(s)", "true rest", "another")
    )
    for what, value in ceiling.items():  # the same sound, by the same codes
        assert true[what] == pytest.approx(value, rel=1e-5), what
    # By hand: |difference| of the average log-mel of the last 30 steps.
    sizes = []
    for wave in waves:
        heard = mini.encode(torch.from_numpy(wave))[:, :n_prompt]
        made = mini.decode(torch.cat([heard, other], 1))
        mels = [frontend(sound).double().numpy() for sound in (torch.from_numpy(wave), made)]
        mean = [
            np.maximum(mel, mel[:n_prompt].max() - 10)[n_prompt:].mean(0) * 10 / np.log(10)
            for mel in mels
        ]
        sizes.append(np.abs(mean[1] - mean[0]).mean())
    assert another["spectrum_db"] == pytest.approx(np.mean(sizes), rel=1e-4)
    assert another["spectrum_db"] > 2 * ceiling["spectrum_db"]
