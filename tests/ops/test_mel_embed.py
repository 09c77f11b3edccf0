"""mel_embed: a hand-computed answer, accuracy over sizes, what a step may see, refusals."""

import math
from typing import Any

import pytest
import torch
from op_cases import (
    CPU_DTYPES,
    MEL_SIZES,
    assert_same_bits,
    check_accuracy,
    mel_call,
    run,
    skip_float64_on_cuda,
)

from wgpt import ops
from wgpt.errors import OpError


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("size", MEL_SIZES, ids=str)
def test_mel_embed_is_as_accurate_as_torch(
    size: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    skip_float64_on_cuda(device, dtype)
    check_accuracy(mel_call(*size, dtype=dtype, device=device))
    check_accuracy(mel_call(*size, pos_rows=size[1] + 3, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mel_embed_reads_float16_frames(dtype: torch.dtype, device: str) -> None:
    call = mel_call(2, 9, 16, 8, 2, 1, dtype=dtype, frames_dtype=torch.float16, device=device)
    check_accuracy(call)


def test_mel_embed_matches_hand_computed_answer(device: str) -> None:
    # Two frames a step and one of context; identity-like weights pick single inputs.
    frames = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], device=device)
    mean, inv_std = torch.tensor([1.0], device=device), torch.tensor([2.0], device=device)
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], device=device)  # oldest, newest
    bias = torch.tensor([0.0, 0.5], device=device)
    y = ops.mel_embed(frames, mean, inv_std, weight, bias, frames_per_step=2, context_frames=1)

    def gelu(x: float) -> float:
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))

    # step 0 sees (absent = 0, 0, 2), step 1 sees (2, 4, 6) once normalised
    expected = [[gelu(0.0), gelu(2.5)], [gelu(2.0), gelu(6.5)]]
    torch.testing.assert_close(y[0].cpu(), torch.tensor(expected))


def test_mel_embed_step_sees_its_frames_and_context_only(device: str) -> None:
    call = mel_call(1, 8, 4, 6, 2, 3, device=device)
    y = call.op(*call.tensors.values(), **call.options)
    for frame in range(16):
        tensors = dict(call.tensors)
        changed = tensors["frames"].clone()  # type: ignore[union-attr]
        changed[0, frame] += 1
        tensors["frames"] = changed
        moved = (call.op(*tensors.values(), **call.options) != y).any(-1)[0]
        seen_by = [t for t in range(8) if 2 * t - 3 <= frame < 2 * t + 2]
        assert moved.nonzero().flatten().tolist() == seen_by


def test_mel_embed_rows_do_not_depend_on_their_batch(device: str) -> None:
    call = mel_call(3, 21, 16, 24, 2, 1, device=device)
    y = call.op(*call.tensors.values(), **call.options)
    tensors = dict(call.tensors, frames=call.tensors["frames"][1:2])  # type: ignore[index]
    assert torch.equal(call.op(*tensors.values(), **call.options)[0], y[1])


def test_mel_embed_reads_strided_frames(device: str) -> None:
    call = mel_call(3, 5, 12, 7, 2, 1, pos_rows=5, device=device)
    plain = run(call.op, call)
    frames, weight = call.tensors["frames"], call.tensors["weight"]
    assert frames is not None and weight is not None
    wide = torch.randn(3, 11, 20, device=device)
    wide[:, 1:, 3:15] = frames
    views = [wide[:, 1:, 3:15], frames.transpose(1, 2).contiguous().transpose(1, 2)]
    for view in views:
        assert not view.is_contiguous()
        call.tensors.update(frames=view, weight=weight.t().contiguous().t())
        assert_same_bits(plain, run(call.op, call))


