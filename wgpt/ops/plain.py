"""mel_embed, token_concat and flash_attention in plain torch, for GPUs without our kernels.

Formulas and errors are those of the kernels; speed, determinism and memory are torch's. They agree
with `wgpt.ops.reference`, which is written for reading and which the other ops run there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wgpt.ops import reference


def mel_embed(
    frames: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor | None,
    frames_per_step: int,
    context_frames: int,
) -> Tensor:
    """See `wgpt.ops.mel_embed`; writes the slices of all steps."""
    steps = frames.shape[1] // frames_per_step
    length = context_frames + frames_per_step
    x = F.pad((frames - mean) * inv_std, (0, 0, context_frames, 0)).to(weight.dtype)
    if steps > 0:
        x = x.unfold(1, length, frames_per_step).transpose(2, 3).flatten(2)  # (B, T, length * M)
    else:
        x = x.new_empty(len(frames), 0, length * frames.shape[2])
    y = F.gelu(F.linear(x, weight, bias))
    return y if pos is None else y + pos[:steps]


def token_concat(
    tokens: Tensor, table: Tensor, mel_hidden: Tensor | None, pos: Tensor | None
) -> Tensor:
    """See `wgpt.ops.token_concat`. A token outside [0, V) makes its step's token channels NaN, as
    in the kernel: torch's own check would end the whole CUDA context."""
    vocab = table.shape[0]
    outside = (tokens < 0) | (tokens >= vocab)
    y = F.embedding(tokens.clamp(0, max(vocab - 1, 0)), table)
    y = y.masked_fill(outside[..., None], math.nan)
    if mel_hidden is not None:
        y = torch.cat([y, mel_hidden], dim=-1)
    return y if pos is None else y + pos[: tokens.shape[1]]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
    first_key: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """out of `wgpt.ops.flash_attention` by torch's scaled_dot_product_attention.

    A mask of Tq x Tk bits is written where first_key, a window, or causal attention of a few
    queries to more keys asks for it; with bias or softcap the scores are.
    """
    if bias is not None or softcap > 0:
        return flash_attention_with_lse(q, k, v, scale, causal, window, first_key, bias, softcap)[0]
    q_steps, kv_steps = q.shape[1], k.shape[1]
    # torch's kernel for the CPU reads grouped heads in place.
    is_grouped = q.device.type == "cpu" and k.shape[2] != q.shape[2]
    if not is_grouped:
        k, v = (reference.repeat_heads(x, q.shape[2]) for x in (k, v))
    is_square = bool(causal and window == 0 and first_key is None and q_steps == kv_steps)
    sees_all = window == 0 and first_key is None and (not causal or q_steps == 1)
    mask = None
    if not is_square and not sees_all:
        mask = reference.visible_keys(q_steps, kv_steps, causal, window, first_key, q.device)
        mask = mask if first_key is not None else mask[None, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_square,
        scale=scale,
        enable_gqa=is_grouped,
    )
    return out.transpose(1, 2).contiguous()


def flash_attention_with_lse(
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
    """Both results of `wgpt.ops.flash_attention`; writes the float32 scores of all pairs."""
    with torch.autocast(q.device.type, enabled=False):
        out, lse = reference.flash_attention(
            *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)),
            scale=scale,
            causal=causal,
            window=window,
            first_key=first_key,
            bias=bias,
            softcap=softcap,
            return_lse=True,
        )
    return out.to(q.dtype).contiguous(), lse
