"""flash_attention: softmax attention in O(T) memory, differentiable also through its lse."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from wgpt.errors import OpError
from wgpt.ops import plain, reference
from wgpt.ops.autocast import cast_to_autocast_type, statistic_dtype
from wgpt.ops.cuda import is_gpu, runs_plain_torch
from wgpt.ops.gradient import backward_op, checks_of, differentiable, register_fake

HEAD_DIMS = (32, 64, 96, 128, 256)  # of the CPU kernels; others are padded
MOST_CUDA_HEAD_DIM = 128  # of the CUDA kernels


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    first_key: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    first_key: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    first_key: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    first_key: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention without a Tq x Tk matrix: softmax(scale q k^T) v over the visible keys.

    Query head h reads key head h // (H / Hk): grouped-query (Hk < H) or multi-query (Hk = 1)
    attention, without a copy of k or v per query head.
    Query i stands at position i + Tk - Tq, so Tq < Tk is a chunk, or one decoded step, against a KV
    cache. Slices of a fused projection are read in place; only a strided last axis costs a copy.
    Accumulates in float32 (float64 for float64); the same bits for any number of threads.
    Differentiable in q, k and v, through out and lse.
    Source: Dao et al., FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691.

    Args:
        q: (B, Tq, H, D), D a multiple of 8 up to 256; float32, bfloat16, float16, or float64 on the
            CPU. The kernels are for 32, 64, 96, 128 and 256 (CUDA: 32, 64 and 128): other sizes
            cost padded copies and the time of the next larger one. Torch's own attention runs on
            CUDA for D above 128, and on the CPU for up to 4 float32 queries of a padded size
            (without `return_lse`), where copies of a KV cache would take 10 times as long.
        k, v: (B, Tk, Hk, D), H a multiple of Hk, in the dtype of q. On CUDA they are repeated to H
            heads first.
        scale: factor of the scores, positive and finite; None is 1 / sqrt(D).
        causal: the query at position p sees keys j <= p; needs Tq <= Tk.
        window: > 0: it sees only keys with p - window < j (not causal: also j < p + window).
        first_key: (B, Tq) int32, the first key that each query may see; 0 <= first_key, at most the
            last key that the query sees without it, non-decreasing along a row. Causal attention
            over packed documents: the start of the query's document (`first_key_of`). No gradient.
        bias: on the CPU, broadcast to (B, H, Tq, Tk) without a copy: numbers in the dtype of q or
            float32, added to the scores, or a bool mask, True where the query may see the key.
            Beside causal, window and first_key, all of which hold. A query that it leaves no key
            (a row of False or -inf) has out 0, lse -inf and no gradient. No gradient of its own:
            one that requires a gradient is refused.
        softcap: > 0, on the CPU: the scores become softcap * tanh(scores / softcap) before bias is
            added (Gemma 2, arXiv 2408.00118).
        return_lse: return the log-sum-exp too.

    Returns:
        out (B, Tq, H, D), contiguous, in the dtype of q; with `return_lse` also the natural
        log-sum-exp of the scores (B, H, Tq), float32 (float64 for float64).

    Raises:
        OpError: for other shapes, dtypes or options.
    """
    if bias is not None or softcap != 0.0:
        bias = _checked_bias(q, k, bias)
    q, k, v = cast_to_autocast_type(q, k, v)  # type: ignore[assignment]
    out: Tensor
    lse: Tensor
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    is_plain = bias is None and softcap == 0.0
    if runs_plain_torch(q.device) or (is_plain and _is_torch_s(q, k, return_lse)):
        arguments = (q, k, v, scale, causal, window, first_key, bias, softcap)
        _check(*arguments)
        if return_lse:
            return plain.flash_attention_with_lse(*arguments)
        return plain.flash_attention(*arguments)
    if is_gpu(q.device) and q.dim() == k.dim() == v.dim() == 4:  # our CUDA kernels know no groups
        k, v = (reference.repeat_heads(x, q.shape[2]) for x in (k, v))
    given = _given(first_key, bias, softcap)
    out, lse = _flash_attention(q, k, v, scale, causal, window, *given)
    return (out, lse) if return_lse else out


def _is_torch_s(q: Tensor, k: Tensor, return_lse: bool) -> bool:
    """Whether the device has our kernels, and none for so many channels that is of use."""
    if is_gpu(q.device):
        return q.shape[-1] > MOST_CUDA_HEAD_DIM
    if q.shape[-1] in HEAD_DIMS or q.dtype != torch.float32 or return_lse:
        return False
    return q.dim() == k.dim() == 4 and q.shape[1] <= 4 < k.shape[1]


