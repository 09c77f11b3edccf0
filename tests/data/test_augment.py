"""Mel noise and drops: the promised amounts, row by row, and nothing when they are zero."""

import numpy as np
import pytest
import torch

from wgpt.data.augment import MelAugment, _stream, scored_steps

MEAN, INV_STD = torch.tensor([-3.0, 1.0, 4.0]), torch.tensor([0.5, 1.0, 2.0])


def augmented(n_steps: int, r: int = 1, seed: int = 0, step: int = 0, row: int = 0, **amounts):
    """Frames of ones, augmented, and normalised as the model does."""
    frames = torch.ones(n_steps * r, 3)
    MelAugment(MEAN, INV_STD, **amounts).apply(frames, r, seed, step, row)
    return (frames - MEAN) * INV_STD


def test_noise_is_in_units_of_the_normalised_mel():
    clean = (torch.ones(3) - MEAN) * INV_STD
    noise = augmented(20_000, noise=0.3) - clean
    torch.testing.assert_close(noise.std(0), torch.full((3,), 0.3), rtol=0.02, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(3), rtol=0, atol=0.01)


@pytest.mark.parametrize("span", [1, 4, 15])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_drop_takes_the_promised_share_in_spans(share, span):
    r = 2
    out = augmented(40_000, r, drop=share, drop_span_steps=span).view(-1, r, 3)
    dropped = (out == 0).all(-1)
    assert torch.equal(dropped[:, 0], dropped[:, 1])  # all frames of a step together
    gone = dropped[:, 0].numpy()
    assert gone.mean() == pytest.approx(share, rel=0.1)
    edges = np.flatnonzero(np.diff(gone.astype(int), prepend=0, append=0))
    lengths = edges[1::2] - edges[::2]
    inside = lengths[1:-1]  # the first and last may be cut by the row's ends
    assert inside.min() == span
    kept = out[~dropped[:, 0]]
    assert (kept != 0).any(-1).all()


def test_nothing_is_changed_by_zero_amounts():
    frames = torch.randn(10, 3)
    before = frames.clone()
    MelAugment(MEAN, INV_STD).apply(frames, 1, seed=0, step=0, row=0)
    assert torch.equal(frames, before)


def test_rows_steps_and_seeds_differ_and_each_repeats():
    amounts = {"noise": 1.0, "drop": 0.5}
    base = augmented(50, **amounts)
    assert torch.equal(augmented(50, **amounts), base)
    for change in ({"seed": 1}, {"step": 1}, {"row": 1}):
        other = augmented(50, **change, **amounts)
        assert not torch.equal(other == 0, base == 0), change
        assert not torch.equal(other, base), change
    # Adding the drop leaves the noise of the kept steps as it was.
    noisy = augmented(50, noise=1.0)
    kept = (base != 0).any(-1)
    assert 0 < kept.sum() < 50
    assert torch.equal(base[kept], noisy[kept])


def test_purposes_have_streams_of_their_own():
    windows = np.random.Generator(np.random.Philox(key=np.array([5, 6], dtype=np.uint64)))
    drawn = [windows.random(8), *(_stream(5, 6, 0, purpose).random(8) for purpose in (1, 2, 3))]
    assert len(np.unique(np.stack(drawn))) == 32


def test_scored_steps_are_a_share_without_repeats_row_by_row():
    chosen = scored_steps(100, 0.125, seed=3, step=7, rows=range(4))
    assert chosen.shape == (4, 12) and chosen.dtype == torch.int64
    assert all(len(set(row.tolist())) == 12 and 0 <= min(row) <= max(row) < 100 for row in chosen)
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[2:], scored_steps(100, 0.125, seed=3, step=7, rows=range(2, 4)))
    assert not torch.equal(chosen, scored_steps(100, 0.125, seed=3, step=8, rows=range(4)))
    assert scored_steps(5, 1.0, 0, 0, range(1)).tolist() == [[0, 1, 2, 3, 4]]
    assert scored_steps(5, 0.01, 0, 0, range(1)).shape == (1, 1)
    drawn = torch.cat([scored_steps(20, 0.25, 0, step, range(8)) for step in range(100)])
    counts = drawn.flatten().bincount(minlength=20)
    assert counts.min() > 150 and counts.max() < 250  # evenly: 200 each
