"""Trained listeners: their numbers by hand and beside their packages; what is missing is named."""

import importlib.util
import json
import logging

import numpy as np
import pytest
import torch
from splits import split_of

from wgpt import audio
from wgpt.cli import main
from wgpt.codec.training.score import pesq
from wgpt.codec.weights import ASSETS
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.evaluation import drift, listeners
from wgpt.evaluation.listeners import PATCH, Listeners, SpeakerEncoder
from wgpt.evaluation.tables import listener_table


def speech(index, seconds=2.5):
    """float32 at 24 kHz from the packaged recordings."""
    paths = sorted((ASSETS / "speech").glob("*.ogg"))
    waves = [audio.read(path, SAMPLE_RATE_HZ) for path in paths[index : index + 4]]
    return np.concatenate(waves)[: round(seconds * SAMPLE_RATE_HZ)]


@pytest.fixture
def weights(tmp_path):
    """A file as resemblyzer carries one, with weights of no training."""
    torch.manual_seed(3)
    lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
    state = {f"lstm.{name}": tensor for name, tensor in lstm.state_dict().items()}
    state |= {f"linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    torch.save({"step": 7, "model_state": state | {"similarity_weight": torch.ones(1)}},
               tmp_path / "pretrained.pt")  # fmt: skip
    return tmp_path / "pretrained.pt"


@pytest.mark.parametrize(("seconds", "n_patches"), [(0.3, 1), (1.6, 1), (1.9, 1), (2, 2), (5, 5)])
def test_embedding_is_the_unit_mean_of_patches(weights, monkeypatch, seconds, n_patches):
    encoder, seen = SpeakerEncoder(weights), []
    whole = encoder.forward

    def spy(mel):
        seen.append((mel, whole(mel)))
        return seen[-1][1]

    monkeypatch.setattr(encoder, "forward", spy)
    embedding = encoder.embed(speech(0, seconds))
    ((mel, parts),) = seen
    assert mel.shape == (n_patches, PATCH, 40) and (mel >= 0).all()
    assert torch.allclose(parts.norm(dim=1), torch.ones(n_patches)) and (parts >= 0).all()
    mean = parts.mean(0)
    np.testing.assert_allclose(embedding, mean / mean.norm(), rtol=1e-5, atol=1e-7)


def test_silence_has_an_embedding(weights):
    assert np.isfinite(SpeakerEncoder(weights).embed(np.zeros(SAMPLE_RATE_HZ, np.float32))).all()


@pytest.mark.slow
def test_speakers_are_those_of_resemblyzer():
    try:
        from resemblyzer import VoiceEncoder
    except ImportError as error:
        pytest.skip(f"resemblyzer cannot be imported: {error}")
    theirs, ours = VoiceEncoder("cpu", verbose=False), Listeners()
    for seconds in (1.0, 3.1):
        sounds = [speech(index, seconds) for index in (0, 20)]
        expected = [theirs.embed_utterance(listeners._at_16_khz(wave)) for wave in sounds]
        assert ours.speaker(*sounds) == pytest.approx(float(expected[0] @ expected[1]), abs=1e-4)
    assert ours.speaker(sounds[0], sounds[0]) == pytest.approx(1, abs=1e-5)


def test_a_recogniser_hears_words_in_speech_and_none_in_silence():
    pytest.importorskip("pocketsphinx")
    found = Listeners()
    assert found.confidence(np.zeros(SAMPLE_RATE_HZ, np.float32)) == (0.0, 0.0)
    confidence, words_per_s = found.confidence(speech(0, 1.5))
    assert 0 < confidence <= 1 and 0 < words_per_s < 10


def test_words_are_kept_in_order(monkeypatch):
    found = Listeners()
    found.missing = {}
    monkeypatch.setattr(found, "_hear", str.split)
    assert found.words("one four three", "one two three four") == 0.5
    assert found.words("", "one") == 0 and found.words("one", "one") == 1
    assert found.words("one", "") is None


