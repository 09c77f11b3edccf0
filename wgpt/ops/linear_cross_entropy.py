"""linear_cross_entropy: fused linear + cross-entropy, gradients included, in one (N, V) buffer."""

from typing import Any

import torch
from torch import Tensor

from wgpt.ops import reference
from wgpt.ops.autocast import cast_to_autocast_type
from wgpt.ops.cuda import runs_reference
from wgpt.ops.gradient import (
    checks_of,
    differentiable,
    is_transformed,
    refusal,
    register_fake,
    transformable,
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -1
) -> tuple[Tensor, Tensor]:
    """The summed NLL of targets under softmax(hidden weight^T), and the number of hits.

    The logits become their own gradients in place, and nothing of their size is saved: the forward
    computes the gradients of hidden and weight, the backward only scales them. The GEMMs are those
    of `linear`, with their determinism, on CUDA those of cuBLAS. There a target outside [0, V)
    makes the loss NaN instead of an error: a check would wait for the device.

    Args:
        hidden: (..., C); float32, bfloat16, float16 or float64.
        weight: (V, C), in the dtype of hidden.
        targets: (...) int64, in [0, V) or ignore_index.
        ignore_index: targets of this value count for nothing.

    Returns:
        The NLL in nats (), float32 (float64 for float64), differentiable in hidden and weight, and
        the number () int64 of targets that are the first of their largest logits.

    Raises:
        OpError: for other shapes, dtypes or targets.
    """
    hidden, weight = cast_to_autocast_type(hidden, weight)  # type: ignore[assignment]
    rows, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if runs_reference(hidden.device):
        _check(rows, weight, flat_targets)
        return reference.linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index)
    wanted = hidden.requires_grad or weight.requires_grad or is_transformed()
    gradients = torch.is_grad_enabled() and wanted
    loss, n_correct, _, _ = _linear_cross_entropy(
        rows, weight, flat_targets, ignore_index, gradients
    )
    return loss, n_correct


@register_fake("linear_cross_entropy")
def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if gradients else (0,)),
        weight.new_empty(weight.shape if gradients else (0,)),
    )


def _scaled(d_loss: Tensor, d_hidden: Tensor, d_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients times d_loss: multiplied in the dtype of d_loss, rounded once."""
    scaled, scaled_weight = ((g * d_loss).to(g.dtype) for g in (d_hidden, d_weight))
    return scaled, scaled_weight


_BACKWARD = "linear_cross_entropy_backward"
_scale = torch.library.custom_op(f"wgpt::{_BACKWARD}", _scaled, mutates_args=())
_scale.register_autograd(refusal("linear_cross_entropy", "second"))
_transformed_scale = transformable(_BACKWARD, _scaled)


@_scale.register_fake
def _fake_scale(d_loss: Tensor, d_hidden: Tensor, d_weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(d_hidden), torch.empty_like(d_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, n_correct, d_hidden, d_weight = output
    ctx.mark_non_differentiable(n_correct, d_hidden, d_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_hidden, d_weight)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 5
    scale = _transformed_scale if is_transformed() else _scale
    d_hidden, d_weight = scale(d_loss, *ctx.saved_tensors)
    return d_hidden, d_weight, None, None, None


_linear_cross_entropy = differentiable("linear_cross_entropy", _setup_context, _backward)
_check = checks_of("linear_cross_entropy")
