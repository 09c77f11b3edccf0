"""flash_attention's CUDA kernels over packed documents, on the emulator: answers, bits, borders."""

from itertools import pairwise

import pytest
import torch
from attention_cases import DTYPES, backward, check_rows, forward, inputs

# Borders on both sides of every tile, and a second row with others.
LENGTHS = [[1, 2, 63, 64, 65, 35], [65, 1, 64, 35, 2, 63]]
STEPS = sum(LENGTHS[0])
BF16 = torch.bfloat16


def borders_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def first_key_of(lengths):
    return torch.stack(
        [torch.tensor(borders_of(row)[:-1]).repeat_interleave(torch.tensor(row)) for row in lengths]
    ).int()


def attend(emu, tensors, first_key, scale=0.2, causal=True, window=0):
    """out, lse, dq, dk, dv of q, k, v, d_out."""
    q, k, v, d_out = tensors
    out, lse = forward(emu, q, k, v, scale, causal, window, first_key)
    grads = backward(emu, q, k, v, out, lse, d_out, scale, causal, window, first_key=first_key)
    return [out, lse.transpose(1, 2), *grads]  # (B, T, ...) all


def check(emu, tensors, first_key, scale=0.2, causal=True, window=0):
    q, k, v, d_out = tensors
    out, _, *grads = attend(emu, tensors, first_key, scale, causal, window)
    check_rows([out, *grads], q, k, v, scale, causal, window, first_key, d_out)


def packed(emu, d=32, dtype=BF16):
    """q, k, v, d_out of LENGTHS in two heads."""
    return inputs(emu, 2, STEPS, STEPS, 2, d, dtype, n=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_documents_are_attended_to_apart(built, d, dtype):
    built.reset(("random", "mixed", d))
    check(built, packed(built, d, dtype), first_key_of(LENGTHS))


@pytest.mark.parametrize("causal,window", [(True, 0), (True, 20), (False, 0), (False, 17)])
@pytest.mark.parametrize("tq,tk", [(130, 130), (70, 150), (3, 300), (1, 600)])
def test_any_first_key_that_does_not_fall(emu, tq, tk, causal, window):
    """Not only documents; also a chunk and a decoded step against a key/value cache."""
    torch.manual_seed(tq)
    last = torch.arange(tq) + tk - tq
    first_key = torch.stack([torch.rand(tq) * last, last - 3 * torch.rand(tq)])
    first_key = first_key.sort(dim=1).values.int().clamp(min=0).minimum(last.int())
    q, k, v = inputs(emu, 2, tq, tk, 1, 32, BF16)
    (d_out,) = inputs(emu, 2, tq, tk, 1, 32, BF16, seed=9, n=1)
    check(emu, (q, k, v, d_out), first_key, 0.2, causal, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_document_gets_the_bits_that_it_gets_alone(built, dtype):
    built.reset()
    tensors = packed(built, 32, dtype)
    together = attend(built, tensors, first_key_of(LENGTHS))
    for b, lengths in enumerate(LENGTHS):
        for begin, end in pairwise(borders_of(lengths)):
            alone = attend(built, [x[b : b + 1, begin:end] for x in tensors], None)
            if end - begin <= 4:  # a call of so few queries takes another kernel
                continue
            for x, y in zip(alone, together, strict=True):
                assert torch.equal(x[0], y[b, begin:end]), (b, begin)


@pytest.mark.parametrize(
    "value,dtype",
    [(20.0, BF16), (float("nan"), BF16), (float("inf"), BF16), (float("nan"), torch.float32)],
    ids=str,
)
def test_a_document_does_not_reach_its_neighbours(emu, value, dtype):
    tensors = packed(emu, dtype=dtype)
    first_key = first_key_of(LENGTHS)
    before = attend(emu, tensors, first_key)
    for b, n in ((0, 2), (1, 1)):
        begin, end = borders_of(LENGTHS[b])[n : n + 2]
        changed = [emu.tensor(x) for x in tensors]
        for x in changed:
            x[b, begin:end] *= value
        after = attend(emu, changed, first_key)
        assert not torch.equal(after[0][b, begin:end], before[0][b, begin:end])
        for x, y in zip(after, before, strict=True):
            x[b, begin:end] = y[b, begin:end]
            assert torch.equal(x, y), (b, begin)


def work_of(emu, lengths, first_key=None):
    """The copies and mma of one row of documents, forward and backward."""
    emu.reset()
    steps = sum(lengths)
    tensors = inputs(emu, 1, steps, steps, 1, 32, BF16, n=4)
    attend(emu, tensors, first_key)
    counters = emu.counters()
    return counters["copies"], counters["mmas"]


def test_tiles_of_other_documents_are_not_visited(built):
    lengths = [128, 256, 128]  # whole blocks, which no other document shares
    alone = [work_of(built, [steps]) for steps in lengths]
    assert work_of(built, lengths, first_key_of([lengths])) == tuple(
        map(sum, zip(*alone, strict=True))
    )


@pytest.mark.slow
def test_eight_documents_are_a_fifth_of_the_work_of_one(built):
    """Of 1/8 of the pairs; the tiles of the diagonal make it more."""
    lengths = [128] * 8
    copies, mmas = work_of(built, lengths, first_key_of([lengths]))
    causal_copies, causal_mmas = work_of(built, [1024])
    assert mmas <= 0.2 * causal_mmas and copies <= 0.25 * causal_copies


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_long_document_beside_short_ones(built, dtype):
    built.reset(("interleaved", "mixed", 3))
    lengths = [[2, 1000, 1, 22]]
    check(built, inputs(built, 1, 1025, 1025, 1, 64, dtype, n=4), first_key_of(lengths))


def test_first_key_zero_gives_the_bits_of_causal(built):
    built.reset()
    tensors = packed(built)
    causal = attend(built, tensors, None)
    zero = attend(built, tensors, torch.zeros(2, STEPS, dtype=torch.int32))
    assert all(map(torch.equal, causal, zero))


def test_gradients_of_keys_that_nobody_sees_are_zero(built):
    built.reset()
    tensors = inputs(built, 1, 10, 150, 1, 32, BF16, n=3)
    tensors += inputs(built, 1, 10, 150, 1, 32, BF16, n=1, seed=3)
    for x in tensors[1:3]:
        x[:, :77] = float("nan")
    *_, dk, dv = attend(built, tensors, torch.full((1, 10), 77, dtype=torch.int32))
    for grad in (dk, dv):
        assert not grad[:, :77].any() and grad[:, 77:].any(-1).all()


@pytest.mark.parametrize("tq,tk", [(STEPS, STEPS), (70, 150), (3, 300)])
@pytest.mark.parametrize("values", ["too large", "negative", "falling"])
def test_first_keys_that_break_the_rules_read_nothing_out_of_bounds(emu, values, tq, tk):
    """The device cannot refuse them: nonsense comes out, but the emulator sees no bad access."""
    first_key = {
        "too large": torch.full((1, tq), 1 << 30),
        "negative": torch.full((1, tq), -(1 << 30)),
        "falling": (torch.arange(tq).flip(0) * 37 % tk)[None],
    }[values].int()
    tensors = inputs(emu, 1, tq, tk, 1, 32, BF16)
    tensors += inputs(emu, 1, tq, tk, 1, 32, BF16, n=1, seed=3)
    attend(emu, tensors, first_key)
