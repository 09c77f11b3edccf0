"""rotary_qkv: queries, keys and values of a fused projection, turned by position. CPU only."""

from typing import Any

from torch import Tensor

from wgpt.ops.autocast import require_cpu, statistic_dtype
from wgpt.ops.gradient import backward_op, differentiable, register_fake


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, T, H, D) contiguous, of qkv (B, T, 3, H, D); q and k turned.

    Channel pairs (i, i + D/2) turn by the angle whose cosine and sine stand in cos and sin
    (T, D/2), which are constants. float32, bfloat16, float16 or float64; arithmetic in float32
    (float64). Differentiable in qkv: the backward turns back and packs in the same pass. Raises
    ValueError for other shapes, types or devices.
    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    require_cpu("rotary_qkv", qkv)
    statistics = statistic_dtype(qkv)
    return _rotary_qkv(qkv, cos.to(statistics), sin.to(statistics))


@register_fake("rotary_qkv")
def _fake(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, _, heads, head_dim = qkv.shape
    q, k, v = (qkv.new_empty((batch, steps, heads, head_dim)) for _ in range(3))
    return q, k, v


@register_fake("rotary_qkv_backward")
def _fake_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, steps, heads, head_dim = dq.shape
    return dq.new_empty((batch, steps, 3, heads, head_dim))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError("rotary_qkv: cos and sin are constants and get no gradient")
    return _rotary_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None


_rotary_qkv = differentiable("rotary_qkv", _setup_context, _backward)
_rotary_qkv_backward = backward_op("rotary_qkv")
