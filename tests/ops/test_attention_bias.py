"""flash_attention with a bias, a mask or softcap: answers, accuracy, torch's tools, refusals."""

import math
from typing import Any

import pytest
import torch
from op_cases import CPU_DTYPES, assert_same_bits, attention_call, check_accuracy, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wgpt import ops
from wgpt.errors import OpError

B, H = 2, 4


def bias_of(kind: str, q_steps: int, kv_steps: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    match kind:
        case "numbers":
            return numbers(q_steps, kv_steps)
        case "numbers of heads":
            return numbers(1, H, q_steps, kv_steps)
        case "float32":
            return numbers(B, H, q_steps, kv_steps).float()
        case "keys last but one":
            return numbers(B, 1, kv_steps, q_steps).transpose(2, 3)
        case "one a query":
            return numbers(1, 1, q_steps, 1)
        case "mask":
            return numbers(q_steps, kv_steps) > -0.5
        case "mask of items":
            return numbers(B, 1, q_steps, kv_steps) > -0.5
        case "mask of keys":
            return numbers(B, 1, 1, kv_steps) > -0.5
    raise KeyError(kind)


KINDS = [
    "numbers",
    "numbers of heads",
    "float32",
    "keys last but one",
    "one a query",
    "mask",
    "mask of items",
    "mask of keys",
]


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_as_accurate_as_torch(kind: str, dtype: torch.dtype) -> None:
    for q_steps, kv_steps, causal in ((61, 61, False), (30, 203, True), (2, 203, True)):
        bias = bias_of(kind, q_steps, kv_steps, dtype)
        check_accuracy(
            attention_call(
                B, q_steps, kv_steps, H, 32, kv_heads=2, dtype=dtype, causal=causal, bias=bias
            ),
            rows=True,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_bias_over_several_blocks_of_queries_is_as_accurate_as_torch(
    dtype: torch.dtype,
) -> None:
    """lse near 110: the backward computes such rows' facts again, from biased scores."""
    bias = 100 + 3 * bias_of("numbers", 203, 203, dtype)
    call = attention_call(1, 203, heads=2, dtype=dtype, causal=False, bias=bias)
    check_accuracy(call, rows=True)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.3, 20.0])  # 0.3 is no float32
def test_softcap_is_as_accurate_as_torch(softcap: float, dtype: torch.dtype) -> None:
    for steps, options in ((61, {"causal": False}), (203, {"window": 40}), (2, {})):
        call = attention_call(1, steps, 203, 2, 32, dtype=dtype, softcap=softcap, **options)
        call.tensors["q"] *= 3  # type: ignore[operator]
        # bfloat16 weights are rounded, their sum is not: out of a row that one key rules is off by
        # 2^-9 in every channel alike, and d_out . out with it.
        check_accuracy(call, rows=dtype != torch.bfloat16)


def test_softcap_comes_before_bias() -> None:
    call = attention_call(B, 40, heads=H, softcap=1.5, bias=bias_of("mask", 40, 40, torch.float32))
    check_accuracy(call, rows=True)


def test_bias_matches_hand_computed_answer() -> None:
    # Scores of zero, so the weights are the powers of the bias: 1/2 1/4 1/4, and 1/5 4/5.
    q = torch.zeros(1, 2, 1, 32)
    k = torch.zeros(1, 3, 1, 32)
    v = torch.tensor([3.0, 5.0, 10.0]).view(1, 3, 1, 1).expand(1, 3, 1, 32)
    bias = torch.tensor([[2.0, 1.0, 1.0], [1.0, 4.0, 0.0]]).log()
    out, lse = ops.flash_attention(q, k, v, causal=False, bias=bias, return_lse=True)
    assert torch.allclose(out[0, :, 0, 7], torch.tensor([1.5 + 1.25 + 2.5, 0.6 + 4.0]))
    assert torch.allclose(lse.flatten(), torch.tensor([math.log(4), math.log(5)]))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("q_steps", [1, 3, 50])
def test_a_query_without_a_key_has_out_zero_and_no_gradient(
    q_steps: int, dtype: torch.dtype
) -> None:
    bias = torch.ones(q_steps, 70, dtype=torch.bool)
    bias[-1] = False
    bias[0, 5:] = False
    call = attention_call(1, q_steps, 70, H, dtype=dtype, bias=bias)
    values = run(call.op, call)
    assert not values["y"][:, -1].any() and not values["d_q"][:, -1].any()
    assert (values["lse"][..., -1] == -math.inf).all()
    assert all(x.isfinite().all() for name, x in values.items() if name != "lse")


@pytest.mark.parametrize("q_steps", [2, 50])
def test_lowest_numbers_hide_keys_but_leave_rows_of_their_own_the_mean(q_steps: int) -> None:
    """As transformers writes padding; the masked row is hidden from nothing but its sum."""
    for dtype in (torch.float32, torch.bfloat16):
        bias = torch.zeros(q_steps, 50, dtype=dtype)
        bias[:, 20:] = bias[-1] = torch.finfo(dtype).min
        call = attention_call(1, q_steps, 50, 2, dtype=dtype, bias=bias, causal=False)
        check_accuracy(call, rows=True)


