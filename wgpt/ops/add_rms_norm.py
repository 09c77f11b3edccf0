"""add_rms_norm: the residual sum of a pre-norm block and its RMS norm, in one pass."""

from typing import Any

import torch
from torch import Tensor

from wgpt.ops import reference
from wgpt.ops.autocast import autocast_type, statistic_dtype
from wgpt.ops.cuda import runs_reference
from wgpt.ops.gradient import backward_op, checks_of, differentiable, register_fake


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + delta and s / rms(s) * weight, rms over the last axis.

    Arithmetic is float32 (float64 for float64). Differentiable in x, delta and weight, with the
    same bits for any number of threads. Source: Zhang and Sennrich, arXiv 1910.07467.

    Args:
        x: (..., C), the residual stream; float32, bfloat16, float16 or float64.
        delta: (..., C), a branch's result in a dtype of its own, or None: s is then x itself.
        weight: (C,).
        eps: added to the mean square.
        dtype: of the normed output; None is the dtype autocast wants for GEMMs, else that of x.

    Returns:
        s in the dtype of x, and the normed s in `dtype`, both (..., C).

    Raises:
        OpError: for other shapes or dtypes.
    """
    dtype = dtype or autocast_type(x)
    weight = weight.to(statistic_dtype(x))
    if runs_reference(x.device):
        _check(x, delta, weight, dtype)
        return reference.add_rms_norm(x, delta, weight, eps=eps, dtype=dtype)
    total, y, _ = _add_rms_norm(x, delta, weight, eps, dtype)
    return (x if delta is None else total), y


@register_fake("add_rms_norm")
def _fake(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((0,) if delta is None else x.shape),
        x.new_empty(x.shape, dtype=dtype),
        weight.new_empty((x.numel() // x.shape[-1] if x.shape[-1] else 0,)),
    )


@register_fake("add_rms_norm_backward")
def _fake_backward(
    d_sum: Tensor | None,
    d_y: Tensor,
    total: Tensor,
    inv_rms: Tensor,
    weight: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_delta = total.new_empty((0,) if delta_dtype is None else total.shape, dtype=delta_dtype)
    return total.new_empty(total.shape), d_delta, weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, weight, _, ctx.dtype = inputs
    total, _, inv_rms = output
    ctx.mark_non_differentiable(inv_rms)
    ctx.has_delta = delta is not None
    ctx.delta_dtype = delta.dtype if delta is not None and delta.dtype != x.dtype else None
    ctx.save_for_backward(total if ctx.has_delta else x, inv_rms, weight)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, d_sum: Tensor | None, d_y: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    total, inv_rms, weight = ctx.saved_tensors
    if d_y is None:
        d_y = torch.zeros_like(total, dtype=ctx.dtype)
    d_x, d_delta, d_weight = _add_rms_norm_backward(
        d_sum if ctx.has_delta else None, d_y, total, inv_rms, weight, ctx.delta_dtype
    )
    if not ctx.has_delta:
        return d_x, None, d_weight, None, None
    return d_x, d_x if ctx.delta_dtype is None else d_delta, d_weight, None, None


_add_rms_norm = differentiable("add_rms_norm", _setup_context, _backward, folded=(0, 1))
_add_rms_norm_backward = backward_op("add_rms_norm")
_check = checks_of("add_rms_norm")
