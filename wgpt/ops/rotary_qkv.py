"""rotary_qkv: split a fused projection into q, k, v and rotate q and k by position (RoPE)."""

from typing import Any

from torch import Tensor

from wgpt.errors import DerivativeError
from wgpt.ops import reference
from wgpt.ops.autocast import statistic_dtype
from wgpt.ops.cuda import runs_reference
from wgpt.ops.gradient import backward_op, checks_of, differentiable, register_fake


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a fused projection, with q and k rotated (RoPE).

    Channel pairs (i, i + D/2) are rotated by the angle with the given cosine and sine. Arithmetic
    is float32 (float64 for float64). Differentiable in qkv: the backward rotates back and packs in
    the same pass. Source: Su et al., RoFormer, arXiv 2104.09864.

    Args:
        qkv: (B, T, 3, H, D); float32, bfloat16, float16 or float64.
        cos, sin: (T, D/2), constants.

    Returns:
        q, k and v, each (B, T, H, D) contiguous, in the dtype of qkv.

    Raises:
        OpError: for other shapes or dtypes.
    """
    statistics = statistic_dtype(qkv)
    cos, sin = cos.to(statistics), sin.to(statistics)
    if runs_reference(qkv.device):
        _check(qkv, cos, sin)
        return reference.rotary_qkv(qkv, cos, sin)
    q, k, v = _rotary_qkv(qkv, cos, sin)
    return q, k, v


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
        raise DerivativeError("rotary_qkv: cos and sin are constants and get no gradient")
    return _rotary_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None


_rotary_qkv = differentiable("rotary_qkv", _setup_context, _backward, folded=(0,))
_rotary_qkv_backward = backward_op("rotary_qkv", folded=(0, 1, 2))
_check = checks_of("rotary_qkv")
