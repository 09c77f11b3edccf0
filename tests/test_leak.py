"""The leak test: audio after token t changes no token, mel slice or logit up to t, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from waking import awake

from wgpt import codec
from wgpt.audio.mel import MelFrontend
from wgpt.codec.training import synth
from wgpt.config import HOP_SAMPLES, MelConfig
from wgpt.model import HybridModel, presets

N_STEPS = 60


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    """0.8 s of rendered music, float32 (L,): sounding from the first sample to the last."""
    music = synth.render_music(2.0, seed=3)[: N_STEPS * HOP_SAMPLES]
    noise = np.random.default_rng(0).normal(0, 0.01, len(music))
    return torch.from_numpy((music + noise).astype(np.float32))


@pytest.fixture(scope="module")
def mini() -> codec.Codec:
    return codec.load("mini")


@pytest.fixture(scope="module")
def models() -> dict[int, HybridModel]:
    """A hybrid for each r, with a convolutional slice embedding (c = 2 r)."""
    torch.manual_seed(0)
    shape = presets.preset("hybrid-xs")
    return {
        r: awake(
            HybridModel(dataclasses.replace(shape, frames_per_step=r, mel_context_frames=2 * r))
        ).eval()
        for r in (1, 2)
    }


def changed_after(wave: torch.Tensor, t: int) -> torch.Tensor:
    """The wave with every sample from (t+1)*320 on replaced."""
    changed = wave.clone()
    start = (t + 1) * HOP_SAMPLES
    noise = torch.randn(len(wave) - start, generator=torch.Generator().manual_seed(t))
    changed[start:] = 0.5 * noise.clamp(-1, 1)
    return changed


def what_the_model_sees(wave, mini, mel, model):
    """Tokens (K, T), mel slices (T*r, M) and logits (T+1, V) of the predictions of steps 0 .. T."""
    tokens, slices = mini.encode(wave), MelFrontend(mel)(wave)
    bos = torch.tensor([model.config.bos_token])
    silence = torch.full((mel.frames_per_step, mel.n_mels), float(np.log(mel.floor)))
    inputs = torch.cat([bos, tokens[0]])[None]
    frames = torch.cat([silence, slices])[None]
    with torch.inference_mode():
        return tokens, slices, model(inputs, frames)[0]


def same_until(t, before, after, r):
    """Whether tokens and slices up to t, and the logits that they lead to, are the same bits.

    Logit row i predicts token i from tokens and slices before it; so row t+1, which predicts the
    first token that may change, must not change either.
    """
    (tokens, slices, logits), (tokens2, slices2, logits2) = before, after
    return (
        torch.equal(tokens[:, : t + 1], tokens2[:, : t + 1]),
        torch.equal(slices[: (t + 1) * r], slices2[: (t + 1) * r]),
        torch.equal(logits[: t + 2], logits2[: t + 2]),
    )


@pytest.mark.parametrize("t", [0, 1, 7, 30, N_STEPS - 2])
@pytest.mark.parametrize("r", [1, 2])
def test_leak_later_audio_changes_nothing_up_to_t(wave, mini, models, t, r):
    mel = MelConfig(frames_per_step=r)
    before = what_the_model_sees(wave, mini, mel, models[r])
    after = what_the_model_sees(changed_after(wave, t), mini, mel, models[r])
    assert same_until(t, before, after, r) == (True, True, True)
    # The change is real: something after t does change.
    assert not torch.equal(before[0][:, t + 1 :], after[0][:, t + 1 :])
    assert not torch.equal(before[2][t + 2 :], after[2][t + 2 :])


@pytest.mark.parametrize("t", [7, 30])
def test_leak_is_found_in_a_centred_window_of_1024(wave, mini, models, t):
    leaky = MelConfig(window_samples=1024, centered=True, leaky=True)
    before = what_the_model_sees(wave, mini, leaky, models[1])
    after = what_the_model_sees(changed_after(wave, t), mini, leaky, models[1])
    assert same_until(t, before, after, 1) == (True, False, False)


def test_leak_decoded_sound_of_early_tokens_is_final(wave, mini):
    """Codes 0..t give the audio up to (t+1)*320 exactly: the mel of decoded audio leaks nothing."""
    codes = mini.encode(wave)
    other = codes.clone()
    other[:, 31:] = (other[:, 31:] + 1) % mini.codebook_size
    end = 31 * HOP_SAMPLES
    assert torch.equal(mini.decode(codes)[:end], mini.decode(other)[:end])
    assert not torch.equal(mini.decode(codes)[end:], mini.decode(other)[end:])
