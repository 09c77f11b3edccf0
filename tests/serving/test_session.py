"""GenerationSession: what it makes equals AudioGenerator, what it refuses it says plainly."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from serving.server_process import decoded

from wgpt import audio
from wgpt.audio.mel import band_edges_hz, mel_filterbank
from wgpt.errors import AudioError, ConfigError
from wgpt.generation import AudioGenerator, Sampling
from wgpt.ops.runtime import one_thread
from wgpt.serving import session as session_module
from wgpt.serving.session import GenerationSession, Limits, load_models, pcm


@pytest.fixture(scope="module")
def generator(tiny_run) -> AudioGenerator:
    return AudioGenerator.load(tiny_run)


@pytest.fixture(scope="module")
def session(generator) -> GenerationSession:
    return GenerationSession({"tiny": generator}, Limits(max_prompt_s=4.0))


@pytest.fixture
def prompt_file(recordings) -> Path:
    return sorted(recordings.rglob("*.wav"))[0]


def test_continuation_is_what_the_generator_makes(session, generator, prompt_file):
    wave = session.read_prompt(prompt_file.read_bytes())
    np.testing.assert_array_equal(wave, audio.read(prompt_file))
    request = session.request({"model": "tiny", "seconds": "1", "seed": "7"})
    with one_thread():
        pieces = list(session.continue_prompt(request, wave))
        steps = list(generator.steps(wave, 75, Sampling(top_k=100), seed=7))
    assert [len(piece["tokens"]) for piece in pieces] == [6, 15, 15, 15, 15, 9]
    assert [piece["done"] for piece in pieces] == [False] * 5 + [True]
    json.dumps(pieces)
    made = np.concatenate([decoded(piece["pcm"]) for piece in pieces])
    expected = pcm(np.concatenate([step.wave for step in steps]))
    np.testing.assert_array_equal(made, np.frombuffer(expected, "<i2"))
    assert [tokens for piece in pieces for tokens in piece["tokens"]] == [s.tokens for s in steps]
    entropies = [entropy for piece in pieces for entropy in piece["entropy_nats"]]
    np.testing.assert_allclose(entropies, [s.entropy_nats for s in steps], rtol=0, atol=6e-4)


def test_mel_columns_are_the_front_ends_of_the_whole_sound(session, generator, prompt_file):
    wave = session.read_prompt(prompt_file.read_bytes())[:9700]  # 30 whole steps
    request = session.request({"model": "tiny", "seconds": "0.4", "seed": "3"})
    with one_thread():
        pieces = list(session.continue_prompt(request, wave))
        steps = list(generator.steps(wave, 30, Sampling(top_k=100), seed=3))
    whole = np.concatenate([wave[100:], *(step.wave for step in steps)])
    every = generator.frontend.config.frames_per_step
    expected = generator.frontend(torch.from_numpy(whole)).numpy()[::every] * 10 / np.log(10)
    columns = b"".join(base64.b64decode(piece["mel"]) for piece in pieces)
    made = np.frombuffer(columns, np.int8).reshape(30, -1)
    np.testing.assert_allclose(made, np.clip(expected[30:], -127, 127), rtol=0, atol=0.51)


def test_prompt_is_described_as_it_is_and_as_the_codec_hears_it(session, generator, prompt_file):
    wave = session.read_prompt(prompt_file.read_bytes())[:9700]
    answer = session.describe({"model": "tiny"}, wave)
    assert answer["seconds"] == 0.4
    whole = torch.from_numpy(wave[100:])
    np.testing.assert_array_equal(
        decoded(answer["recording"]["pcm"]), np.frombuffer(pcm(wave[100:]), "<i2")
    )
    gain = np.float32(generator.prompt_gain(whole))
    tokens = generator.codec.encode(whole * gain)[: generator.n_codebooks]
    ceiling = pcm(generator.codec.decode(tokens).numpy() / gain)
    assert base64.b64decode(answer["codec"]["pcm"]) == ceiling
    n_mels = generator.frontend.config.n_mels
    for sound in ("recording", "codec"):
        assert len(base64.b64decode(answer[sound]["mel"])) == 30 * n_mels
    with pytest.raises(ConfigError, match="at least one step"):
        session.describe({"model": "tiny"}, wave[:319])


def test_mel_edges_name_the_bands_of_the_filterbank(generator):
    config = generator.frontend.config
    edges_hz, bank = band_edges_hz(config), mel_filterbank(config)
    loudest_hz = bank.argmax(0) * config.sample_rate_hz / config.window_samples
    bin_hz = config.sample_rate_hz / config.window_samples
    assert edges_hz[0] == config.f_min_hz and edges_hz[-1] == pytest.approx(config.f_max_hz)
    assert (loudest_hz - edges_hz[1:-1]).abs().max() <= bin_hz


@pytest.mark.parametrize(
    ("seconds", "n_silent", "warns"),
    [(4.0, 149, False), (4.0, 150, True), (1.0, 37, False), (1.0, 38, True)],
)
def test_continuation_warns_of_silence(session, monkeypatch, seconds, n_silent, warns):
    """After 2 s of it, or half of a shorter continuation; once said, it stays."""

    def steps(prompt, n_steps, sampling, seed):
        for i in range(n_steps):
            loud = 0.0 if 5 <= i < 5 + n_silent else 0.1
            yield session_module.Step(np.full(320, loud, np.float32), (i % 1000,), 1.0)

    monkeypatch.setattr(session.models["tiny"], "steps", steps)
    request = session.request({"model": "tiny", "seconds": str(seconds)})
    *_, last = session.continue_prompt(request, np.zeros(0, np.float32))
    assert bool(last["warning"]) == warns
    assert not warns or "silence" in last["warning"]


def test_continuation_warns_of_a_loop(session):
    """An untrained model that takes the most likely token says the same for ever."""
    request = session.request({"model": "tiny", "seconds": "6", "temperature": "0"})
    *_, last = session.continue_prompt(request, np.zeros(0, np.float32))
    assert "repeated for 2 s" in last["warning"] or "silence" in last["warning"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "another"}, "model must be one of tiny, got 'another'"),
        ({"seconds": "30.5"}, "seconds must lie in"),
        ({"seconds": "0.001"}, "seconds must lie in"),
        ({"seconds": "nan"}, "seconds must lie in"),
        ({"seconds": "long"}, "seconds must be a number, got 'long'"),
        ({"seed": "-1"}, "seed must lie in"),
        ({"seed": str(2**63)}, "seed must lie in"),
        ({"seed": "0.5"}, "seed must be a whole number"),
        ({"temperature": "-0.5"}, "temperature must be finite and at least 0, got -0.5"),
        ({"top_p": "0"}, "top_p must be in"),
        ({"top_k": "x"}, "top_k must be a whole number, got 'x'"),
        ({"fine_temperature": "-0.25"}, "fine_temperature must be"),
    ],
)
def test_request_checks_what_the_page_would_not_send(session, given, words):
    with pytest.raises(ConfigError) as caught:
        session.request({"model": "tiny", "seconds": "1", "seed": "0", **given})
    assert words in str(caught.value)


def test_request_takes_every_setting(session):
    chosen = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "fine_temperature": 0.25,
              "fine_top_k": 3}  # fmt: skip
    query = {"model": "tiny", "seconds": "2", "seed": "5", **{k: str(v) for k, v in chosen.items()}}
    request = session.request(query)
    assert request.sampling == Sampling(**chosen)
    assert (request.n_steps, request.seed) == (150, 5)


def test_read_prompt_speaks_of_the_prompt_and_leaves_no_file(
    session, tmp_path, monkeypatch, prompt_file
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    audio.write(tmp_path / "long.wav", np.zeros(24_000 * 5, np.float32))
    for content, words in (
        ((tmp_path / "long.wav").read_bytes(), "the prompt must last at most 4 s, got 5.0 s"),
        (b"not audio", "the prompt must be audio that libsndfile reads"),
        (prompt_file.read_bytes()[:44], "the prompt must hold at least one sample"),
    ):
        with pytest.raises(AudioError) as caught:
            session.read_prompt(content)
        assert words in str(caught.value)
        assert "/" not in str(caught.value) and "max_seconds" not in str(caught.value)
    assert len(session.read_prompt(prompt_file.read_bytes())) == 72_000
    assert len(session.read_prompt(b"")) == 0
    assert list((tmp_path / "temporary").iterdir()) == []


def test_examples_are_clips_of_the_package(session):
    examples = session.facts()["examples"]
    assert 0 < len(examples) <= session_module.N_EXAMPLES
    for index, example in enumerate(examples):
        assert example["text"][-1] in ".!?"
        assert len(session.example(index)) == 24_000 * session_module.EXAMPLE_S


def test_limits_must_be_positive():
    for name in ("max_prompt_s", "max_seconds", "max_upload_mb"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
                Limits(**{name: value})


def test_pcm_is_clipped_and_little_endian():
    wave = np.array([0, 1, -1, 2, 1 / 32767], np.float32)
    assert pcm(wave) == b"\x00\x00\xff\x7f\x01\x80\xff\x7f\x01\x00"


def test_two_runs_of_one_name_stay_apart(tiny_run, tmp_path):
    twin = tmp_path / tiny_run.name
    twin.symlink_to(tiny_run)
    models = load_models([str(tiny_run), str(twin), str(tiny_run / "model")], "cpu")
    assert list(models) == ["tiny", "tiny (2)", "model"]
    (in_int8,) = load_models([str(tiny_run)], "cpu", weight_dtype="int8").values()
    assert in_int8.weight_dtype == "int8"
