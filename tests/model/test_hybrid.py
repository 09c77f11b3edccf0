"""The model: same logits with and without the cache, a window that forgets, folders that load."""

import dataclasses
import json
import math

import pytest
import torch
from waking import awake

from wgpt.config import ModelConfig
from wgpt.errors import ConfigError
from wgpt.files import read_json
from wgpt.model import HybridModel, presets

SMALL = ModelConfig(
    token_dim=32,
    mel_dim=32,
    n_layers=2,
    n_mel_layers=1,
    head_dim=32,
    ffn_dim=64,
    mel_ffn_dim=48,
    codebook_size=50,
    n_mels=8,
)
SHAPES = {
    "hybrid": SMALL,
    "tokens": dataclasses.replace(SMALL, token_dim=64, mel_dim=0),
    "mel only": dataclasses.replace(SMALL, token_dim=0, mel_dim=64),
    "frames": dataclasses.replace(SMALL, frames_per_step=2, mel_context_frames=4),
    "window": dataclasses.replace(SMALL, window_steps=7),
    "window and frames": dataclasses.replace(SMALL, window_steps=5, mel_context_frames=3),
}


def build(shape: ModelConfig, seed: int = 0) -> HybridModel:
    torch.manual_seed(seed)
    return awake(HybridModel(shape)).eval()


def inputs(shape: ModelConfig, steps: int, batch: int = 2):
    generator = torch.Generator().manual_seed(steps)
    tokens = torch.randint(0, shape.codebook_size + 1, (batch, steps), generator=generator)
    if not shape.mel_dim:
        return tokens, None
    n_frames = steps * shape.frames_per_step
    return tokens, torch.randn(batch, n_frames, shape.n_mels, generator=generator)


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_model_cached_logits_equal_an_uncached_pass(name):
    shape, steps = SHAPES[name], 41
    model = build(shape)
    tokens, frames = inputs(shape, steps)
    whole = model(tokens, frames)
    cache, parts, position = model.new_cache(), [], 0
    for n in (1, 1, 9, 1, 2, 16, 1, 10):  # one by one and in chunks
        r = shape.frames_per_step
        piece = frames[:, position * r : (position + n) * r] if frames is not None else None
        parts.append(model(tokens[:, position : position + n], piece, cache))
        position += n
    assert position == steps
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_model_window_bounds_memory_and_reach():
    shape = SHAPES["window"]
    model = build(shape)
    cache = model.new_cache()
    sizes = []
    for _ in range(40):
        tokens, frames = inputs(shape, 64)
        model(tokens, frames, cache)
        sizes.append(cache.n_bytes)
    assert sizes[-1] == sizes[10], "the cache of a windowed model must stop growing"
    # Each of n layers passes on window - 1 steps: what is further back cannot matter.
    tokens, frames = inputs(shape, 60)
    reach = (shape.n_layers + shape.n_mel_layers) * (shape.window_steps - 1)
    other_tokens, other_frames = tokens.clone(), frames.clone()
    other_tokens[:, : 59 - reach] = 3
    other_frames[:, : 59 - reach] = 1.0
    assert torch.equal(model(tokens, frames)[:, -1], model(other_tokens, other_frames)[:, -1])
    other_frames[:, 59 - shape.window_steps + 1] = 9.0
    assert not torch.equal(model(tokens, frames)[:, -1], model(other_tokens, other_frames)[:, -1])


@pytest.mark.parametrize("name", SHAPES)
def test_model_every_parameter_gets_a_gradient(name):
    shape = SHAPES[name]
    model = build(shape).train()
    tokens, frames = inputs(shape, 24)
    model.loss(tokens, frames, torch.randint(0, shape.codebook_size, tokens.shape)).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


def test_model_starts_near_uniform_and_overfits_one_batch():
    shape = SHAPES["hybrid"]
    model = build(shape).train()
    tokens, frames = inputs(shape, 32)
    targets = torch.randint(0, shape.codebook_size, tokens.shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model.loss(tokens, frames, targets)
    assert abs(first.item() - math.log(shape.codebook_size)) < 0.4
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss(tokens, frames, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(("batch", "steps"), [(1, 0), (0, 5), (0, 0)])
def test_model_takes_nothing(batch, steps):
    for name in ("hybrid-xs", "gpt-xs"):
        model = HybridModel(presets.preset(name))
        tokens, frames = torch.zeros(batch, steps, dtype=torch.long), torch.zeros(batch, steps, 64)
        logits = model(tokens, frames if model.config.mel_dim else None)
        assert logits.shape == (batch, steps, 1024)
        logits.sum().backward()


def test_model_ignored_targets_do_not_count():
    shape = SHAPES["tokens"]
    model = build(shape)
    tokens, _ = inputs(shape, 10)
    targets = tokens.clamp(max=shape.codebook_size - 1)
    half = targets.clone()
    half[:, 5:] = -1
    expected = model.loss(tokens[:, :5], None, targets[:, :5])
    torch.testing.assert_close(model.loss(tokens, None, half), expected)


def test_model_mel_normalisation_is_applied_and_saved(tmp_path):
    shape = SHAPES["hybrid"]
    plain, constants = build(shape), build(shape)
    mean, inv_std = torch.full((8,), 2.0), torch.full((8,), 0.5)
    constants.set_mel_normalisation(mean, inv_std)
    tokens, frames = inputs(shape, 12)
    torch.testing.assert_close(plain(tokens, (frames - 2.0) * 0.5), constants(tokens, frames))
    constants.save_pretrained(tmp_path)
    again = HybridModel.from_pretrained(tmp_path)
    assert torch.equal(again(tokens, frames), constants(tokens, frames))


def test_model_folder_errors_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        HybridModel.from_pretrained(tmp_path)
    build(SMALL).save_pretrained(tmp_path)
    description = read_json(tmp_path / "config.json")
    description["model"]["ffn_dim"] = 65
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"model\.safetensors: does not hold this model"):
        HybridModel.from_pretrained(tmp_path)
    build(SMALL).save_pretrained(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-9] ^= 4
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors: sha256 must be"):
        HybridModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected the format"):
        HybridModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "frames", "words"),
    [
        (torch.zeros(3, dtype=torch.long), None, r"tokens must be \(B, T\)"),
        (torch.zeros(1, 3, dtype=torch.long), None, r"frames must be .* got None"),
        (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4, 8), r"\(1, 3, 8\).*\(1, 4, 8\)"),
    ],
)
def test_model_refuses_inputs_that_do_not_fit(tokens, frames, words):
    with pytest.raises(ValueError, match=words):
        build(SMALL)(tokens, frames)


@torch.inference_mode()
def test_model_accounting_agrees_with_what_happens():
    shape = dataclasses.replace(presets.preset("hybrid-xs"), n_layers=3)
    model = build(shape)
    tokens, frames = inputs(shape, 64, batch=1)
    cache = model.new_cache()
    model(tokens, frames, cache)
    held = sum(k.numel() + v.numel() for k, v in (
        layer.append(torch.zeros(1, 0, 2, heads, 32))
        for layer, heads in [*((m, 2) for m in cache.mel_layers), *((m, 4) for m in cache.layers)]
    ))  # fmt: skip
    assert held * 4 == 64 * model.cache_bytes_per_step()
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(tokens, frames)
    assert model.flops_per_step(64) * 64 == counter.get_total_flops()
    windowed = build(dataclasses.replace(shape, window_steps=8))
    with FlopCounterMode(display=False) as counter:
        windowed(tokens, frames)
    assert windowed.flops_per_step(64) * 64 == counter.get_total_flops()
    assert windowed.flops_per_step(64) < model.flops_per_step(64)
