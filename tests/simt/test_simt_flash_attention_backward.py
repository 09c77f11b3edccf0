"""flash_attention's backward kernels on the emulator against float64 autograd."""

import pytest
import torch
from attention_cases import DTYPES, backward, check_rows, forward, inputs


def check(emu, b, tq, tk, h, d, dtype, causal, window, with_d_lse=False, **kwargs):
    q, k, v = inputs(emu, b, tq, tk, h, d, dtype, **kwargs)
    (d_out,) = inputs(emu, b, tq, tk, h, d, dtype, seed=9, n=1, pad=kwargs.get("pad", 8))
    scale = d**-0.5
    d_lse = emu.tensor(torch.randn(b, h, tq)) if with_d_lse else None
    out, lse = forward(emu, q, k, v, scale, causal, window)
    got = backward(emu, q, k, v, out, lse, d_out, scale, causal, window, d_lse)
    check_rows([out, *got], q, k, v, scale, causal, window, d_out=d_out, d_lse=d_lse)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("t", [1, 33, 63, 65, 127, 129])
def test_causal_backward(built, t, d, dtype):
    built.reset(("random", "mixed", t))
    check(built, 1, t, t, 1, d, dtype, True, 0)


@pytest.mark.parametrize(
    "causal,window", [(True, 0), (True, 1), (True, 20), (False, 0), (False, 17)]
)
@pytest.mark.parametrize("tq,tk", [(70, 70), (7, 90), (1, 1)])
def test_backward_sees_the_right_keys(emu, tq, tk, causal, window):
    check(emu, 1, tq, tk, 1, 32, torch.bfloat16, causal, window)
    check(emu, 1, tq, tk, 1, 32, torch.float32, causal, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_heads_and_the_gradient_of_lse(emu, dtype):
    check(emu, 2, 33, 40, 3, 32, dtype, True, 0, with_d_lse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_aligned_to_16_bytes(emu, dtype):
    check(emu, 2, 20, 33, 2, 32, dtype, True, 0, pad=1)


@pytest.mark.parametrize("t", [63, 64, 65, 127, 128])
def test_gradients_are_finite_with_strongly_negative_scores(built, t):
    built.reset(("descending", "late", 1))
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v, d_out = inputs(built, 1, t, t, 1, 64, dtype, n=4)
        q.fill_(4.0)
        k.mul_(0.1).sub_(4.0)  # scores near -1024, lse far below -88
        out, lse = forward(built, q, k, v, 1.0)
        assert lse.max() < -88
        for grad in backward(built, q, k, v, out, lse, d_out, 1.0):
            assert grad.isfinite().all()


def test_bits_do_not_depend_on_the_order(built):
    results = []
    for seed in range(3):
        built.reset(("random", "mixed", seed))
        q, k, v, d_out = inputs(built, 1, 100, 100, 2, 32, torch.bfloat16, n=4)
        out, lse = forward(built, q, k, v, 0.2)
        results.append([x.clone() for x in backward(built, q, k, v, out, lse, d_out, 0.2)])
    for grads in results[1:]:
        assert all(map(torch.equal, grads, results[0]))


def test_no_bank_conflicts_in_16_bit_tiles(built):
    for d in (32, 64, 128):
        built.reset()
        check(built, 1, 130, 130, 1, d, torch.bfloat16, True, 0)
        counters = built.counters()
        assert counters["mmas"] > 0 and counters["bank_conflicts"] == 0
