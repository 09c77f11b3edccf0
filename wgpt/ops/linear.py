"""linear: y = x weight^T, with products faster than torch's where they can be. CPU only."""

from typing import Any

from torch import Tensor

from wgpt.ops.autocast import cast_to_autocast_type, require_cpu
from wgpt.ops.gradient import backward_op, differentiable, register_fake


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T over the last axis of x (..., C), with weight (F, C): (..., F).

    float32, bfloat16, float16 or float64, both of one type. The CPU target in use makes some
    products itself, with an error no larger than torch's and the same bits for any number of
    threads: large ones in float32 on `amx` (each of six bfloat16 ones), `avx512*` and `avx2`, large
    ones in bfloat16 on `avx512_bf16`, and those in bfloat16 and float16 where torch has no
    instructions for them and is slow. All others are torch's. Differentiable in both. Raises
    ValueError for other shapes, types or devices.

    torch's products give the same bits for the same number of threads.
    """
    require_cpu("linear", x)
    x, weight = cast_to_autocast_type(x, weight)  # type: ignore[assignment]
    y = _linear(x.reshape(-1, x.shape[-1]), weight)
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


_linear = differentiable("linear", _setup_context, _backward)
_linear_backward = backward_op("linear")
