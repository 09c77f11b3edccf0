"""mel_embed: normalise, project and activate each step's mel slice in one pass."""

from typing import Any

import torch
from torch import Tensor

from wgpt.errors import DerivativeError, OpError
from wgpt.ops import plain
from wgpt.ops.autocast import cast_to_autocast_type
from wgpt.ops.cuda import runs_plain_torch
from wgpt.ops.gradient import (
    backward_op,
    checks_of,
    differentiable,
    is_transformed,
    register_fake,
)


def mel_embed(
    frames: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor | None = None,
    *,
    frames_per_step: int = 1,
    context_frames: int = 0,
) -> Tensor:
    """gelu(weight x[t] + bias) (+ pos[t]), with x[t] the normalised mel slice of step t.

    A slice is the `frames_per_step` frames that end with the step and `context_frames` more on
    their left; frames before the first count as the mean (zero after normalisation). No step sees a
    later frame. Differentiable in weight, bias and pos.

    Args:
        frames: (B, T * frames_per_step, M), data; float32, float16 or the dtype of weight.
        mean, inv_std: (M,), data: x = (frame - mean) * inv_std in float32 (float64 for float64).
        weight: (Cm, (context_frames + frames_per_step) * M), oldest frame first; float32, bfloat16,
            float16, or float64 on the CPU.
        bias: (Cm,), in the dtype of weight.
        pos: (>= T, Cm) in the dtype of weight, or None.
        frames_per_step: frames that end with a step.
        context_frames: frames of left context.

    Returns:
        (B, T, Cm), contiguous, in the dtype of weight.

    Raises:
        OpError: for other shapes or dtypes, or where frames, mean or inv_std requires a gradient.
    """
    weight, bias, pos = cast_to_autocast_type(weight, bias, pos)  # type: ignore[assignment]
    save_slope = False
    if torch.is_grad_enabled():
        if frames.requires_grad or mean.requires_grad or inv_std.requires_grad:
            _refuse_gradient(frames=frames, mean=mean, inv_std=inv_std)
        save_slope = (
            weight.requires_grad
            or bias.requires_grad
            or (pos is not None and pos.requires_grad)
            or is_transformed()
        )
    statistics = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # Buffers of a model that was moved to bfloat16 as a whole. A cast that changes nothing takes
    # 4 us where torch's code is not in the caches.
    if mean.dtype != statistics:
        mean = mean.to(statistics)
    if inv_std.dtype != statistics:
        inv_std = inv_std.to(statistics)
    if runs_plain_torch(weight.device):
        arguments = frames, mean, inv_std, weight, bias, pos, frames_per_step, context_frames
        _check(*arguments)
        return plain.mel_embed(*arguments)
    y: Tensor = _mel_embed(
        frames, mean, inv_std, weight, bias, pos, frames_per_step, context_frames, save_slope
    )[0]
    return y


def _refuse_gradient(**data: Tensor) -> None:
    name = next(name for name, tensor in data.items() if tensor.requires_grad)
    raise OpError(
        f"mel_embed: {name} is data and gets no gradient, but it requires one; pass {name}.detach()"
    )


@register_fake("mel_embed")
def _fake(
    frames: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor | None,
    frames_per_step: int,
    context_frames: int,
    save_slope: bool,
) -> tuple[Tensor, Tensor]:
    shape = (frames.shape[0], frames.shape[1] // frames_per_step, weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape if save_slope else (0,))


@register_fake("mel_embed_backward")
def _fake_backward(
    d_y: Tensor,
    slope: Tensor,
    frames: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    pos_rows: int,
    frames_per_step: int,
    context_frames: int,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = d_y.shape[2]
    return (
        d_y.new_empty((channels, (context_frames + frames_per_step) * frames.shape[2])),
        d_y.new_empty((channels,)),
        d_y.new_empty((max(pos_rows, 0), channels)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    frames, mean, inv_std, _, _, pos, ctx.frames_per_step, ctx.context_frames, _ = inputs
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slope, frames, mean, inv_std)
    ctx.pos_rows = -1 if pos is None else pos.shape[0]


def _backward(ctx: Any, d_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[:3]):
        raise DerivativeError("mel_embed: frames, mean and inv_std are data and get no gradient")
    if d_y is None:
        return (None,) * 9
    d_weight, d_bias, d_pos = _mel_embed_backward(
        d_y, *ctx.saved_tensors, ctx.pos_rows, ctx.frames_per_step, ctx.context_frames
    )
    d_pos = None if ctx.pos_rows < 0 else d_pos
    return None, None, None, d_weight, d_bias, d_pos, None, None, None


_mel_embed = differentiable("mel_embed", _setup_context, _backward, folded=(0,))
_mel_embed_backward = backward_op("mel_embed")
_check = checks_of("mel_embed")