def test_bias_gives_the_same_bits_for_any_thread_count(restore_threads: None) -> None:
    bias = bias_of("numbers", 430, 430, torch.float32)
    call = attention_call(1, 430, heads=1, bias=bias, softcap=4.0)
    torch.set_num_threads(1)
    alone = run(call.op, call)
    for n_threads in (2, 7):
        torch.set_num_threads(n_threads)
        assert_same_bits(alone, run(call.op, call))


def test_no_bias_and_a_bias_of_zero_agree() -> None:
    plain, zero = (run(c.op, c) for c in _with_and_without(torch.zeros(1)))
    for name in plain:
        torch.testing.assert_close(zero[name], plain[name], rtol=1e-5, atol=1e-5)


def _with_and_without(bias: Tensor) -> list[Any]:
    calls = []
    for options in ({}, {"bias": bias}):
        torch.manual_seed(0)
        calls.append(attention_call(B, 61, heads=H, **options))
    return calls


# ---- torch's tools


def _arguments(*, grad: bool) -> tuple[Any, ...]:
    q, k, v = (torch.randn(B, 9, H, 32, requires_grad=grad) for _ in range(3))
    bias = bias_of("mask of items", 9, 9, torch.float32).expand(B, H, 9, 9)
    return q, k, v, 0.2, True, 0, None, bias, 5.0


def test_bias_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.wgpt.flash_attention.default, _arguments(grad=True))
    kernel = torch.ops.wgpt_kernels.flash_attention.default
    torch.library.opcheck(
        kernel, _arguments(grad=False), test_utils=("test_schema", "test_faketensor")
    )


def test_bias_passes_gradcheck() -> None:
    q, k, v = (torch.randn(1, 5, 2, 32, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    bias = torch.randn(5, 5, dtype=torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.flash_attention(q, k, v, bias=bias, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("bias_axis", [None, 0])
def test_vmap_over_bias_gives_each_item_its_own(bias_axis: int | None) -> None:
    q, k, v = (torch.randn(3, B, 9, H, 32) for _ in "qkv")
    bias = torch.randn(3, B, 1, 9, 9) if bias_axis == 0 else torch.randn(9, 9)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ops.flash_attention(q, k, v, bias=bias)

    mapped = torch.func.vmap(attend, in_dims=(0, 0, 0, bias_axis))(q, k, v, bias)
    for i in range(3):
        alone = attend(q[i], k[i], v[i], bias[i] if bias_axis == 0 else bias)
        torch.testing.assert_close(mapped[i], alone)


def test_bias_compiles_in_one_graph_with_dynamic_sizes() -> None:
    def attend(q: Tensor, bias: Tensor) -> Tensor:
        return ops.flash_attention(q, q, q, bias=bias, softcap=3.0).square()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (9, 17):
        q, bias = torch.randn(1, steps, 2, 32, requires_grad=True), torch.rand(steps, steps) > 0.2
        bias.fill_diagonal_(True)
        torch.testing.assert_close(compiled(q, bias), attend(q, bias))
        torch.testing.assert_close(
            *(torch.autograd.grad(f(q, bias).sum(), q)[0] for f in (compiled, attend))
        )


def test_bias_counts_the_flops_of_the_visible_pairs() -> None:
    counts = []
    for call in _with_and_without(torch.zeros(61)):
        with FlopCounterMode(display=False) as counter:
            run(call.op, call)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_bias_is_served_in_plain_torch() -> None:
    call = attention_call(B, 9, heads=H, softcap=2.0, bias=bias_of("mask", 9, 9, torch.float32))
    expected = run(call.op, call)
    with ops.use_plain_torch():
        got = run(call.op, call)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": -1.0}, "softcap must be at least 0 and finite, got -1"),
        ({"softcap": math.nan}, "softcap must be at least 0 and finite, got nan"),
        (
            {"bias": torch.zeros(5, 4)},
            r"bias must broadcast to \(B, H, Tq, Tk\) = \(1, 2, 5, 5\), got \(5, 4\)",
        ),
        (
            {"bias": torch.zeros(1, 1, 1, 5, 5)},
            r"bias must broadcast to .*, got \(1, 1, 1, 5, 5\)",
        ),
        ({"bias": torch.zeros(5, 5).half()}, "bias must be float32 like q, or bool or float32"),
        ({"bias": torch.zeros(5, 5, dtype=torch.int64)}, "bias must be float32 like q, or bool"),
        (
            {"bias": torch.zeros(5, 5, requires_grad=True)},
            r"bias has no gradient, got one that requires it; pass bias.detach\(\)",
        ),
    ],
    ids=str,
)
def test_bias_refuses(options: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 5, 2, 32)
    with pytest.raises(OpError, match="flash_attention: " + message):
        ops.flash_attention(q, q, q, **options)


def test_bias_and_softcap_are_refused_on_a_gpu(cuda: str) -> None:
    q = torch.zeros(1, 5, 2, 32, device=cuda)
    for options in ({"bias": torch.zeros(5, 5, device=cuda)}, {"softcap": 3.0}):
        with pytest.raises(OpError, match="bias and softcap run on the CPU only"):
            ops.flash_attention(q, q, q, **options)
