"""The latents of past steps: what they hold, when they are heard, exact in a stream."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from waking import awake

import wgpt
from wgpt import codec
from wgpt.audio.mel import MelFrontend
from wgpt.codec.training import synth
from wgpt.config import HOP_SAMPLES, MelConfig, ModelConfig
from wgpt.errors import ConfigError
from wgpt.generation import AudioGenerator, Sampling
from wgpt.model import Cache, HybridModel, presets
from wgpt.model.inference import InferenceModel
from wgpt.runs.metrics import read_metrics
from wgpt.runs.run import Run
from wgpt.training import train

SHAPE = dataclasses.replace(
    presets.preset("hybrid-xs"), n_fine=3, fine_dim=64, fine_ffn_dim=64,
    latent_steps=4, latent_dim=64, latent_hidden=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def mini() -> codec.Codec:
    """The codec of `starter` and of the prepared data, whose latents have 64 channels."""
    return codec.load("mini")


def build(mini, shape: ModelConfig = SHAPE) -> HybridModel:
    """A model with random weights in every layer and mini's codebooks."""
    torch.manual_seed(1)
    model = awake(HybridModel(shape)).eval()
    model.set_codebooks(mini.codebooks())
    with torch.no_grad():
        model.latent.down.weight.normal_(0, 0.05)
        model.latent.up.bias.normal_(0, 0.3)
    return model


def inputs(steps: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T, 4) that begin with the begin-of-clip token, and frames (B, T, 64)."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 1024, (batch, steps, 4), generator=generator)
    tokens[:, 0] = 1024
    return tokens, torch.randn(batch, steps, 64, generator=generator)


def test_codebooks_add_up_to_the_latents_that_the_decoder_reads(mini):
    transformers = pytest.importorskip("transformers")
    entries = mini.codebooks()
    assert entries.shape == (8, 1024, 64)
    folder = Path(wgpt.__file__).parent / "assets" / "mini"
    encodec = transformers.EncodecModel.from_pretrained(folder, dtype=torch.float32)
    codes = torch.randint(0, 1024, (8, 1, 20))
    summed = sum(entries[k][codes[k, 0]] for k in range(8))
    with torch.no_grad():
        expected = encodec.quantizer.decode(codes)[0].T
    torch.testing.assert_close(summed, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_history_holds_the_newest_steps_first_and_nothing_of_unknown_ones(mini):
    latent = build(mini).latent
    tokens, _ = inputs(6)
    history = latent.history(tokens, None).unflatten(2, (4, 64))
    entries = mini.codebooks()[:4]
    entries = entries - entries.mean(1, keepdim=True)
    entries = entries / entries.square().mean((1, 2)).sum().sqrt()
    for t, i in [(5, 0), (5, 3), (3, 1)]:
        expected = sum(entries[k][tokens[:, t - i, k]] for k in range(4))
        torch.testing.assert_close(history[:, t, i], expected)
    assert not history[:, 0].any()  # the begin-of-clip token, and zeros before it
    assert not history[:, 2, 2:].any()
    assert history[:, 1:].square().mean().item() > 0.3
    with pytest.raises(ValueError, match=r"\(K, V, E\) = \(4, 1024, 64\), got \(8, 1024, 64\)"):
        latent.set_codebooks(mini.codebooks())


@torch.inference_mode()
def test_latents_are_heard_from_their_step_on(mini):
    model = build(mini)
    tokens, frames = inputs(9)
    before = model(tokens, frames)
    other = tokens.clone()
    other[0, 4, 2] = (other[0, 4, 2] + 1) % 1024  # a finer code alone
    changed = (model(other, frames) != before).any(-1)
    assert changed[0, 4:].all() and not changed[0, :4].any() and not changed[1].any()


@torch.inference_mode()
def test_noise_is_heard_while_training_only_and_by_row(mini):
    latent = build(mini).latent
    tokens, _ = inputs(400, batch=8)
    clean = latent.history(tokens, None)
    latent.noise = 0.6
    assert torch.equal(latent.history(tokens, None), clean)
    torch.manual_seed(3)
    noisy = latent.train().history(tokens, None)
    levels = (noisy - clean)[:, 8:].std((1, 2))
    assert levels.max() < 0.65 and levels.std() > 0.05  # uniform in [0, 0.6)
    torch.manual_seed(3)
    assert torch.equal(latent.history(tokens, None), noisy)


@torch.inference_mode()
def test_new_latents_change_nothing(mini):
    """The same seed draws the same model; its projection is zero."""
    torch.manual_seed(0)
    plain = HybridModel(dataclasses.replace(SHAPE, latent_steps=0))
    torch.manual_seed(0)
    model = HybridModel(SHAPE)
    model.set_codebooks(mini.codebooks())
    tokens, frames = inputs(6)
    assert torch.equal(model(tokens, frames), plain(tokens[:, :, 0], frames))
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        "latent.codebooks", "latent.up.weight", "latent.up.bias", "latent.down.weight",
    }  # fmt: skip