def _checked_bias(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    """bias as a (B, H, Tq, Tk) view, where q and k are whole; what is not served is refused."""
    if is_gpu(q.device):
        raise OpError(
            f"flash_attention: bias and softcap run on the CPU only, got q on {q.device}; there "
            "torch's scaled_dot_product_attention takes a bias and flex_attention a softcap"
        )
    if bias is None or not q.dim() == k.dim() == 4:
        return bias
    if bias.requires_grad and torch.is_grad_enabled():
        raise OpError(
            "flash_attention: bias has no gradient, got one that requires it; pass bias.detach(), "
            "or train it with wgpt.ops.reference.flash_attention"
        )
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    own = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(own) > 4 or any(n not in (1, m) for n, m in zip(own, shape, strict=True)):
        raise OpError(
            f"flash_attention: bias must broadcast to (B, H, Tq, Tk) = {tuple(shape)}, "
            f"got {tuple(bias.shape)}"
        )
    return bias.expand(shape)


def _given(first_key: Tensor | None, bias: Tensor | None, softcap: float) -> tuple[Any, ...]:
    """The last arguments of the op, as few as the call needs."""
    if bias is not None or softcap != 0.0:
        return first_key, bias, softcap
    return () if first_key is None else (first_key,)


def attention_of(device: torch.device) -> Callable[..., Tensor]:
    """For inference, the forward there: (q, k, v, scale, causal, window) to out, with no check
    beyond the kernel's own, no autocast and no gradient."""
    if runs_plain_torch(device):
        return plain.flash_attention
    kernel = torch.ops.wgpt.flash_attention.default
    return lambda *arguments: kernel(*arguments)[0]


def first_key_of(
    cu_seqlens: Sequence[Tensor | Sequence[int]], steps: int, device: str | torch.device = "cpu"
) -> Tensor:
    """The `first_key` of rows in which documents lie end to end: the start of each step's document.

    Args:
        cu_seqlens: of each row the cumulative lengths of its documents, 0 first, as integers:
            document n takes the steps [cu_seqlens[b][n], cu_seqlens[b][n + 1]). Steps behind the
            last document (padding) are one document more. Empty documents are allowed.
        steps: of a row.
        device: of the result.

    Returns:
        (B, steps) int32.

    Raises:
        OpError: for lengths that do not begin at 0, fall, or pass `steps`.
    """
    rows = []
    for b, borders in enumerate(cu_seqlens):
        starts = torch.as_tensor(borders, dtype=torch.int64, device="cpu")
        good = starts.dim() == 1 and len(starts) > 0 and starts[0] == 0
        if not (good and (starts.diff() >= 0).all() and starts[-1] <= steps):
            raise OpError(
                f"first_key_of: cu_seqlens[{b}] must rise from 0 to at most steps = {steps}, "
                f"got {starts.tolist()}"
            )
        lengths = torch.cat([starts, starts.new_tensor([steps])]).diff()
        rows.append(starts.repeat_interleave(lengths))
    if not rows:
        return torch.empty(0, steps, dtype=torch.int32, device=device)
    return torch.stack(rows).to(device, torch.int32)


@register_fake("flash_attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
    first_key: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    batch, q_steps, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, q_steps), dtype=statistic_dtype(q))


@register_fake("flash_attention_backward")
def _fake_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    missing = (None, None, 0.0)[len(inputs) - 6 :]
    q, k, v, ctx.scale, ctx.causal, ctx.window, first_key, bias, ctx.softcap = inputs + missing
    ctx.save_for_backward(q, k, v, *output, first_key, bias)
    ctx.set_materialize_grads(False)  # an unused lse costs nothing: its gradient stays None


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None and d_lse is None:
        return (None,) * 9
    q, k, v, out, lse, first_key, bias = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    given = _given(first_key, bias, ctx.softcap)
    dq, dk, dv = _flash_attention_backward(
        d_out, d_lse, q, k, v, out, lse, ctx.scale, ctx.causal, ctx.window, *given
    )
    return dq, dk, dv, None, None, None, None, None, None


_flash_attention = differentiable(
    "flash_attention", _setup_context, _backward, folded=(0, 1, 2, 6, 7)
)
_flash_attention_backward = backward_op("flash_attention", folded=(0, 1, 2, 3, 4, 5, 6, 10, 11))
_check = checks_of("flash_attention")
