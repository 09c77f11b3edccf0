"""Rollout drift: real sound has none, falling silent much; halves, prompts and figures by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from splits import codec_of, split_of

from wgpt.audio.mel import MelFrontend
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, DataError
from wgpt.evaluation import drift
from wgpt.generation import AudioGenerator, Step
from wgpt.model import HybridModel, presets


class Player:
    """Stands in for a AudioGenerator: "continues" each prompt with given tokens (T,), decoded."""

    n_codebooks = 1

    def __init__(self, dataset, continuations, gain=1.0):
        self.codec, self.frontend = codec_of(dataset), MelFrontend(dataset.mel_config)
        self.continuations, self.gain = continuations, gain

    def steps_batch(self, prompts, n_steps, sampling, seeds, gains):
        assert gains == [1.0] * len(prompts)
        assert len(prompts) == len(seeds) and all(len(p) == 225 * 320 for p in prompts)
        tokens = [self.continuations(i)[:n_steps] for i in range(len(prompts))]
        waves = [self.gain * self.codec.decode(t[None]).numpy().reshape(-1, 320) for t in tokens]
        for step in range(n_steps):
            yield [Step(w[step], (int(t[step]),), 0.0) for w, t in zip(waves, tokens, strict=True)]


def test_real_sound_stays_at_the_codec_floor_and_falling_silent_does_not(prepared):
    dataset = Dataset(prepared)
    split = dataset.split("train")
    clips, _ = drift._halves(split)
    real = Player(dataset, lambda i: split.clip(clips[i])[0][0])
    result = drift.drift(real, split, 3, n_clips=len(clips))
    assert [row["second"] for row in result["seconds"]] == [1, 2, 3]
    assert result["n_rollouts"] == len(clips) and result["n_codebooks"] == 1
    for name in ("log_mel_db", "token_tv"):
        mean = np.mean([row[name] for row in result["seconds"]])
        assert mean == pytest.approx(result["codec"][name], rel=0.2), name
    assert result["floor"]["token_tv"] == result["codec"]["token_tv"] > 0
    # Which of the two is larger is chance: the codec moves one half, away or towards the other.
    assert 0 < result["floor"]["log_mel_db"] != result["codec"]["log_mel_db"]
    silent = Player(dataset, lambda _: torch.full((225,), 7), gain=0.0)
    row = drift.drift(silent, split, 1, 3)["seconds"][0]
    assert row["token_tv"] > 0.9 and row["token_tv"] > result["floor"]["token_tv"]
    assert row["log_mel_db"] > 3 * result["codec"]["log_mel_db"]


def test_distances_by_hand():
    a = drift._facts(np.array([0, 0, 1, 3]), np.array([[0.0, 1.0], [2.0, 3.0]]), 4)
    np.testing.assert_allclose(a[0], [0.5, 0.25, 0, 0.25])
    np.testing.assert_allclose(a[1], np.array([1.0, 2.0]) * 10 / np.log(10))
    b = drift._facts(np.array([2, 1]), np.array([[1.0, 4.0]]), 4)
    got = drift._distance(a, b)
    assert got["token_tv"] == pytest.approx((0.5 + 0.25 + 0.5 + 0.25) / 2)
    assert got["log_mel_db"] == pytest.approx(10 / np.log(10))
    assert drift._distance(a, a) == {"log_mel_db": 0.0, "token_tv": 0.0}


def test_halves_share_the_groups_and_prompts_do_not_overlap():
    lengths = [500, 100, 700, 225, 300, 224]
    groups = ["a", "b", "a", "b", "a", "b"]
    split = split_of([[0] * n for n in lengths], groups=groups)
    first, second = drift._halves(split)
    assert sorted(first + second) == list(range(6))
    assert {groups[i] for i in first} == {groups[i] for i in second} == {"a", "b"}
    pieces = drift._prompts(split, first, 100)
    assert all(start + 225 <= lengths[clip] and start % 225 == 0 for clip, start in pieces)
    assert len(set(pieces)) == len(pieces) == sum(lengths[clip] // 225 for clip in first)
    assert drift._prompts(split, first, 2)[0] == pieces[0]
    with pytest.raises(DataError, match=r"no clip that long among the 1"):
        drift._prompts(split, [5], 1)
    with pytest.raises(DataError, match="at least 2 clips"):
        drift._halves(split_of([[0] * 500]))


def test_rollouts_repeat_with_their_seed(tiny_run, prepared):
    generator, split = AudioGenerator.load(tiny_run), Dataset(prepared).split("valid")
    one = drift.drift(generator, split, 1, 2, seed=3)
    assert one == drift.drift(generator, split, 1, 2, seed=3)
    assert one["seconds"] != drift.drift(generator, split, 1, 2, seed=4)["seconds"]


def test_token_only_models_roll_out_too(prepared):
    dataset = Dataset(prepared)
    model = HybridModel(dataclasses.replace(presets.preset("gpt-xs"), n_layers=1)).eval()
    generator = AudioGenerator(model, codec_of(dataset), MelFrontend(dataset.mel_config), None)
    result = drift.drift(generator, dataset.split("train"), 1, 3)
    assert result["n_rollouts"] == 3 and len(result["seconds"]) == 1


def test_eval_command_prints_the_drift(tiny_run, capsys):
    from wgpt.cli import main

    command = ["eval", str(tiny_run), "--rollout-s=2", "--rollout-clips=1"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["rollout"]
    assert len(result["seconds"]) == 2 and result["n_rollouts"] == 1
    assert all(0 < row["token_tv"] <= 1 for row in result["seconds"])
    assert main(command) == 0
    assert "| real sound, 1 codebook(s) |" in capsys.readouterr().out
    assert main(["eval", str(tiny_run), "--rollout-s=-1"]) == 2
    assert "rollout_s must be in [1, 3600], got -1" in capsys.readouterr().err


def test_drift_refuses_no_clips(tiny_run, prepared):
    with pytest.raises(ConfigError, match=r"rollout_clips must be in \[1, 3600\], got 0"):
        drift.drift(AudioGenerator.load(tiny_run), Dataset(prepared).split("valid"), 1, 0)