@torch.inference_mode()
def test_cached_and_packed_states_are_those_of_one_pass(mini):
    model = build(mini)
    packed, cache, plain_cache = InferenceModel(model), model.new_cache(), model.new_cache()
    tokens, frames = inputs(24)
    whole = model.hidden(tokens, frames)
    start = 0
    for n in (8, 1, 1, 2, 8, 1, 3):
        part = slice(start, start + n)
        start += n
        got = model.hidden(tokens[:, part], frames[:, part], plain_cache)
        torch.testing.assert_close(got, whole[:, part], rtol=0, atol=2e-5)
        got = packed.hidden(tokens[:, part], frames[:, part], cache)
        torch.testing.assert_close(got, whole[:, start - 1], rtol=0, atol=2e-5)
    assert start == 24 and cache.latents.shape == (2, 3, 64)


@torch.inference_mode()
def test_rows_of_a_batch_have_the_bits_they_have_alone(mini):
    packed = InferenceModel(build(mini))
    tokens, frames = inputs(10, batch=3)
    newest = tokens[:, 9:], frames[:, 9:]
    parts = [packed_cache(packed, tokens[b : b + 1, :9], frames[b : b + 1, :9]) for b in range(3)]
    joined = packed.hidden(*newest, Cache.join(parts))
    for b in range(3):
        alone = packed_cache(packed, tokens[b : b + 1, :9], frames[b : b + 1, :9])
        got = packed.hidden(newest[0][b : b + 1], newest[1][b : b + 1], alone)
        assert torch.equal(joined[b : b + 1], got)


def packed_cache(packed, tokens, frames):
    cache = Cache(SHAPE.n_mel_layers, SHAPE.n_layers)
    packed.hidden(tokens, frames, cache)
    return cache


@torch.inference_mode()
def test_a_stream_says_what_one_pass_says(mini):
    """Greedy codes of all codebooks, the prompt in odd pieces, against an uncached model."""
    model = build(mini)
    generator = AudioGenerator(model, mini, MelFrontend(MelConfig()), "decoded-4")
    prompt = synth.render_music(0.5, seed=4)[: 30 * HOP_SAMPLES]
    heard, rest = generator.new_state(), prompt
    for n in (100, 5000, 319, 321):
        heard.feed(rest[:n])
        rest = rest[n:]
    heard.feed(rest)
    states, steps = [], []
    for (step,) in heard.steps(12, Sampling(temperature=0, fine_temperature=0)):
        steps.append(step)
        states.append(heard._state[0])
    said = torch.tensor([step.tokens for step in steps]).T
    codes = torch.cat([mini.encode(torch.from_numpy(prompt))[:4], said], 1)
    sound = mini.decode(codes)
    frames = torch.cat([generator.frontend.silence[None], generator.frontend(sound)])[None]
    tokens = torch.cat([torch.full((4, 1), 1024), codes], 1).T[None]
    expected = model.hidden(tokens, frames)[0, 30:-1]
    torch.testing.assert_close(torch.stack(states), expected, rtol=0, atol=1e-3)
    whole = list(generator.steps(prompt, 12, Sampling(temperature=0, fine_temperature=0)))
    assert all(np.array_equal(a.wave, b.wave) for a, b in zip(steps, whole, strict=True))


@torch.inference_mode()
def test_later_audio_changes_no_logit_before_it(mini):
    """The leak test with all codebooks in the input."""
    model, frontend = build(mini), MelFrontend(MelConfig())
    wave = torch.from_numpy(synth.render_music(0.5, seed=3)[: 30 * HOP_SAMPLES])

    def logits(wave):
        codes = mini.encode(wave)[:4]
        tokens = torch.cat([torch.full((4, 1), 1024), codes], 1).T[None]
        frames = torch.cat([frontend.silence[None], frontend(wave)])[None]
        hidden = model.hidden(tokens, frames)
        return model.head(hidden)[0], hidden

    for t in (0, 7, 28):
        changed = wave.clone()
        changed[(t + 1) * HOP_SAMPLES :] *= -0.5
        before, after = logits(wave)[0], logits(changed)[0]
        assert torch.equal(before[: t + 2], after[: t + 2])
        assert not torch.equal(before[t + 2 :], after[t + 2 :])


