"""Packed clips never hear each other: attention, mel context and latents stop at the border."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from waking import awake

from wgpt.config import ModelConfig
from wgpt.data.batches import collate
from wgpt.data.dataset import Split
from wgpt.data.packing import Segment
from wgpt.model import HybridModel, presets

LENGTHS = (9, 5, 40, 1, 7)
N_CODEBOOKS = 3


def split_with(seed: int, changed: int | None = None, r: int = 2) -> Split:
    """Random clips; those of clip `changed` are drawn from another seed."""

    def clip(index: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed + 100 * (index == changed), index])
        tokens = rng.integers(0, 1024, (n, N_CODEBOOKS)).astype(np.uint16)
        return tokens, rng.normal(-4, 3, (n * r, 64)).astype(np.float16)

    tokens, mel = zip(*(clip(i, n) for i, n in enumerate(LENGTHS)), strict=True)
    return Split(
        name="train",
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *LENGTHS]),
        mel={"wave": np.concatenate(mel)},
        groups=["."] * len(LENGTHS),
        frames_per_step=r,
        codebook_size=1024,
        silence=-11.5,
    )


def build(**changes) -> HybridModel:
    shape = dataclasses.replace(
        presets.preset("hybrid-xs"), n_layers=2, n_mel_layers=1, frames_per_step=2,
        mel_context_frames=6, end_of_clip=True, n_fine=2, fine_dim=32, fine_ffn_dim=32,
        latent_steps=4, latent_dim=8, latent_hidden=32, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = awake(HybridModel(shape)).eval()
    model.set_codebooks(torch.randn(N_CODEBOOKS, 1024, 8))
    model.set_mel_normalisation(torch.full((64,), -4.0), torch.full((64,), 0.3))
    with torch.no_grad():
        model.latent.down.weight.normal_(0, 0.1)
        model.latent.up.bias.normal_(0, 0.3)
    return model


# Three whole clips, the middle of a long one (itself cut), and the beginning of another.
ROW = [Segment(0, 0, 10, 0), Segment(1, 0, 6, 0), Segment(2, 20, 33, 20), Segment(3, 0, 2, 0),
       Segment(4, 0, 6, 0)]  # fmt: skip
BORDERS = np.cumsum([0, *(s.stop - s.start for s in ROW)])


def batch_of(split, rows=(ROW,)):
    return collate(split, rows, mel_source="wave", codebooks=N_CODEBOOKS, n_fine=2)


@torch.inference_mode()
def logits_of(model, batch):
    """(B, T, V + 1), with the finer logits behind: all a position has to say."""
    hidden = model.hidden(batch.tokens, batch.frames, first_key=batch.first_key)
    fine = model.fine(hidden, batch.codes).transpose(1, 2).flatten(2)
    return torch.cat([model.head(hidden), fine], 2)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("changed", range(len(ROW)))
def test_changing_one_clip_leaves_its_neighbours_bits(changed, window):
    model = build(window_steps=window)
    before = logits_of(model, batch_of(split_with(0)))[0]
    after = logits_of(model, batch_of(split_with(0, changed)))[0]
    for place, (start, stop) in enumerate(itertools.pairwise(BORDERS)):
        same = torch.equal(before[start:stop], after[start:stop])
        assert same == (place != changed), place


@pytest.mark.parametrize("window", [0, 5])
def test_a_packed_clip_gives_what_it_gives_alone(window):
    model, split = build(window_steps=window), split_with(0)
    packed = logits_of(model, batch_of(split))[0]
    for place, segment in enumerate(ROW):
        alone = logits_of(model, batch_of(split, [[segment]]))[0]
        got = packed[BORDERS[place] : BORDERS[place + 1]]
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=2e-4)


def test_each_way_over_the_border_is_closed(monkeypatch):
    """The test above would see any of them: with one left open, clip 1 hears clip 0."""

    def neighbours_differ(model) -> bool:
        before, after = (logits_of(model, batch_of(split_with(0, c)))[0] for c in (None, 0))
        return not torch.equal(before[BORDERS[1] : BORDERS[2]], after[BORDERS[1] : BORDERS[2]])

    from wgpt import ops
    from wgpt.model.fusion import MelBranch
    from wgpt.model.latent import LatentHistory

    assert not neighbours_differ(build())
    attention, history = ops.flash_attention, LatentHistory.history
    leaks = [
        (ops, "flash_attention", lambda *a, first_key=None, **k: attention(*a, **k)),
        (LatentHistory, "history", lambda self, t, c, f=None: history(self, t, c)),
        (MelBranch, "_embed_apart", lambda self, f, k: self._embed(f)),
    ]
    for owner, name, leak in leaks:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, leak)
            assert neighbours_differ(build()), name


def test_packed_gradients_are_those_of_the_clips_apart():
    model, split = build(), split_with(0)

    def gradients(rows):
        batch = batch_of(split, rows)
        hidden = model.hidden(batch.tokens, batch.frames, first_key=batch.first_key)
        loss, _ = model.score(hidden, batch.targets)
        nll, _ = model.fine.nll(hidden, batch.codes)
        model.zero_grad()
        (loss + nll.sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    packed, alone = gradients([ROW]), gradients([[segment] for segment in ROW])
    for name, value in packed.items():
        error = (value - alone[name]).abs().max() / alone[name].abs().max().clamp(min=1e-6)
        assert error < 1e-4, name


def test_end_of_clip_is_one_output_more():
    model = build()
    assert model.end_token == 1024 == model.config.bos_token
    assert model.head.out_features == 1025
    plain = HybridModel(ModelConfig())
    assert plain.end_token is None and plain.head.out_features == 1024
    batch = batch_of(split_with(0))
    assert batch.targets[0, BORDERS[1] - 1] == 1024
    with torch.no_grad():  # it can be learnt: the target has a logit
        loss, _ = model.score(torch.zeros(1, 1, 128), torch.tensor([[1024]]))
    assert loss.item() == pytest.approx(np.log(1025), rel=1e-5)


def test_a_cache_holds_one_clip():
    model, batch = build(), batch_of(split_with(0))
    with pytest.raises(ValueError, match="first_key must be None with a cache"):
        model(batch.tokens, batch.frames, model.new_cache(), batch.first_key)
