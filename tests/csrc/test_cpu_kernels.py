"""The CPU kernels' own corners: block and tile edges, work splits, hostile numbers, targets."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_cases import Call, assert_same_bits, attention_call, check_accuracy, mel_call, run
from torch import Tensor

from wgpt import ops

TARGETS = ops.info()["cpu_targets"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, restore_cpu_target: None) -> str:
    ops.set_cpu_target(request.param)
    return request.param


# ---- edges of blocks (192 keys), tiles (24 and 48 queries), groups (6), strips and vectors


@pytest.mark.parametrize("steps", [6, 23, 24, 25, 48, 65, 191, 192, 193, 385])
def test_attention_holds_at_block_edges(steps: int, target: str) -> None:
    check_accuracy(attention_call(1, steps, heads=1, head_dim=32))


@pytest.mark.parametrize("window", [1, 5, 64, 191, 192, 193, 400])
def test_attention_windows_hold_at_block_edges(window: int, target: str) -> None:
    check_accuracy(attention_call(1, 405, heads=1, head_dim=32, window=window))


@pytest.mark.parametrize("q_steps", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_equals_the_last_rows_of_the_whole(
    dtype: torch.dtype, window: int, q_steps: int, target: str
) -> None:
    whole = attention_call(2, 1100, heads=2, head_dim=64, dtype=dtype, window=window)
    out, lse = whole.op(*whole.tensors.values(), **whole.options)
    q, k, v = whole.tensors.values()
    last_out, last_lse = whole.op(q[:, -q_steps:], k, v, **whole.options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(last_out, out[:, -q_steps:], rtol=4 * eps, atol=8 * eps)
    torch.testing.assert_close(last_lse, lse[:, :, -q_steps:], rtol=1e-3 * eps**0.5, atol=4e-4)


def test_long_sums_are_as_accurate_as_torchs(target: str) -> None:
    """dk and dv of the first keys sum over every query: in pieces, not in one float."""
    q, k, v, d_out = (torch.randn(1, 4000, 1, 32) for _ in range(4))

    def gradients(attend, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, d_out.to(dtype))

    def sdpa(*tensors: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in tensors)
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    exact = gradients(sdpa, torch.float64)
    ours, torchs = gradients(ops.flash_attention, torch.float32), gradients(sdpa, torch.float32)
    for name, a, b, e in zip("qkv", ours, torchs, exact, strict=True):
        error, reference = ((x.double() - e).norm() / e.norm() for x in (a, b))
        assert error <= 2 * reference, f"d{name}: {error:.2e}, torch {reference:.2e}"


# ---- the same bits whatever the split


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_steps, heads", [(450, 1), (450, 2), (450, 5), (1700, 1), (1700, 3)])
def test_backward_gives_the_same_bits_however_it_is_split(
    heads: int, kv_steps: int, dtype: torch.dtype, target: str, restore_threads: None
) -> None:
    """Fewer heads than threads could use: by parts of the keys, which have a dq each, or by blocks
    of keys and then chunks of queries."""
    call = attention_call(1, 430, kv_steps, heads=heads, head_dim=32, dtype=dtype)
    torch.set_num_threads(1)
    alone = run(call.op, call)
    for n_threads in (2, 4, 7, 16):
        torch.set_num_threads(n_threads)
        assert_same_bits(alone, run(call.op, call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_fused_projection_give_the_bits_of_copies(
    dtype: torch.dtype, target: str
) -> None:
    fused = torch.randn(2, 77, 3 * 2 * 64).to(dtype)
    views = [x.unflatten(-1, (2, 64)) for x in fused.chunk(3, dim=-1)]
    odd = torch.randn(2, 77, 3, 2, 65).to(dtype)[..., :64]  # rows that start at odd elements
    for q, k, v in (views, odd.unbind(2)):
        call = Call("flash_attention", {"q": q, "k": k, "v": v}, ("q", "k", "v"), {})
        copies = {name: x.contiguous() for name, x in call.tensors.items()}
        assert_same_bits(
            run(call.op, call), run(call.op, Call(call.name, copies, call.parameters, {}))
        )


# ---- hostile numbers


def rising(call: Call, slope: float) -> Call:
    """Scores that rise along the keys by `slope` a key: every block has a new maximum."""
    q, k = call.tensors["q"], call.tensors["k"]
    q.zero_()[..., 0] = 1
    k[..., 0] = torch.arange(k.shape[1]).view(1, -1, 1) * slope * k.shape[-1] ** 0.5
    return call


@pytest.mark.parametrize("slope", [0.05, 0.3, -0.3, 0.6, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rising_and_falling_scores_are_as_accurate_as_torch(
    dtype: torch.dtype, slope: float, target: str
) -> None:
    check_accuracy(rising(attention_call(1, 260, heads=1, head_dim=32, dtype=dtype), slope))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_leaves_the_callers_subnormal_numbers_alone(
    dtype: torch.dtype, target: str
) -> None:
    """It flushes its own to zero while it runs: rising scores leave weights that small behind."""
    call = rising(attention_call(1, 260, heads=1, head_dim=32, dtype=dtype), 0.6)
    run(call.op, call)
    small = torch.full((64,), 2e-38) * torch.full((64,), 0.25)
    assert (small > 0).all()


@pytest.mark.parametrize("scale", [1e-6, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale_is_as_accurate_as_torch(dtype: torch.dtype, scale: float, target: str) -> None:
    check_accuracy(attention_call(1, 90, heads=1, head_dim=32, dtype=dtype, scale=scale))


@pytest.mark.parametrize("factor", [3e2, 1e4, 1e7, 1e9, 1e10, -1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_large_key_is_as_accurate_as_torch(
    dtype: torch.dtype, factor: float, target: str
) -> None:
    """Scores that float32 holds, but no difference of rounded ones: rows with and without them."""
    call = attention_call(2, 70, heads=1, head_dim=32, dtype=dtype)
    call.tensors["k"][0, 5] *= factor
    call.tensors["k"][1, 40] *= factor
    check_accuracy(call, rows=True)


@pytest.mark.parametrize("kv_steps, heads", [(70, 2), (450, 1)])
@pytest.mark.parametrize("score", [1e3, 1e5, 3e7, 3e9, 1e15])
def test_equal_large_scores_share_the_weight(
    score: float, kv_steps: int, heads: int, target: str
) -> None:
    """lse = score + log n, of which float32 holds only the score. Head 0 has them all positive."""
    call = attention_call(1, 70, kv_steps, heads=heads, head_dim=32, scale=1.0)
    for name in ("q", "k"):
        call.tensors[name].zero_()[..., 0] = 1
    call.tensors["k"] *= score
    call.tensors["q"][:, :, 1:] *= -1
    values = run(call.op, call)
    n_keys = torch.arange(kv_steps - 69, kv_steps + 1).view(1, 70, 1, 1)
    mean = call.tensors["v"].double().cumsum(1)[:, -70:] / n_keys
    torch.testing.assert_close(values["y"].double(), mean, rtol=1e-5, atol=1e-6)
    check_accuracy(call, rows=True)


@pytest.mark.parametrize("q_steps", [1, 3, 40])
def test_scores_at_the_end_of_float32_are_numbers(q_steps: int, target: str) -> None:
    q, k, v = (torch.randn(1, 40, 1, 32) for _ in range(3))
    q.zero_()[..., 0], k[..., 0] = 1.0, -3.3e38
    k[:, 1, :, 0] = -1e38
    out = ops.flash_attention(q[:, -q_steps:], k, v, scale=1.0)
    torch.testing.assert_close(out[:, -1], v[:, 1], rtol=1e-6, atol=1e-6)


SPOILERS = {
    "q NaN": lambda q, k, v: q[0, 5, 0].fill_(NAN),
    "k NaN": lambda q, k, v: k[0, 5, 0].fill_(NAN),
    "q infinite": lambda q, k, v: q[0, 5, 0, 3:4].fill_(INF),
    "k infinite": lambda q, k, v: k[0, 5, 0, 3:4].fill_(INF),
    "v infinite": lambda q, k, v: v[0, 5, 0, 3:4].fill_(INF),
    "first keys at -infinity": lambda q, k, v: (q.abs_(), k[0, :5, 0, 3].fill_(-INF)),
    "a key at -infinity": lambda q, k, v: (q.abs_(), k[0, 70, 0, 3].fill_(-INF)),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_go_where_the_formula_sends_them(
    dtype: torch.dtype, spoiler: str, target: str
) -> None:
    """No more NaN than the T x T formula has, and none of its others fewer than the row's own."""
    q, k, v = (torch.randn(1, 200, 1, 32).to(dtype) for _ in range(3))
    SPOILERS[spoiler](q, k, v)
    out = ops.flash_attention(q, k, v)
    exact = ops.reference.flash_attention(q.double(), k.double(), v.double())
    assert not (out.isnan() & ~exact.isnan()).any()
    own = (q.isnan() | q.isinf()).any(-1, keepdim=True) | (exact.isnan().all(-1, keepdim=True))
    assert (out.isnan() | ~own).all()
    finite = out.isfinite() & exact.isfinite()
    assert (out.double() - exact)[finite].abs().max() < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_key_at_minus_infinity_are_as_finite_as_the_formula(
    dtype: torch.dtype, target: str
) -> None:
    """It has no weight, so only the channel in which it is multiplied by 0 is lost."""
    q, k, v, d_out = (torch.randn(1, 201, 1, 32).to(dtype) for _ in range(4))
    SPOILERS["a key at -infinity"](q, k, v)

    def gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, d_out.to(dtype))

    exact = gradients(ops.reference.flash_attention, torch.float64)
    for name, ours, e in zip("qkv", gradients(ops.flash_attention, dtype), exact, strict=True):
        assert not (ours.isnan() & ~e.isnan()).any(), f"d{name}"
        finite = e.isfinite()
        assert finite.any()
        assert (ours.double() - e)[finite].abs().max() < 0.03, f"d{name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_attention_depends_on_no_later_one(dtype: torch.dtype, target: str) -> None:
    """To the bit, though later rows of a group raise their maxima again and again."""
    q, k, v = (torch.randn(1, 300, 1, 64).to(dtype) for _ in range(3))
    rising = torch.linspace(0, 20, 300).view(1, -1, 1, 1).to(dtype)
    q[..., :1], k[..., :1] = 8, rising  # every row's scores rise along the keys
    out = ops.flash_attention(q, k, v)
    for t in (3, 64, 130, 201):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t:] = 20 * torch.randn_like(x[:, t:])
        assert torch.equal(ops.flash_attention(*changed)[:, :t], out[:, :t]), t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_an_earlier_call_does_not_come_back(dtype: torch.dtype, target: str) -> None:
    """Scratch is reused without being cleared: whatever an earlier call left must not be read."""
    makers = [
        lambda: attention_call(1, 450, heads=1, head_dim=32, dtype=dtype),
        lambda: attention_call(1, 3, 700, heads=1, head_dim=32, dtype=dtype),
        lambda: mel_call(1, 37, 33, 41, 1, 2, pos_rows=37, dtype=dtype),
        lambda: mel_call(1, 37, 64, 41, 1, 2, pos_rows=37, dtype=dtype),
    ]
    for make in makers:
        torch.manual_seed(7)
        call = make()
        clean = run(call.op, call)
        spoiled = {
            name: None if x is None else torch.full_like(x, NAN) for name, x in call.tensors.items()
        }
        run(call.op, Call(call.name, spoiled, call.parameters, call.options))
        assert_same_bits(clean, run(call.op, call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "steps, channels, frames_per_step, context_frames",
    [
        (99, 41, 1, 1),
        (194, 131, 1, 1),
        (193, 70, 1, 3),
        (401, 33, 1, 0),
        (97, 33, 3, 2),
        (101, 17, 2, 14),
    ],
)
def test_mel_embed_of_whole_vectors_is_as_accurate_as_torch(
    steps: int,
    channels: int,
    frames_per_step: int,
    context_frames: int,
    dtype: torch.dtype,
    target: str,
) -> None:
    """64 bins a frame: bfloat16 pairs (vdpbf16ps or AMX) where the target has them."""
    sizes = (2, steps, 64, channels, frames_per_step, context_frames)
    check_accuracy(mel_call(*sizes, pos_rows=steps, dtype=dtype))


@pytest.mark.parametrize("name", ["frames", "weight", "bias"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38], ids=str)
def test_mel_embed_answers_infinities_alike_on_every_target(
    name: str, value: float, target: str
) -> None:
    """Infinities and what overflows come out as in torch."""
    call = mel_call(2, 40, 64, 33, 1, 2, pos_rows=40)
    tensor = call.tensors[name]
    assert tensor is not None
    tensor.flatten()[tensor.numel() // 2] = value
    values = run(call.op, call)
    ops.set_cpu_target("generic")
    expected = run(call.op, call)
    torch.testing.assert_close(values, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mel_embed_gelu_holds_far_out(dtype: torch.dtype, target: str) -> None:
    """Pre-activations from -30 to 30 through an identity weight: both tails of the GELU."""
    z = torch.linspace(-30, 30, 997).view(1, -1, 1)
    zero, one = torch.zeros(1), torch.ones(1)
    weight = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    y = ops.mel_embed(z, zero, one, weight, zero.to(dtype))
    (slope,) = torch.autograd.grad(y.sum(), weight)
    exact_z = z.double().requires_grad_()
    exact = F.gelu(exact_z)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_z)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), exact.detach(), rtol=max(eps, 4e-7), atol=max(eps**2, 5e-7)
    )
    expected = (exact_slope * z.double()).sum().view(1, 1)
    torch.testing.assert_close(slope.double(), expected, rtol=max(2 * eps, 1e-5), atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mel_embed_gelu_of_what_is_not_finite_is_x_phi(dtype: torch.dtype, target: str) -> None:
    """Also far outside bfloat16's tables; in whole vectors and in the rest of a row."""
    bias = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0]).repeat(3).to(dtype)
    bias.requires_grad_()
    frames, zero, one = torch.zeros(1, 2, 1), torch.zeros(1), torch.ones(1)
    y = ops.mel_embed(frames, zero, one, torch.zeros(18, 1, dtype=dtype), bias)
    (slope,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert slope[bias.isnan()].isnan().all()
    expected = bias.detach().double() * torch.special.ndtr(bias.detach().double())
    torch.testing.assert_close(y.detach(), expected.to(dtype).expand(1, 2, -1), equal_nan=True)


def test_token_concat_sums_one_token_in_order(target: str) -> None:
    """Every step the same token: its gradient is the ordered float32 sum, all others are zero."""
    table = torch.randn(9, 5, requires_grad=True)
    d_y = torch.randn(3, 41, 5)
    y = ops.token_concat(torch.full((3, 41), 4), table)
    (d_table,) = torch.autograd.grad(y, table, d_y)
    expected = torch.zeros(5)
    for row in d_y.reshape(-1, 5):
        expected = expected + row
    assert torch.equal(d_table[4], expected)
    assert not d_table[[0, 1, 2, 3, 5, 6, 7, 8]].any()


# ---- targets


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd="/",  # the source tree has no _C and would shadow the installed package
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", TARGETS)
def test_environment_chooses_the_target(name: str) -> None:
    done = python("from wgpt import ops; print(ops.info()['cpu_target'])", WGPT_CPU_TARGET=name)
    assert done.stdout.strip() == name, done.stderr


def test_environment_with_an_unknown_target_is_refused() -> None:
    done = python("from wgpt import ops; ops.info()", WGPT_CPU_TARGET="mmx")
    assert done.returncode != 0
    assert "must be one of" in done.stderr and "got 'mmx'" in done.stderr
