"""flash_attention with fewer key than query heads: what it computes, its bits, what torch asks."""

from typing import Any

import pytest
import torch
from op_cases import (
    CPU_DTYPES,
    Call,
    assert_same_bits,
    attention_call,
    check_accuracy,
    run,
    skip_float64_on_cuda,
)

from wgpt import ops

TARGETS = ops.info()["cpu_targets"]
HEADS = [(6, 2), (3, 1)]  # grouped-query, multi-query
CASES: dict[str, dict[str, Any]] = {  # sizes and masks
    "causal": {"q_steps": 67},
    "full": {"q_steps": 40, "kv_steps": 75, "causal": False},
    "window": {"q_steps": 67, "window": 17},
    "documents": {"q_steps": 67, "first_key": ops.first_key_of([[0, 1, 40, 67], [0, 33, 67]], 67)},
    "decoding": {"q_steps": 1, "kv_steps": 600},
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, restore_cpu_target: None) -> str:
    ops.set_cpu_target(request.param)
    return request.param


def grouped_call(heads: tuple[int, int] = HEADS[0], **options: Any) -> Call:
    return attention_call(**{"heads": heads[0], "kv_heads": heads[1], "q_steps": 67, **options})


def expanded(call: Call) -> Call:
    """The same call with every key head written out for each of its query heads."""
    q, k, v = call.tensors.values()
    group = q.shape[2] // k.shape[2]  # type: ignore[union-attr]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))  # type: ignore[union-attr]
    return Call(call.name, {"q": q, "k": k, "v": v}, call.parameters, call.options)


# ---- what it computes


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_grouped_heads_are_as_accurate_as_torch(
    heads: tuple[int, int], case: str, dtype: torch.dtype, target: str
) -> None:
    check_accuracy(grouped_call(heads, dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_head_dim_is_as_accurate_as_torch(head_dim: int, target: str) -> None:
    check_accuracy(grouped_call(head_dim=head_dim))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_any_device_is_as_accurate_as_torch(dtype: torch.dtype, device: str) -> None:
    skip_float64_on_cuda(device, dtype)
    check_accuracy(grouped_call(dtype=dtype, device=device))


def test_one_key_for_two_heads_matches_hand_computed_answer() -> None:
    """A query that sees one key: out = v, and v's gradient sums over both query heads."""
    q, k = torch.randn(1, 1, 2, 32), torch.randn(1, 1, 1, 32)
    v = torch.randn(1, 1, 1, 32, requires_grad=True)
    out = ops.flash_attention(q, k, v)
    torch.testing.assert_close(out, v.expand(1, 1, 2, 32))
    out.backward(torch.tensor([2.0, 0.5])[:, None].expand(1, 1, 2, 32))
    torch.testing.assert_close(v.grad, torch.full_like(v, 2.5))


# ---- bits


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_has_the_bits_of_written_out_heads(
    case: str, dtype: torch.dtype, target: str
) -> None:
    call = grouped_call(dtype=dtype, **CASES[case])
    ours, written_out = run(call.op, call), run(call.op, expanded(call))
    for name in ("y", "lse"):
        assert torch.equal(ours[name], written_out[name]), name


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"q_steps": 700},  # splits of the keys; with many threads key blocks, then queries
        {"q_steps": 700, "first_key": ops.first_key_of([[0, 30]], 700)},
        {"q_steps": 3, "kv_steps": 1100},
    ],
    ids=["one document", "two documents", "decoding"],
)
def test_bits_do_not_depend_on_the_threads(
    options: dict[str, Any], dtype: torch.dtype, target: str, restore_threads: None
) -> None:
    call = grouped_call((3, 1), batch=1, dtype=dtype, **options)
    torch.set_num_threads(1)
    alone = run(call.op, call)
    for n_threads in (2, 7):
        torch.set_num_threads(n_threads)
        assert_same_bits(alone, run(call.op, call))


def test_gradients_of_every_path_are_as_accurate_as_torch(
    target: str, restore_threads: None
) -> None:
    """Key splits with one thread, key blocks and then queries with seven."""
    for n_threads in (1, 7):
        torch.set_num_threads(n_threads)
        check_accuracy(grouped_call((3, 1), batch=1, q_steps=800))


# ---- what an op owes torch


def arguments_of(requires_grad: bool) -> tuple[Any, ...]:
    call = grouped_call((4, 2), q_steps=5)
    tensors = [t.detach().requires_grad_(requires_grad) for t in call.tensors.values()]  # type: ignore[union-attr]
    return (*tensors, 0.2, True, 0)


def test_op_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.wgpt.flash_attention.default, arguments_of(True))
    arguments = arguments_of(False)
    out, lse = torch.ops.wgpt.flash_attention(*arguments)
    backward = (torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse)
    torch.library.opcheck(
        torch.ops.wgpt.flash_attention_backward.default, (*backward, *arguments[3:])
    )


def test_op_passes_gradcheck() -> None:
    call = grouped_call((4, 2), q_steps=7, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in call.tensors.values())  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(
        lambda *leaves: ops.flash_attention(*leaves, return_lse=True), leaves, fast_mode=True
    )


def test_op_compiles_in_one_graph_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.flash_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (7, 12):
        call = grouped_call(q_steps=steps)
        assert_same_bits(run(call.op, call), run(compiled, call))
