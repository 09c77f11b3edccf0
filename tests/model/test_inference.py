"""The model for generation: the logits of the model itself, at any position, in any batch."""

import dataclasses

import pytest
import torch
from waking import awake

from wgpt.config import WEIGHT_DTYPES
from wgpt.errors import ConfigError
from wgpt.model import Cache, HybridModel, presets
from wgpt.model.inference import InferenceModel, RotaryTable, round_weights

HYBRID = dataclasses.replace(presets.preset("hybrid-xs"), n_fine=3, fine_dim=64, fine_ffn_dim=96)
LATENT = dataclasses.replace(HYBRID, latent_steps=4, latent_dim=8, latent_hidden=16)
SHAPES = {
    "hybrid": HYBRID,
    "tokens": presets.preset("gpt-xs"),
    "window": dataclasses.replace(HYBRID, window_steps=9),
    "frames": dataclasses.replace(HYBRID, frames_per_step=2, mel_context_frames=4),
}


def build(shape):
    torch.manual_seed(1)
    model = awake(HybridModel(shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # gains and biases: no two alike, none at its initial value
                p.add_(torch.randn_like(p) * 0.3)
    return model


def inputs(shape, steps, batch=2):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, shape.codebook_size, (batch, steps), generator=generator)
    if not shape.mel_dim:
        return tokens, None
    frames = torch.randn(batch, steps * shape.frames_per_step, shape.n_mels, generator=generator)
    return tokens, frames


def packed_logits(model, tokens, frames, pieces, cache=None, weight_dtype="fp32"):
    """Logits (B, n_pieces, V) after each piece of steps."""
    packed, cache = InferenceModel(model, weight_dtype), cache or model.new_cache()
    r, start, given = model.config.frames_per_step, 0, []
    for n in pieces:
        part = None if frames is None else frames[:, start * r : (start + n) * r]
        given.append(packed.logits(packed.hidden(tokens[:, start : start + n], part, cache)))
        start += n
    return torch.stack(given, 1)


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_packed_logits_are_as_accurate_as_an_uncached_pass(name):
    """Both in float32 against float64: at most twice the error, and that error is small."""
    model = build(SHAPES[name])
    tokens, frames = inputs(SHAPES[name], 40)
    pieces = [8, 8, 1, 1, 5, 1, 1, 8, 7]
    ends = torch.tensor(pieces).cumsum(0) - 1
    plain = model(tokens, frames)[:, ends]
    exact = model.double()(tokens, None if frames is None else frames.double())[:, ends]
    got = packed_logits(build(SHAPES[name]), tokens, frames, pieces)
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (got, plain))
    scale = exact.abs().max().item()
    assert plain_error < 2e-5 * scale
    assert error <= 2 * plain_error + 2 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_packed_rows_of_a_batch_have_the_bits_they_have_alone(name, weight_dtype):
    model = build(SHAPES[name])
    tokens, frames = inputs(SHAPES[name], 20, batch=5)
    pieces = [8, *[1] * 12]
    options = {"weight_dtype": weight_dtype}
    batch = packed_logits(model, tokens, frames, pieces, **options)
    for b in range(5):
        part = None if frames is None else frames[b : b + 1]
        alone = packed_logits(model, tokens[b : b + 1], part, pieces, **options)
        assert torch.equal(batch[b : b + 1], alone)