def test_mel_embed_of_nothing_is_empty(device: str) -> None:
    for size in [(0, 4, 3, 2), (2, 0, 3, 2)]:
        call = mel_call(*size, pos_rows=4, device=device)
        values = run(call.op, call)
        assert values["y"].shape == (size[0], size[1], 2)
        assert all(not value.any() for value in values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mel_embed_of_no_bins_is_the_activated_bias(
    dtype: torch.dtype, restore_threads: None
) -> None:
    torch.set_num_threads(1)
    ops.mel_embed(*mel_call(2, 96, 64, 7, dtype=dtype).tensors.values())  # leaves sums in scratch
    bias = torch.randn(7, dtype=dtype)
    none = torch.zeros(0)
    y = ops.mel_embed(torch.zeros(2, 35, 0), none, none, torch.zeros(7, 0, dtype=dtype), bias)
    expected = torch.nn.functional.gelu(bias).expand(2, 35, 7)
    torch.testing.assert_close(y, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


def test_mel_embed_unused_pos_rows_get_zero_gradient(device: str) -> None:
    values = run(ops.mel_embed, mel_call(2, 3, 4, 5, pos_rows=9, device=device))
    assert values["d_pos"].shape == (9, 5)
    assert values["d_pos"][:3].all() and not values["d_pos"][3:].any()


@pytest.mark.parametrize("name", ["frames", "mean", "inv_std"])
def test_mel_embed_refuses_a_gradient_for_data(name: str) -> None:
    call = mel_call()
    call.tensors[name].requires_grad_()  # type: ignore[union-attr]
    with pytest.raises(OpError, match=rf"mel_embed: {name} is data .* pass {name}.detach\(\)"):
        call.op(*call.tensors.values())
    with torch.no_grad():
        call.op(*call.tensors.values())


def test_mel_embed_without_its_slope_refuses_gradients() -> None:
    call = mel_call()
    weight = call.tensors["weight"].requires_grad_()  # type: ignore[union-attr]
    y, slope = torch.ops.wgpt.mel_embed(*call.tensors.values(), 1, 0, False)
    assert slope.shape == (0,)
    with pytest.raises(ValueError, match=r"slope must have shape .* of a forward with save_slope"):
        torch.autograd.grad(y.sum(), weight)


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"frames": torch.zeros(2, 13)}, {}, r"frames must have shape \(B, F, M\).* got \(2, 13\)"),
    ({}, {"frames_per_step": 2}, "must be a multiple of frames_per_step = 2, got 7"),
    ({}, {"frames_per_step": 0}, "frames_per_step must be at least 1, got 0"),
    ({}, {"context_frames": -1}, "context_frames must be at least 0, got -1"),
    ({}, {"context_frames": 1}, r"weight must have shape .* = \(\*, 26\), got \(5, 13\)"),
    ({"bias": torch.zeros(4)}, {}, r"bias must have shape \(Cm,\) = \(5,\), got \(4,\)"),
    ({"bias": torch.zeros(5).half()}, {}, "bias must be float32 like weight, got float16"),
    ({"mean": torch.zeros(12)}, {}, r"mean must have shape \(M,\) = \(13,\), got \(12,\)"),
    ({"inv_std": torch.zeros(12)}, {}, r"inv_std must have shape \(M,\) = \(13,\), got \(12,\)"),
    ({"pos": torch.zeros(6, 5)}, {}, "the number of rows of pos must be at least 7, got 6"),
    ({"pos": torch.zeros(7, 4)}, {}, r"pos must have shape .* = \(\*, 5\), got \(7, 4\)"),
    ({"frames": torch.zeros(2, 7, 13).long()}, {}, "frames must be float32, float16 or, like"),
]


@pytest.mark.parametrize(("tensors", "options", "message"), REFUSALS)
def test_mel_embed_refuses(tensors: dict[str, Any], options: dict[str, Any], message: str) -> None:
    arguments = dict(mel_call().tensors, **tensors)
    with pytest.raises(OpError, match="mel_embed: .*" + message):
        ops.mel_embed(**arguments, **options)  # type: ignore[arg-type]
