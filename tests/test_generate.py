"""Generation: same seed, same samples; cached equals uncached; the model hears its own output."""

import json

import numpy as np
import pytest
import torch

from wgpt import audio
from wgpt.cli import main
from wgpt.config import ConfigError
from wgpt.generate import Sampling, Speaker
from wgpt.sampling import Draw


@pytest.fixture(scope="module")
def speaker(tiny_run) -> Speaker:
    return Speaker.open(tiny_run)


@pytest.fixture(scope="module")
def prompt(recordings) -> np.ndarray:
    return audio.read(sorted(recordings.rglob("*.wav"))[0])[:12_345]


def test_generate_same_seed_same_samples(speaker, prompt):
    once = speaker.continue_wave(prompt, 0.4, seed=5)
    again = speaker.continue_wave(prompt, 0.4, seed=5)
    other = speaker.continue_wave(prompt, 0.4, seed=6)
    assert once.shape == (30 * 320,)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@torch.inference_mode()
def test_generate_sound_is_the_decoded_tokens_after_the_prompt(speaker, prompt):
    steps = list(speaker.stream(prompt, 30, seed=1))
    made, tokens = np.concatenate([s.wave for s in steps]), [s.tokens[0] for s in steps]
    cropped = torch.from_numpy(prompt[len(prompt) % 320 :])
    codes = torch.cat([speaker.codec.encode(cropped)[:1], torch.tensor([tokens])], 1)
    whole = speaker.codec.decode(codes).numpy()
    np.testing.assert_allclose(made, whole[-len(made) :], atol=1e-5)


@torch.inference_mode()
def test_generate_tokens_are_those_of_an_uncached_model(speaker, prompt):
    """Greedy tokens against one full pass over the true prompt and the decoded sound."""
    steps = speaker.stream(prompt, 15, Sampling(temperature=0))
    tokens = [step.tokens[0] for step in steps]
    cropped = torch.from_numpy(prompt[len(prompt) % 320 :])
    codes = speaker.codec.encode(cropped)[:1]
    drawn = torch.cat([codes, torch.tensor([tokens])], 1)
    decoded = speaker.codec.decode(drawn)[len(cropped) :]
    frames = speaker.frontend(torch.cat([cropped, decoded]))[None]
    bos = torch.tensor([[speaker.model.config.bos_token]])
    frames = torch.cat([speaker.frontend.silence[None, None], frames], 1)
    logits = speaker.model(torch.cat([bos, drawn], 1), frames)[0, codes.shape[1] : -1]
    # An untrained model's best two are close: compare by how much worse the drawn token is.
    drop = logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert drop.max() < 1e-3


def test_generate_streams_what_it_returns_whole(speaker, prompt):
    chunks = [step.wave for step in speaker.stream(prompt, 9, seed=2)]
    assert [len(chunk) for chunk in chunks] == [320] * 9
    assert np.array_equal(np.concatenate(chunks), speaker.continue_wave(prompt, 9 / 75, seed=2))


def test_generate_without_a_prompt(speaker):
    assert len(speaker.continue_wave(None, 0.1)) == 8 * 320


def test_sampling_keeps_to_its_rules():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(sampling):
        draw = Draw(sampling, [0])
        return {int(draw(logits)) for _ in range(200)}

    assert drawn(Sampling(temperature=0)) == {0}
    assert drawn(Sampling(top_k=2)) == {0, 1}
    assert drawn(Sampling(top_p=0.75)) == {0, 1}
    assert drawn(Sampling(top_p=0.8001)) == {0, 1, 2}
    assert drawn(Sampling()) == {0, 1, 2, 3}
    draw = Draw(Sampling(), [0])
    counts = np.bincount([int(draw(logits)) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p")],
)
def test_sampling_refuses(options, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**options)


def test_generate_command_writes_a_wav(tiny_run, recordings, tmp_path, capsys):
    prompt = sorted(recordings.rglob("*.wav"))[0]
    out = tmp_path / "y.wav"
    arguments = ["generate", str(tiny_run), "--prompt", str(prompt), "--seconds", "0.2"]
    assert main([*arguments, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["tokens"]) == 15
    assert len(audio.read(out)) == 15 * 320
    assert main([*arguments, "--out", str(out), "--with-prompt"]) == 0
    assert len(audio.read(out)) == len(audio.read(prompt)) + 15 * 320
    assert main([*arguments[:2], "--seconds", "0", "--out", str(out)]) == 2
    assert (
        main([*arguments[:2], "--prompt", "nothing.wav", "--seconds", "1", "--out", "x.wav"]) == 1
    )
    assert "nothing.wav" in capsys.readouterr().err
