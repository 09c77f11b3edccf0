"""feed_forward: two linear layers around an exact GELU that save one tensor."""

from typing import Any

from torch import Tensor

from wgpt.ops import reference
from wgpt.ops.autocast import cast_to_autocast_type
from wgpt.ops.cuda import runs_reference
from wgpt.ops.gradient import backward_op, checks_of, differentiable, register_fake


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gelu(x up^T) down^T over the last axis of x.

    The GEMMs are those of `linear`, with their determinism. Only the pre-activations are saved for
    the backward, which recomputes the activations in the pass that needs their slope. On the `amx`
    target a gradient of up or down that is not finite may be NaN where torch's is infinite.
    Differentiable in all three.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        up: (F, C), in the dtype of x.
        down: (C, F), in the dtype of x.

    Returns:
        (..., C), in the dtype of x.

    Raises:
        OpError: for other shapes or dtypes.
    """
    x, up, down = cast_to_autocast_type(x, up, down)  # type: ignore[assignment]
    rows = x.reshape(-1, x.shape[-1])
    if runs_reference(x.device):
        _check(rows, up, down)
        return reference.feed_forward(x, up, down)
    y: Tensor = _feed_forward(rows, up, down)[0]
    return y.view(x.shape)


@register_fake("feed_forward")
def _fake(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], up.shape[0]))


@register_fake("feed_forward_backward")
def _fake_backward(
    d_y: Tensor, x: Tensor, z: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, up, down = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the pre-activations
    ctx.save_for_backward(x, output[1], up, down)


def _backward(ctx: Any, d_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return None, None, None
    return _feed_forward_backward(d_y, *ctx.saved_tensors)


_feed_forward = differentiable("feed_forward", _setup_context, _backward, folded=(0,))
_feed_forward_backward = backward_op("feed_forward")
_check = checks_of("feed_forward")
