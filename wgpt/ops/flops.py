"""FLOPs of the ops for torch.utils.flop_counter.FlopCounterMode: two per multiply-add of a GEMM.

Attention counts the visible pairs of queries and keys, as the kernels compute them; torch's own
formula for scaled_dot_product_attention counts all pairs, causal or not. With first_key, whose
values a counter does not see, it is an upper bound. Element-wise work counts nothing, as in torch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _of(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    targets = [getattr(getattr(torch.ops, space), name) for space in ("wgpt", "wgpt_kernels")]
    register: Callable[..., Callable[..., int]] = register_flop_formula(targets)
    return register


def visible_pairs(q_steps: int, kv_steps: int, causal: bool, window: int) -> int:
    """Pairs of a query and a key that it sees, in one head of `wgpt.ops.flash_attention`."""
    pairs = 0
    for position in range(kv_steps - q_steps, kv_steps):
        reach = window or kv_steps + q_steps
        first = max(position - reach + 1, 0)
        last = position if causal else min(position + reach - 1, kv_steps - 1)
        pairs += max(last - first + 1, 0)
    return pairs


def _attention(q: Shape, k: Shape, causal: bool, window: int) -> int:
    """Of one GEMM."""
    batch, q_steps, heads, head_dim = q
    return 2 * batch * heads * head_dim * visible_pairs(q_steps, k[1], causal, window)


@_of("flash_attention")
def _flash_attention(
    q: Shape, k: Shape, v: Shape, scale: float, causal: bool, window: int, *_: Any, **__: Any
) -> int:
    return 2 * _attention(q, k, causal, window)


@_of("flash_attention_backward")
def _flash_attention_backward(
    d_out: Shape, d_lse: Shape | None, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape,
    scale: float, causal: bool, window: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 5 * _attention(q, k, causal, window)


@_of("linear")
def _linear(x: Shape, weight: Shape, **_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@_of("linear_backward")
def _linear_backward(d_y: Shape, x: Shape, weight: Shape, **_: Any) -> int:
    return 2 * _linear(x, weight)


@_of("feed_forward")
def _feed_forward(x: Shape, up: Shape, down: Shape, **_: Any) -> int:
    return 2 * _linear(x, up)


@_of("feed_forward_backward")
def _feed_forward_backward(d_y: Shape, x: Shape, z: Shape, up: Shape, down: Shape, **_: Any) -> int:
    return 4 * _linear(x, up)


@_of("linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Shape, weight: Shape, targets: Shape, ignore_index: int, gradients: bool, **_: Any
) -> int:
    return (3 if gradients else 1) * _linear(hidden, weight)


@_of("mel_embed")
def _mel_embed(
    frames: Shape, mean: Shape, inv_std: Shape, weight: Shape, bias: Shape, pos: Shape | None,
    frames_per_step: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * frames[0] * (frames[1] // frames_per_step) * math.prod(weight)


@_of("mel_embed_backward")
def _mel_embed_backward(
    d_y: Shape, slope: Shape, frames: Shape, mean: Shape, inv_std: Shape, pos_rows: int,
    frames_per_step: int, context_frames: int, **_: Any,
) -> int:  # fmt: skip
    return 2 * math.prod(d_y) * (context_frames + frames_per_step) * frames[2]


@_of("packed_addmm")
def _packed_addmm(
    x: Shape, panels: Shape, addend: Shape | None, columns: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(x) * columns
