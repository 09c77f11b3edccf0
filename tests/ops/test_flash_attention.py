"""flash_attention: hand-computed answers, accuracy over sizes and masks, views, refusals."""

import math
from typing import Any

import pytest
import torch
from op_cases import (
    ATTENTION_MASKS,
    ATTENTION_SIZES,
    CPU_DTYPES,
    Call,
    assert_same_bits,
    attention_call,
    check_accuracy,
    run,
    skip_float64_on_cuda,
)

from wgpt import ops
from wgpt.errors import OpError


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("size", ATTENTION_SIZES, ids=str)
def test_flash_attention_is_as_accurate_as_torch(
    size: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    skip_float64_on_cuda(device, dtype)
    check_accuracy(attention_call(*size, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("mask", ATTENTION_MASKS)
@pytest.mark.parametrize("size", [(2, 61, 61, 2, 32), (1, 40, 75, 2, 64)], ids=str)
def test_flash_attention_masks_are_as_accurate_as_torch(
    size: tuple[int, ...], mask: str, dtype: torch.dtype, device: str
) -> None:
    skip_float64_on_cuda(device, dtype)
    check_accuracy(attention_call(*size, dtype=dtype, device=device, **ATTENTION_MASKS[mask]))


def test_flash_attention_with_more_queries_than_keys_when_nothing_is_masked(device: str) -> None:
    check_accuracy(attention_call(1, 45, 3, 2, 64, causal=False, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_attention_survives_large_scores(dtype: torch.dtype, device: str) -> None:
    call = attention_call(1, 70, 70, 2, 64, dtype=dtype, device=device)
    for name in ("q", "k"):
        call.tensors[name] = call.tensors[name] * 8  # type: ignore[operator]
    check_accuracy(call)


def test_flash_attention_matches_hand_computed_answer(device: str) -> None:
    # Scores of zero weigh all visible keys alike: out is the mean of the values so far.
    q = torch.zeros(1, 3, 1, 32, device=device)
    v = torch.tensor([3.0, 5.0, 10.0], device=device).view(1, 3, 1, 1).expand(1, 3, 1, 32)
    out, lse = ops.flash_attention(q, q, v.contiguous(), return_lse=True)
    assert torch.allclose(out[0, :, 0, 7].cpu(), torch.tensor([3.0, 4.0, 6.0]))
    assert torch.allclose(lse.flatten().cpu(), torch.tensor([0.0, math.log(2), math.log(3)]))


def test_flash_attention_last_query_sees_last_key(device: str) -> None:
    # Decoding step by step against a cache repeats what one causal call computed.
    call = attention_call(1, 19, 19, 2, 64, device=device)
    q, k, v = call.tensors.values()
    whole = ops.flash_attention(q, k, v)
    for t in (0, 1, 7, 18):
        step = ops.flash_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_attention_reads_slices_of_a_fused_projection(
    dtype: torch.dtype, device: str
) -> None:
    qkv = torch.randn(2, 33, 3, 4, 32).to(device, dtype)
    slices = dict(zip("qkv", qkv.unbind(2), strict=True))
    assert not slices["q"].is_contiguous()
    dense = {name: t.contiguous() for name, t in slices.items()}
    parameters, options = ("q", "k", "v"), {"return_lse": True}
    in_place = run(ops.flash_attention, Call("flash_attention", slices, parameters, options))
    copied = run(ops.flash_attention, Call("flash_attention", dense, parameters, options))
    assert_same_bits(in_place, copied)


def test_flash_attention_takes_any_strides(device: str) -> None:
    call = attention_call(2, 17, 23, 3, 64, device=device)
    plain = run(call.op, call)
    for order in [(0, 2, 1, 3), (3, 1, 0, 2)]:  # heads first; and a strided channel axis
        inverse = [order.index(i) for i in range(4)]
        moved = {n: t.permute(order).contiguous().permute(inverse) for n, t in call.tensors.items()}  # type: ignore[union-attr]
        assert_same_bits(plain, run(call.op, Call(call.name, moved, call.parameters, call.options)))


def test_flash_attention_gradient_without_lse_equals_zero_lse_gradient() -> None:
    call = attention_call(1, 9, 9, 1, 32)
    q, k, v = (t.requires_grad_() for t in call.tensors.values())  # type: ignore[union-attr]
    out = ops.flash_attention(q, k, v)
    d_out = torch.randn_like(out)
    alone = torch.autograd.grad(out, (q, k, v), d_out)
    out, lse = ops.flash_attention(q, k, v, return_lse=True)
    both = torch.autograd.grad((out, lse), (q, k, v), (d_out, torch.zeros_like(lse)))
    for a, b in zip(alone, both, strict=True):
        assert torch.equal(a, b)
    only_lse = torch.autograd.grad(
        ops.flash_attention(q, k, v, return_lse=True)[1].sum(), (q, k), allow_unused=True
    )
    assert all(torch.isfinite(grad).all() for grad in only_lse)


@pytest.mark.parametrize("size", [(0, 5, 5), (2, 0, 0), (2, 0, 5)], ids=str)
def test_flash_attention_of_nothing_is_empty(size: tuple[int, int, int], device: str) -> None:
    call = attention_call(*size, device=device)
    values = run(call.op, call)
    assert values["y"].shape == call.tensors["q"].shape  # type: ignore[union-attr]
    assert values["lse"].shape == (size[0], 3, size[1])
    assert all(not value.any() for value in values.values())


def _tensor(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (_tensor(2, 5, 4), _tensor(2, 5, 4, 32), _tensor(2, 5, 4, 32)),
            {},
            r"q must have shape \(B, Tq, H, D\) = \(\*, \*, \*, \*\), got \(2, 5, 4\)",
        ),
        (
            (_tensor(2, 5, 4, 32), _tensor(2, 5, 4, 64), _tensor(2, 5, 4, 64)),
            {},
            r"k must have shape \(B, Tk, Hk, D\) = \(2, \*, \*, 32\), got \(2, 5, 4, 64\)",
        ),
        (
            (_tensor(2, 5, 4, 32), _tensor(2, 5, 3, 32), _tensor(2, 5, 3, 32)),
            {},
            "the heads of q must be a multiple of those of k and v, got H = 4 and Hk = 3",
        ),
        (
            (_tensor(2, 5, 2, 32), _tensor(2, 5, 4, 32), _tensor(2, 5, 4, 32)),
            {},
            "the heads of q must be a multiple of those of k and v, got H = 2 and Hk = 4",
        ),
        (
            (_tensor(2, 5, 4, 32), _tensor(2, 5, 0, 32), _tensor(2, 5, 0, 32)),
            {},
            "the heads of q must be a multiple of those of k and v, got H = 4 and Hk = 0",
        ),
        (
            (_tensor(2, 5, 4, 32), _tensor(2, 5, 2, 32), _tensor(2, 5, 4, 32)),
            {},
            r"v must have shape \(B, Tk, Hk, D\) = \(2, 5, 2, 32\), got \(2, 5, 4, 32\)",
        ),
        (
            (_tensor(2, 5, 4, 32), _tensor(2, 5, 4, 32), _tensor(2, 6, 4, 32)),
            {},
            r"v must have shape \(B, Tk, Hk, D\) = \(2, 5, 4, 32\), got \(2, 6, 4, 32\)",
        ),
        (
            (_tensor(1, 5, 1, 44),) * 3,
            {},
            "the head dimension D must be a multiple of 8 up to 256, got 44",
        ),
        (
            (_tensor(1, 5, 1, 264),) * 3,
            {},
            "the head dimension D must be a multiple of 8 up to 256, got 264",
        ),
        (
            (_tensor(1, 5, 1, 48), _tensor(1, 5, 1, 48), _tensor(1, 5, 1, 64)),
            {},
            r"v must have the channels of q and k, D = 48, got 64\. Pad the smaller with zeros",
        ),
        (
            (_tensor(1, 5, 1, 32), _tensor(1, 5, 1, 32).half(), _tensor(1, 5, 1, 32)),
            {},
            "k must be float32 like q, got float16",
        ),
        (
            (_tensor(1, 5, 1, 32, dtype=torch.int64),) * 3,
            {},
            "q must be float32, bfloat16, float16 or float64, got int64",
        ),
        (
            (_tensor(1, 6, 1, 32), _tensor(1, 5, 1, 32), _tensor(1, 5, 1, 32)),
            {},
            "causal attention needs Tq <= Tk, got Tq = 6 and Tk = 5",
        ),
        (
            (_tensor(1, 6, 1, 32), _tensor(1, 5, 1, 32), _tensor(1, 5, 1, 32)),
            {"causal": False, "window": 3},
            "windowed attention needs Tq <= Tk, got Tq = 6 and Tk = 5",
        ),
        (
            (_tensor(1, 6, 1, 32), _tensor(1, 0, 1, 32), _tensor(1, 0, 1, 32)),
            {"causal": False},
            "k must hold at least one step, got Tk = 0",
        ),
        ((_tensor(1, 5, 1, 32),) * 3, {"window": -1}, "window must be at least 0, got -1"),
    ],
)
def test_flash_attention_refuses(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpError, match="flash_attention: " + message):
        ops.flash_attention(*arguments, **options)


def test_flash_attention_refuses_mixed_devices(cuda: str) -> None:
    q = torch.zeros(1, 5, 1, 32, device=cuda)
    with pytest.raises(OpError, match="k must be on cuda:0 like q, got cpu"):
        ops.flash_attention(q, q.cpu(), q)


def test_flash_attention_refuses_float64_on_cuda(cuda: str) -> None:
    q = torch.zeros(1, 5, 1, 32, device=cuda, dtype=torch.float64)
    with pytest.raises(OpError, match="q may be float64 on the CPU only"):
        ops.flash_attention(q, q, q)


# ---- packed documents


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 4, 9], torch.tensor([0, 3, 4, 9])], ids=type)
def test_first_key_of_is_the_start_of_each_document(cu_seqlens: Any) -> None:
    first_key = ops.first_key_of([cu_seqlens, [0, 4, 4, 6]], 9)
    assert first_key.dtype == torch.int32
    assert first_key.tolist() == [[0, 0, 0, 3, 4, 4, 4, 4, 4], [0, 0, 0, 0, 4, 4, 6, 6, 6]]
    assert ops.first_key_of([], 9).shape == (0, 9)


