"""token_concat: a hand-computed answer, accuracy over sizes, the token range, refusals."""

from typing import Any

import pytest
import torch
from op_cases import (
    CPU_DTYPES,
    assert_same_bits,
    check_accuracy,
    run,
    skip_float64_on_cuda,
    token_call,
)

from wgpt import ops
from wgpt.errors import OpError

SIZES = [  # batch, steps, vocab, token_channels, mel_channels
    (1, 1, 1, 1, 0),
    (2, 7, 13, 5, 3),
    (3, 31, 2, 16, 0),
    (1, 32, 1024, 64, 64),
    (2, 33, 7, 31, 17),
    (1, 257, 1024, 128, 127),
    (2, 3000, 3, 8, 8),  # long sums into few rows
]


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_token_concat_is_as_accurate_as_torch(
    size: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    skip_float64_on_cuda(device, dtype)
    check_accuracy(token_call(*size, dtype=dtype, device=device))
    check_accuracy(token_call(*size, pos_rows=size[1] + 3, dtype=dtype, device=device))


def test_token_concat_matches_hand_computed_answer(device: str) -> None:
    tokens = torch.tensor([[2, 0, 2]], device=device)
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device, requires_grad=True)
    mel = torch.tensor([[[10.0], [20.0], [30.0]]], device=device, requires_grad=True)
    pos = torch.tensor(
        [[0.5] * 3, [0.25] * 3, [0.0] * 3, [9.0] * 3], device=device
    ).requires_grad_()
    y = ops.token_concat(tokens, table, mel, pos)
    expected = [[5.5, 6.5, 10.5], [1.25, 2.25, 20.25], [5.0, 6.0, 30.0]]
    assert torch.equal(y[0].cpu(), torch.tensor(expected))
    d_y = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]], device=device)
    d_table, d_mel, d_pos = torch.autograd.grad(y, (table, mel, pos), d_y)
    assert d_table.tolist() == [[4.0, 5.0], [0.0, 0.0], [8.0, 10.0]]
    assert d_mel.flatten().tolist() == [3.0, 6.0, 9.0]
    assert d_pos.tolist() == [*d_y[0].tolist(), [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_concat_reads_strided_inputs(dtype: torch.dtype, device: str) -> None:
    call = token_call(3, 5, 11, 6, 4, pos_rows=5, dtype=dtype, device=device)
    plain = run(call.op, call)
    tokens, table, mel, pos = call.tensors.values()
    assert tokens is not None and table is not None and mel is not None and pos is not None
    wide = torch.randn(3, 5, 9, device=device).to(dtype)
    wide[..., 2:6] = mel
    for view in (wide[..., 2:6], mel.transpose(0, 1).contiguous().transpose(0, 1)):
        call.tensors.update(
            tokens=tokens.t().contiguous().t(),
            table=table.t().contiguous().t(),
            mel_hidden=view,
            pos=torch.cat([pos, pos], dim=1)[:, :10],
        )
        assert_same_bits(plain, run(call.op, call))


def test_token_concat_of_nothing_is_empty(device: str) -> None:
    for size in [(0, 4), (2, 0)]:
        call = token_call(*size, pos_rows=4, device=device)
        values = run(call.op, call)
        assert values["y"].shape == (*size, 8)
        assert values["d_table"].shape == (13, 5)
        assert all(not value.any() for value in values.values())


@pytest.mark.parametrize(("token", "at"), [(1024, (0, 17)), (-1, (1, 0)), (2**40, (1, 18))])
def test_token_concat_names_the_token_out_of_range(token: int, at: tuple[int, int]) -> None:
    tokens = torch.zeros(2, 19, dtype=torch.int64)
    tokens[at] = token
    message = rf"token_concat: tokens must lie in \[0, 1024\), got {token} at \[{at[0]}, {at[1]}\]"
    with pytest.raises(OpError, match=message):
        ops.token_concat(tokens, torch.zeros(1024, 4))


def test_token_concat_makes_tokens_out_of_range_nan_on_cuda(cuda: str) -> None:
    tokens = torch.tensor([[0, 3, 9, -1]], device=cuda)
    table = torch.ones(4, 8, device=cuda, requires_grad=True)
    y = ops.token_concat(tokens, table)
    assert y[0, :2].eq(1).all() and y[0, 2:].isnan().all()
    (d_table,) = torch.autograd.grad(y, table, torch.ones_like(y))
    assert d_table.sum(1).tolist() == [8, 0, 0, 8]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"tokens": torch.zeros(2, 7)}, "tokens must be int64, got float32"),
    ({"tokens": torch.zeros(7).long()}, r"tokens must have shape \(B, T\).* got \(7,\)"),
    ({"table": torch.zeros(13)}, r"table must have shape \(V, Ct\).* got \(13,\)"),
    ({"table": torch.zeros(13, 5).int()}, "table must be float32, .*, got int32"),
    ({"mel_hidden": torch.zeros(2, 6, 3)}, r"\(2, 7, \*\), got \(2, 6, 3\)"),
    (
        {"mel_hidden": torch.zeros(2, 7, 3).half()},
        "mel_hidden must be float32 like table, got float",
    ),
    ({"pos": torch.zeros(6, 8)}, "the number of rows of pos must be at least 7, got 6"),
    ({"pos": torch.zeros(7, 9)}, r"pos must have shape .* = \(\*, 8\), got \(7, 9\)"),
]


@pytest.mark.parametrize(("tensors", "message"), REFUSALS)
def test_token_concat_refuses(tensors: dict[str, Any], message: str) -> None:
    arguments = dict(token_call().tensors, **tensors)
    with pytest.raises(OpError, match="token_concat: .*" + message):
        ops.token_concat(**arguments)  # type: ignore[arg-type]
