"""feed_forward: two linear layers around an exact GELU that keep one activation. CPU only."""

from typing import Any

import torch
from torch import Tensor

from wgpt.ops.autocast import cast_to_autocast_type, require_cpu


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gelu(x up^T) down^T over the last axis of x (..., C), with up (F, C) and down (C, F).

    float32, bfloat16, float16 or float64, all of one type. The matrix products are torch's; the
    GELU runs between them on blocks of rows that are still in a cache, and only the pre-activations
    are kept for the backward. Differentiable in all three; gradients of the weights are summed over
    the blocks in float32, in order. Raises ValueError for other shapes, types or devices.
    """
    require_cpu("feed_forward", x)
    x, up, down = cast_to_autocast_type(x, up, down)  # type: ignore[assignment]
    y, _ = torch.ops.wgpt.feed_forward(x.reshape(-1, x.shape[-1]), up, down)
    return y.view(x.shape)


@torch.library.register_fake("wgpt::feed_forward")
def _fake(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], up.shape[0]))


@torch.library.register_fake("wgpt::feed_forward_backward")
def _fake_backward(
    d_y: Tensor, x: Tensor, z: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, up, down = inputs
    ctx.save_for_backward(x, output[1], up, down)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor | None, d_z: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_z is not None:
        raise RuntimeError("feed_forward: the pre-activations are not differentiable")
    if d_y is None:
        return None, None, None
    return torch.ops.wgpt.feed_forward_backward(d_y, *ctx.saved_tensors)


def _double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("feed_forward: second derivatives are not implemented")


torch.library.register_autograd("wgpt::feed_forward", _backward, setup_context=_setup_context)
torch.library.register_autograd("wgpt::feed_forward_backward", _double_backward)