SETTINGS = {
    "max_steps": 6, "batch_size": 2, "context_s": 0.64, "warmup_steps": 2, "eval_every": 3,
    "save_every": 3, "sample_s": 0.0, "device": "cpu",
}  # fmt: skip
TRUNK = {"n_layers": 1, "n_mel_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64}
HEARD = {"n_fine": 2, "fine_dim": 32, "fine_ffn_dim": 32, "latent_steps": 3, "latent_hidden": 32}


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent") / "run"
    settings = {**SETTINGS, "latent_noise": 0.5}
    train(prepared, out, "hybrid-xs", model={**TRUNK, **HEARD}, **settings)
    return out


def test_training_takes_the_codebooks_from_the_codec_and_resumes(trained, tmp_path, mini):
    import shutil

    assert Run.open(trained).model.latent_dim == 64
    model = HybridModel.from_pretrained(trained / "model")
    fresh = HybridModel(model.config)
    fresh.set_codebooks(mini.codebooks())
    assert torch.equal(model.latent.codebooks, fresh.latent.codebooks)
    assert model.latent.down.weight.abs().max() > 0
    out = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    train(None, out, resume=True)
    for path in ("metrics.csv", "model/model.safetensors"):
        assert (out / path).read_bytes() == (trained / path).read_bytes(), path


def test_eval_and_generation_read_what_training_read(trained):
    from wgpt.evaluate import evaluate

    result = evaluate(trained)
    forced = next(r for r in result["rows"] if "teacher-forced" in r["model"])
    last = read_metrics(trained / "metrics.csv")[-1]
    assert forced["nll_nats"] == pytest.approx(float(last["nll_nats"]), abs=1e-6)
    assert len(AudioGenerator.load(trained).generate(None, 0.1)) == 8 * HOP_SAMPLES


def valid_rows(run) -> list[dict[str, str]]:
    return [row for row in read_metrics(run / "metrics.csv") if row["split"] == "valid"]


def test_init_adds_latents_to_a_run_without(prepared, trained, tmp_path):
    """Step 0 scores what the coarse run's best scored; from a run with latents they come along."""
    settings = {**SETTINGS, "max_steps": 1}
    train(prepared, tmp_path / "coarse", "hybrid-xs", model=TRUNK, **settings)
    train(prepared, tmp_path / "more", model=HEARD, init=str(tmp_path / "coarse"), **settings)
    scores = valid_rows(tmp_path / "coarse")
    best = min(scores, key=lambda row: float(row["nll_nats"]))
    assert valid_rows(tmp_path / "more")[0]["nll_nats"] == best["nll_nats"]
    train(prepared, tmp_path / "again", init=str(trained), **settings)
    best = min(valid_rows(trained), key=lambda row: float(row["nll_nats"]))
    for name in ("nll_nats", "fine_nll_nats"):
        assert valid_rows(tmp_path / "again")[0][name] == best[name]


def test_training_refuses_latents_that_do_not_fit(prepared, tmp_path):
    with pytest.raises(ConfigError, match=r"latent_noise must be 0 .* got 0\.5"):
        train(prepared, tmp_path / "run", "hybrid-xs", latent_noise=0.5, **SETTINGS)
    with pytest.raises(ConfigError, match="latent_noise must be finite and at least 0, got -1"):
        train(prepared, tmp_path / "run", "hybrid-xs", latent_noise=-1.0, **SETTINGS)
    with pytest.raises(ConfigError, match="--latent-dim must be that of the data's codec, 64, got"):
        shape = {**TRUNK, **HEARD, "latent_dim": 48}
        train(prepared, tmp_path / "run", "hybrid-xs", model=shape, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_frozen_trunk_refuses_latents_it_would_never_learn(prepared, tiny_run, tmp_path):
    settings = {**SETTINGS, "init": str(tiny_run), "freeze_trunk": True}
    with pytest.raises(ConfigError, match=r"--latent-steps adds .* must be that of --init, 0, got"):
        train(prepared, tmp_path / "run", model=HEARD, **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latent_steps": 2}, "latent_steps must be 0 without fine codebooks"),
        ({"latent_steps": -1}, "latent_steps must be at least 0"),
        ({"latent_dim": -1}, "latent_dim must be at least 0"),
        ({"n_fine": 1, "latent_steps": 2, "latent_hidden": 0}, "latent_hidden must be at least 1"),
    ],
)
def test_config_error_names_the_field(fields, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**fields)