@pytest.mark.parametrize("weight_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [HYBRID, LATENT], ids=["plain", "latent"])
@torch.inference_mode()
def test_round_weights_gives_the_model_that_generation_runs(weight_dtype, shape):
    """Far nearer to it than the rounding itself, which is seen, in every layer and codebook."""
    model, (tokens, frames) = build(shape), inputs(shape, 12)
    if model.latent is not None:
        model.latent.codebooks.normal_()
        model.latent.down.weight.normal_(0, 0.1)
        tokens = torch.stack([tokens, *[tokens.flip(1)] * shape.n_fine], 2)
    packed, cache = InferenceModel(model, weight_dtype), model.new_cache()
    state = packed.hidden(tokens, frames, cache)
    plain = model.hidden(tokens, frames)[:, -1]
    round_weights(model, weight_dtype)
    assert_close(state, model.hidden(tokens, frames)[:, -1])
    drift = (state - plain).norm() / plain.norm()
    assert 5e-4 < drift < 0.05
    assert_close(packed.logits(state), model.head(state))
    codes, seen = torch.tensor([[3, 5, 7, 9], [1023, 0, 1, 2]]), []
    drawn = iter(codes[:, 1:].t())
    packed.sample_fine(state, codes[:, 0], lambda logits: (seen.append(logits), next(drawn))[1])
    assert_close(torch.stack(seen, 1), model.fine(state[:, None], codes[:, :, None])[:, :, 0])


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_weight_dtypes_that_cannot_be_are_named():
    model = build(SHAPES["tokens"])
    with pytest.raises(ConfigError, match="must be one of fp32, bf16, int8, got 'int4'"):
        InferenceModel(model, "int4")
    with pytest.raises(ConfigError, match="int8 is for generation on the CPU, got device meta"):
        InferenceModel(model.to("meta"), "int8")


@torch.inference_mode()
def test_packed_caches_join_to_a_batch():
    model = build(SHAPES["frames"])
    packed = InferenceModel(model)
    tokens, frames = inputs(SHAPES["frames"], 9, batch=3)
    whole, parts = model.new_cache(), []
    packed.hidden(tokens[:, :8], frames[:, :16], whole)
    for b in range(3):
        parts.append(model.new_cache())
        packed.hidden(tokens[b : b + 1, :8], frames[b : b + 1, :16], parts[b])
    newest = tokens[:, 8:], frames[:, 16:]
    joined = packed.hidden(*newest, Cache.join(parts))
    torch.testing.assert_close(joined, packed.hidden(*newest, whole))
    parts[0].position += 1
    with pytest.raises(ValueError, match="equal length"):
        Cache.join(parts)


@torch.inference_mode()
def test_packed_fine_codes_are_those_of_the_head():
    model = build(HYBRID)
    hidden = torch.randn(4, HYBRID.width)
    coarse = torch.tensor([3, 1023, 0, 512])
    seen: list[list[torch.Tensor]] = [[], []]

    def draw_into(logits_seen):
        def draw(logits):
            logits_seen.append(logits)
            return logits.argmax(1)

        return draw

    expected = model.fine.sample(hidden, coarse, draw_into(seen[0]))
    got = InferenceModel(model).sample_fine(hidden, coarse, draw_into(seen[1]))
    assert torch.equal(got, expected) and got.shape == (4, 3)
    for ours, plain in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    without = InferenceModel(build(SHAPES["tokens"]))
    assert without.sample_fine(torch.zeros(2, 128), coarse[:2], torch.argmax).shape == (2, 0)


@torch.inference_mode()
def test_packed_cache_of_a_windowed_model_stops_growing():
    shape = SHAPES["window"]
    packed, cache = InferenceModel(build(shape)), build(shape).new_cache()
    tokens, frames = inputs(shape, 1, batch=1)
    sizes = []
    for _ in range(700):
        packed.hidden(tokens, frames, cache)
        sizes.append(cache.n_bytes)
    assert len(set(sizes)) == 1
    for layer in (*cache.layers, *cache.mel_layers):
        assert layer._end - layer._start <= shape.window_steps


def test_rotary_table_keeps_its_phase_after_hours():
    """Position 1e6 is 3.7 h of sound. Angles formed in float32 would be off by up to 0.03 rad."""
    table = RotaryTable(64, 10_000.0, torch.zeros(1))
    for start in (0, 1000, 1020, 1_000_000, 1_000_001, 77):
        rates = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        angles = torch.outer(torch.arange(start, start + 8, dtype=torch.float64), rates)
        got = table(start, 8)[:, 0]
        assert got.dtype == torch.complex64
        torch.testing.assert_close(got.real.double(), angles.cos(), rtol=0, atol=1e-7)
        torch.testing.assert_close(got.imag.double(), angles.sin(), rtol=0, atol=1e-7)
    coarse = torch.outer(torch.tensor([1_000_000.0]), rates.float())
    exact = torch.outer(torch.tensor([1_000_000.0], dtype=torch.float64), rates)
    assert (coarse.cos().double() - exact.cos()).abs().max() > 1e-3
