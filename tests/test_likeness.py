"""Distances of continuations to real sound: known Gaussians, and an order that must hold."""

import numpy as np
import pytest
import torch

from wgpt import likeness
from wgpt.likeness import Statistics, distances, frechet_db, statistics
from wgpt.sampling import Sampling
from wgpt.speaker import Speaker
from wgpt.synth import render_music


def test_frechet_of_known_gaussians():
    a = Statistics(np.zeros(2), np.diag([4.0, 9.0]))
    b = Statistics(np.array([3.0, 4.0]), np.diag([1.0, 16.0]))
    # 25 + (2 - 1)^2 + (3 - 4)^2 = 27 over two features
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


def test_distances_put_real_sound_first_and_all_codebooks_before_one(tiny_run):
    speaker = Speaker.open(tiny_run)
    waves = [render_music(1.6, seed=seed) for seed in range(3)]
    others = [render_music(1.6, seed=seed) for seed in range(3, 12)]
    reference = [speaker.frontend(torch.from_numpy(wave)).numpy() for wave in others]
    found = distances(waves, 0.8, {"tiny": speaker}, reference, Sampling())
    assert list(found) == ["real sound", "codec, 1 codebook(s)", "codec, 8 codebook(s)", "tiny"]
    assert found["real sound"]["spectrum_db"] == 0
    spectra = [row["spectrum_db"] for row in found.values()]
    assert 0 < spectra[2] < spectra[1] and 0 < spectra[3]
    shown = likeness.table({"music": found})
    assert "music: Frechet" in shown and f"{spectra[3]:.2f}" in shown
