"""flash_attention's forward kernels on the emulator against float64."""

import math

import pytest
import torch
from attention_cases import DTYPES, check_rows, forward, inputs, reference


def check(emu, b, tq, tk, h, d, dtype, causal, window, **kwargs):
    q, k, v = inputs(emu, b, tq, tk, h, d, dtype, **kwargs)
    scale = d**-0.5
    out, lse = forward(emu, q, k, v, scale, causal, window)
    check_rows([out], q, k, v, scale, causal, window)
    _, expected_lse = reference(q.double(), k.double(), v.double(), scale, causal, window)
    assert (lse.double() - expected_lse).abs().max() <= 1e-5 * max(1, expected_lse.abs().max())
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("t", [1, 5, 33, 64, 65, 127, 129])
def test_causal_forward(built, t, d, dtype):
    built.reset(("random", "mixed", t))
    check(built, 1, t, t, 2, d, dtype, True, 0)


@pytest.mark.parametrize(
    "causal,window", [(True, 0), (True, 1), (True, 20), (False, 0), (False, 17)]
)
@pytest.mark.parametrize("tq,tk", [(70, 70), (7, 90), (3, 300), (1, 1), (1, 600)])
def test_forward_sees_the_right_keys(emu, tq, tk, causal, window):
    check(emu, 1, tq, tk, 1, 32, torch.bfloat16, causal, window)
    check(emu, 1, tq, tk, 1, 32, torch.float32, causal, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tq", [2, 20])
def test_rows_that_are_not_aligned_to_16_bytes(emu, tq, dtype):
    check(emu, 2, tq, 33, 2, 32, dtype, True, 0, pad=1)


@pytest.mark.parametrize("gain", [30.0, 1e-3])
@pytest.mark.parametrize("tq", [1, 40])
def test_extreme_scores_stay_finite(emu, tq, gain):
    out = check(emu, 1, tq, 70, 1, 64, torch.bfloat16, True, 0, gain=gain)
    assert out.isfinite().all()


def test_strongly_negative_scores(emu):
    q, k, v = inputs(emu, 1, 65, 65, 1, 32, torch.bfloat16)
    q.fill_(8.0)
    k.fill_(-8.0)
    out, lse = forward(emu, q, k, v, 1.0)
    _, expected_lse = reference(q.double(), k.double(), v.double(), 1.0, True, 0)
    assert out.isfinite().all()
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-6)


def test_no_bank_conflicts_in_16_bit_tiles(built):
    for d in (32, 64, 128):
        built.reset()
        check(built, 1, 130, 130, 1, d, torch.bfloat16, True, 0)
        counters = built.counters()
        assert counters["mmas"] > 0 and counters["bank_conflicts"] == 0


def test_bits_do_not_depend_on_the_order(built):
    results = []
    for seed in range(3):
        built.reset(("random", "mixed", seed))
        q, k, v = inputs(built, 1, 100, 100, 2, 32, torch.bfloat16)
        results.append([x.clone() for x in forward(built, q, k, v, 0.2)])
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_what_cuda_refuses(built):
    built.reset()
    q, k, v = inputs(built, 1, 4, 4, 1, 32, torch.float32)
    for bad, message in [
        (dict(scale=-1.0), "scale > 0"),
        (dict(scale=math.nan), "scale > 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            forward(built, q, k, v, **bad)
    with pytest.raises(RuntimeError, match="at most as many queries"):
        forward(built, q, k[:, :2], v[:, :2], 1.0)
    with pytest.raises(RuntimeError, match="head_dim"):
        forward(built, q[..., :16], k[..., :16], v[..., :16], 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_window_that_leaves_tiles_out_on_both_sides(built, d, dtype):
    built.reset()
    check(built, 2, 130, 150, 1, d, dtype, False, 33)


@pytest.mark.parametrize(
    "d,dtype,rows",
    [(32, torch.bfloat16, 128), (64, torch.float16, 128), (128, torch.bfloat16, 64)]
    + [(d, torch.float32, 64) for d in (32, 64, 128)],
)
def test_blocks_cover_the_rows_once(built, d, dtype, rows):
    built.reset()
    for steps in (rows, rows + 1):
        with built.recorded() as launches:
            forward(built, *inputs(built, 1, steps, steps, 2, d, dtype), 0.2)
        (launch,) = launches
        assert launch.block == (128, 1, 1) and launch.grid == (2 * -(-steps // rows), 1, 1)


def test_offsets_beyond_32_bits(emu):
    """Batches more than 2^31 elements apart; only the pages that are used exist."""
    stride, t, d = (1 << 31) + 64, 20, 32
    views = []
    for seed in range(3):
        whole = emu.empty((stride + t * d,), torch.bfloat16)
        view = whole.as_strided((2, t, 1, d), (stride, d, d, 1))
        g = torch.Generator().manual_seed(seed)
        views.append(view.copy_(torch.randn(2, t, 1, d, generator=g)))
    out, _ = forward(emu, *views, 0.2)
    check_rows([out], *views, 0.2)