def test_pesq_falls_with_noise_and_needs_speech():
    pytest.importorskip("pesq")
    wave, noise = speech(0), np.random.default_rng(0).standard_normal(60_000).astype(np.float32)
    assert pesq(wave, wave, SAMPLE_RATE_HZ) == pytest.approx(4.64, abs=0.01)
    assert 1 <= pesq(wave + 0.02 * noise, wave, SAMPLE_RATE_HZ) < 3
    for pair in ((0 * wave, wave), (1e-30 * wave, wave), (wave, 0 * wave), (wave[:99], wave[:99])):
        assert pesq(*pair, SAMPLE_RATE_HZ) is None


class Ears(Listeners):
    """Hears the level of a sound."""

    def __init__(self, missing=()):
        self.missing = {name: f"pip install {name}" for name in missing}

    def speaker(self, sound, other):
        return None if "speaker" in self.missing else float(sound.max() / other.max())

    def confidence(self, wave):
        return None if "confidence" in self.missing else (float(wave.max()), 2.0)


def test_means_are_of_what_is_installed():
    pairs = [(np.array([2.0]), np.array([4.0])), (np.array([3.0]), np.array([3.0]))]
    assert Ears().judge(pairs) == {"speaker": 0.75, "confidence": 2.5, "words_per_s": 2.0}
    assert Ears(["speaker"]).judge(pairs) == {"confidence": 2.5, "words_per_s": 2.0}
    assert Ears(["confidence"]).judge(pairs) == {"speaker": 0.75}
    rows = [{"sound": "rollouts", "n": 2, **Ears(["confidence"]).judge(pairs)}]
    head, _, row = listener_table(rows).splitlines()
    assert head == "| sound | n | speaker, cosine to the prompt |"
    assert row == "| rollouts | 2 | 0.750 |"


def test_real_sound_beside_a_prompt_is_of_its_group_or_of_none_of_it():
    lengths, groups = [500, 100, 700, 225, 300, 224], ["a", "b", "a", "b", "a", "b"]
    split = split_of([[0] * n for n in lengths], groups=groups)
    prompts, reference = [(0, 0), (3, 0)], [1, 2, 4]
    same = dict(drift._beside(split, prompts, reference, True))
    assert same == {0: (2, 0)}  # of b no piece is long enough
    other = dict(drift._beside(split, prompts, reference, False))
    assert other == {1: (2, 225)}


def test_eval_names_what_is_missing_and_measures_the_rest(tiny_run, monkeypatch, capsys, caplog):
    monkeypatch.setattr("wgpt.evaluation.summary.installed_listeners", lambda: Ears(["speaker"]))
    command = ["eval", str(tiny_run), "--metrics", "--rollout-s=1", "--rollout-clips=2"]
    with caplog.at_level(logging.WARNING):
        assert main([*command, "--json"]) == 0
    assert "no speaker: it needs a package: pip install speaker" in caplog.text
    found = json.loads(capsys.readouterr().out)["rollout"]["listeners"]
    assert found["missing"] == {"speaker": "pip install speaker"}
    first, *others = found["rows"]
    assert first["sound"] == "rollouts" and first["n"] >= 1 and others
    assert all(row["words_per_s"] == 2.0 and "speaker" not in row for row in found["rows"])
    assert all(row["sound"].endswith("group, 1 codebook(s)") for row in others)


def test_eval_without_any_listener_or_rollout_says_what_to_do(tiny_run, monkeypatch, capsys):
    assert main(["eval", str(tiny_run), "--metrics"]) == 2
    assert "--metrics judges rollouts; give their length too: --rollout-s S" in (
        capsys.readouterr().err
    )
    real = importlib.util.find_spec
    packages = {package for package, _ in listeners.PACKAGES.values()}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else real(name)
    )
    assert main(["eval", str(tiny_run), "--metrics", "--rollout-s=1"]) == 2
    assert capsys.readouterr().err.endswith(
        "eval: --metrics needs a trained listener: pip install --no-deps resemblyzer (speaker); "
        "pip install 'wgpt[metrics]' (confidence)\n"
    )