@pytest.mark.parametrize("cu_seqlens", [[], [1, 4], [0, 4, 3], [0, 10]], ids=str)
def test_first_key_of_refuses_what_is_no_row_of_documents(cu_seqlens: list[int]) -> None:
    with pytest.raises(OpError, match=r"first_key_of: cu_seqlens\[1\] must rise from 0 to at"):
        ops.first_key_of([[0, 9], cu_seqlens], 9)


def test_flash_attention_first_key_matches_hand_computed_answer(device: str) -> None:
    # Scores of zero weigh all visible keys alike: out is the mean of the document so far.
    q = torch.zeros(1, 4, 1, 32, device=device)
    v = torch.tensor([3.0, 5.0, 10.0, 20.0], device=device).view(1, 4, 1, 1).expand(1, 4, 1, 32)
    first_key = ops.first_key_of([[0, 2, 4]], 4, device)
    out, lse = ops.flash_attention(q, q, v, first_key=first_key, return_lse=True)
    assert torch.allclose(out[0, :, 0, 7].cpu(), torch.tensor([3.0, 4.0, 10.0, 15.0]))
    assert torch.allclose(lse.flatten().cpu(), torch.tensor([0.0, math.log(2)] * 2))


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_any_number_is_at_most_all_keys(causal: bool) -> None:
    """Found by make fuzz FUZZ=ops: a position and a window together wrapped round."""
    q, k, v = (torch.randn(1, n, 2, 32) for n in (5, 9, 9))
    whole = ops.flash_attention(q, k, v, causal=causal)
    huge = ops.flash_attention(q, k, v, causal=causal, window=(1 << 63) - 1)
    torch.testing.assert_close(huge, whole, rtol=0, atol=0)
