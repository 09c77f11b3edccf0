"""The depth transformer: causal over codebooks, sampled as it was trained, silent when absent."""

import dataclasses
import math

import pytest
import torch
from waking import awake

from wgpt.config import ModelConfig
from wgpt.errors import ConfigError
from wgpt.files import read_json, write_sealed
from wgpt.model import HybridModel, presets

SMALL = ModelConfig(
    token_dim=32, mel_dim=32, n_layers=1, n_mel_layers=1, head_dim=32, ffn_dim=64, mel_ffn_dim=48,
    codebook_size=50, n_mels=8, n_fine=3, fine_dim=64, fine_ffn_dim=96,
)  # fmt: skip


def build(shape: ModelConfig = SMALL) -> HybridModel:
    torch.manual_seed(0)
    return awake(HybridModel(shape)).eval()


def case(batch: int = 2, steps: int = 5, shape: ModelConfig = SMALL):
    """Decoder states (B, T, C) and codes (B, 1 + n_fine, T)."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, steps, shape.width, generator=generator)
    codes = torch.randint(0, shape.codebook_size, (batch, 1 + shape.n_fine, steps),
                          generator=generator)  # fmt: skip
    return hidden, codes


@torch.inference_mode()
def test_fine_logits_depend_on_their_step_and_earlier_codebooks_alone():
    head = build().fine
    hidden, codes = case()
    before = head(hidden, codes)
    assert before.shape == (2, 3, 5, 50)
    for k in range(4):
        other = codes.clone()
        other[0, k, 2] = (other[0, k, 2] + 7) % 50
        changed = (head(hidden, other) != before).any(-1)
        expected = torch.zeros(2, 3, 5, dtype=torch.bool)
        expected[0, k:, 2] = True  # logits of codebook k + 1, at index k, and of the later ones
        assert torch.equal(changed, expected), k
    hidden[1, 3] += 1.0
    changed = (head(hidden, codes) != before).any(-1)
    assert changed[1, :, 3].all() and changed.sum() == 3


@torch.inference_mode()
def test_fine_sample_is_the_teacher_forced_argmax_of_its_own_codes():
    head = build().fine
    hidden, codes = case(batch=3)
    drawn = torch.stack(
        [head.sample(hidden[:, t], codes[:, 0, t], lambda logits: logits.argmax(-1))
         for t in range(5)], dim=2,
    )  # fmt: skip
    assert drawn.dtype == torch.int64 and drawn.shape == (3, 3, 5)
    again = head(hidden, torch.cat([codes[:, :1], drawn], dim=1)).argmax(-1)
    assert torch.equal(again, drawn)
    assert drawn.unique().numel() > 5  # awake, or this would say little


@torch.inference_mode()
def test_fine_sample_gives_draw_the_teacher_forced_logits():
    head = build().fine
    hidden, codes = case(batch=4, steps=1)
    seen = []

    def draw(logits):
        seen.append(logits)
        return codes[:, len(seen), 0]

    assert torch.equal(head.sample(hidden[:, 0], codes[:, 0, 0], draw), codes[:, 1:, 0])
    expected = head(hidden, codes)[:, :, 0]
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, rtol=0, atol=2e-5)


def test_fine_starts_near_uniform_and_overfits_one_batch():
    torch.manual_seed(0)
    head = HybridModel(SMALL).fine
    hidden, codes = case(batch=2, steps=8)
    nll, _ = head.nll(hidden, codes)
    assert nll.mean().item() == pytest.approx(math.log(50), abs=0.3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nll, hit = head.nll(hidden, codes)
        nll.mean().backward()
        optimizer.step()
    assert nll.mean().item() < 0.1 and hit.all()


def test_fine_every_parameter_gets_a_gradient():
    head = build().train().fine
    nll, _ = head.nll(*case(batch=8, steps=20))
    nll.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_fine_unknown_codes_are_not_scored():
    head = build().fine
    hidden, codes = case()
    whole, _ = head.nll(hidden, codes)
    codes[0, :, 4] = -1  # padding
    codes[1, 2, 0] = -1  # codebook 2 of one step: 3 is then not scored either
    nll, hit = head.nll(hidden, codes)
    unknown = torch.zeros(2, 3, 5, dtype=torch.bool)
    unknown[0, :, 4] = unknown[1, 1:, 0] = True
    assert torch.equal(head.known_targets(codes), ~unknown)
    assert torch.equal(nll, whole.masked_fill(unknown, 0.0))
    assert not hit[unknown].any()


def test_fine_refuses_codes_that_do_not_fit():
    hidden, codes = case()
    with pytest.raises(ValueError, match=r"\(B, 1 \+ n_fine, T\) = \(2, 4, 5\).*got \(2, 3, 5\)"):
        build().fine(hidden, codes[:, :3])


def test_fine_leaves_the_trunk_as_it_was():
    """The same seed draws the same trunk with and without a head; no head, no parameters."""
    torch.manual_seed(0)
    plain = HybridModel(dataclasses.replace(SMALL, n_fine=0))
    torch.manual_seed(0)
    fine = HybridModel(SMALL)
    assert plain.fine is None
    expected, got = plain.state_dict(), fine.state_dict()
    assert set(got) - set(expected) == {n for n in got if n.startswith("fine.")} != set()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    tokens, frames = torch.randint(0, 50, (2, 6)), torch.randn(2, 6, 8)
    assert torch.equal(plain(tokens, frames), fine(tokens, frames))
    assert torch.equal(plain(tokens, frames), plain.head(plain.hidden(tokens, frames)))


def test_fine_folders_load_and_older_ones_too(tmp_path):
    model = build()
    hidden, codes = case()
    model.save_pretrained(tmp_path / "fine")
    again = HybridModel.from_pretrained(tmp_path / "fine")
    assert torch.equal(again.fine(hidden, codes), model.fine(hidden, codes))
    plain = build(dataclasses.replace(SMALL, n_fine=0))
    plain.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    description = read_json(path)
    for name in [name for name in description["model"] if "fine" in name]:
        del description["model"][name]
    write_sealed(path, description)
    old = HybridModel.from_pretrained(tmp_path / "old")
    assert old.fine is None and old.config.n_fine == 0


@pytest.mark.parametrize(
    ("field", "value"), [("n_fine", -1), ("fine_dim", 0), ("fine_dim", 48), ("fine_head_dim", 16)]
)
def test_fine_config_error_names_the_field(field, value):
    with pytest.raises(ConfigError, match="fine_head_dim|" + field):
        ModelConfig(**{"n_fine": 7, field: value})


@torch.inference_mode()
def test_fine_flops_agree_with_what_happens():
    from torch.utils.flop_counter import FlopCounterMode

    shape = dataclasses.replace(presets.preset("gpt-xs"), n_fine=7, n_fine_layers=3)
    head = HybridModel(shape).fine
    hidden, codes = case(1, 16, shape)
    with FlopCounterMode(display=False) as counter:
        head(hidden, codes)
    assert head.flops_per_step() * 16 == counter.get_total_flops()
