"""linear: y = x weight^T; runs our GEMM where it beats torch's."""

from typing import Any

from torch import Tensor

from wgpt.ops import reference
from wgpt.ops.autocast import cast_to_autocast_type
from wgpt.ops.cuda import runs_reference
from wgpt.ops.gradient import backward_op, checks_of, differentiable, register_fake


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T over the last axis of x.

    The CPU target in use runs its own GEMM, with an error no larger than torch's and the same bits
    for any number of threads, for large float32 ones on `amx` (bf16x3), `avx512*` and `avx2`, for
    large bfloat16 ones on `avx512_bf16`, and for bfloat16 and float16 where torch has no
    instructions for them and is slow. All others are torch's GEMM, which gives the same bits for
    the same number of threads. Differentiable in both.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        weight: (F, C), in the dtype of x.

    Returns:
        (..., F), in the dtype of x.

    Raises:
        OpError: for other shapes or dtypes.
    """
    x, weight = cast_to_autocast_type(x, weight)  # type: ignore[assignment]
    rows = x.reshape(-1, x.shape[-1])
    if runs_reference(x.device, has_cuda_kernels=False):
        _check(rows, weight)
        return reference.linear(x, weight)
    y: Tensor = _linear(rows, weight)
    return y.view(*x.shape[:-1], weight.shape[0])


@register_fake("linear")
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_fake("linear_backward")
def _fake_backward(d_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return _linear_backward(d_y, *ctx.saved_tensors)


_linear = differentiable("linear", _setup_context, _backward, folded=(0,))
_linear_backward = backward_op("linear")
_check = checks_of("linear")
