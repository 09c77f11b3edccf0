"""What each op computes, in plain torch: the specification that the kernels are tested against.

Written for reading, not for speed; differentiable, on any device and in any floating-point type.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from wgpt.ops.autocast import autocast_type


def mel_embed(
    frames: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor | None = None,
    *,
    frames_per_step: int = 1,
    context_frames: int = 0,
) -> Tensor:
    """See `wgpt.ops.mel_embed`."""
    batch, n_frames, mels = frames.shape
    steps = n_frames // frames_per_step
    x = (frames - mean) * inv_std
    x = F.pad(x, (0, 0, context_frames, 0))  # an absent frame is the mean: zero once normalised
    # Step t sees frames [t r - c, t r + r), which the padding has moved to [t r, t r + r + c).
    slices = [
        x[:, t * frames_per_step : (t + 1) * frames_per_step + context_frames].reshape(batch, -1)
        for t in range(steps)
    ]
    width = (frames_per_step + context_frames) * mels
    x = torch.stack(slices, dim=1) if slices else x.new_empty(batch, 0, width)
    y = F.gelu(F.linear(x.to(weight.dtype), weight, bias))  # (B, T, Cm)
    return y if pos is None else y + pos[:steps]


def token_concat(
    tokens: Tensor, table: Tensor, mel_hidden: Tensor | None = None, pos: Tensor | None = None
) -> Tensor:
    """See `wgpt.ops.token_concat`."""
    y = F.embedding(tokens, table)
    if mel_hidden is not None:
        y = torch.cat([y, mel_hidden], dim=-1)
    return y if pos is None else y + pos[: tokens.shape[1]]


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
    """See `wgpt.ops.flash_attention`; this one writes the Tq x Tk matrix of scores."""
    q_steps, kv_steps = q.shape[1], k.shape[1]
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, float("-inf"))
    elif bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = visible_keys(q_steps, kv_steps, causal, window, first_key, q.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if bias is None:
        lse = torch.logsumexp(scores, dim=-1)  # (B, H, Tq)
        weights = torch.softmax(scores, dim=-1)
    else:  # a query that bias leaves no key
        blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(blind[..., 0], float("-inf"))
        weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return (out, lse) if return_lse else out


def visible_keys(
    q_steps: int,
    kv_steps: int,
    causal: bool,
    window: int,
    first_key: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query of flash_attention sees: bool (Tq, Tk), or (B, 1, Tq, Tk) with
    first_key."""
    position = torch.arange(q_steps, device=device)[:, None] + kv_steps - q_steps
    key = torch.arange(kv_steps, device=device)[None, :]
    visible = torch.ones(q_steps, kv_steps, dtype=torch.bool, device=device)
    if causal:
        visible &= key <= position
    if window > 0:
        visible &= (key > position - window) & (key < position + window)
    if first_key is not None:
        visible = visible & (key >= first_key[:, None, :, None])
    return visible


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, T, Hk, D) with each head repeated to (B, T, heads, D), if heads is a multiple of Hk."""
    own = x.shape[2]
    if own in (0, heads) or heads % own != 0:
        return x
    return x.repeat_interleave(heads // own, dim=2)


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `wgpt.ops.add_rms_norm`."""
    total = x if delta is None else x + delta
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    y = F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps)
    return total.to(x.dtype), y.to(dtype or autocast_type(x))


def token_concat_norm(
    tokens: Tensor,
    table: Tensor,
    x: Tensor,
    delta: Tensor | None,
    mel_weight: Tensor,
    weight: Tensor,
    *,
    mel_eps: float = 1e-6,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """See `wgpt.ops.token_concat_norm`."""
    mel = add_rms_norm(x, delta, mel_weight, eps=mel_eps, dtype=mel_weight.dtype)[1]
    return add_rms_norm(token_concat(tokens, table, mel), None, weight, eps=eps)


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `wgpt.ops.rotary_qkv`."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = (angle[:, None, :].to(wide) for angle in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        y = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return y.to(qkv.dtype)

    q, k, v = qkv.unbind(2)
    return rotated(q), rotated(k), v


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `wgpt.ops.linear`."""
    return F.linear(x, weight)


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """See `wgpt.ops.feed_forward`."""
    return F.linear(F.gelu(F.linear(x, up)), down)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -1
) -> tuple[Tensor, Tensor]:
    """See `wgpt.ops.linear_cross_entropy`; this one writes all logits."""
    return summed_nll(F.linear(hidden, weight), targets, ignore_index=ignore_index)


def summed_nll(logits: Tensor, targets: Tensor, *, ignore_index: int = -1) -> tuple[Tensor, Tensor]:
    """Both results of `wgpt.ops.linear_cross_entropy` from logits (..., V)."""
    logits = logits.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return loss, ((logits.argmax(-1) == targets) & (targets != ignore_index)).sum()
