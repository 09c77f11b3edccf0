"""Attention in float64, and calls of the flash_attention kernels, for the emulator's tests."""

import math

import torch
from emulator import (
    DTYPE_CODES,
    FlashAttentionBackward,
    FlashAttentionForward,
    FlashAttentionShape,
    address,
    heads_view,
)

# |got - expected| / |expected| against float64 on the same (rounded) inputs.
FORWARD = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
BACKWARD = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(FORWARD)


def inputs(emu, b, tq, tk, h, d, dtype, seed=0, gain=1.0, n=3, pad=8):
    """n (B, T, H, D) tensors in the arena, the first with Tq steps: heads of a wider row."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        t = tq if i == 0 else tk
        wide = torch.randn(b, t, h, d + pad, generator=g) * (gain if i < 2 else 1.0)
        out.append(emu.tensor(wide.to(dtype))[..., :d])
    return out


def visible(tq, tk, causal, window):
    position = torch.arange(tq)[:, None] + tk - tq
    key = torch.arange(tk)[None]
    mask = torch.ones(tq, tk, dtype=torch.bool)
    if causal:
        mask &= key <= position
    if window:
        mask &= key > position - window
        if not causal:
            mask &= key < position + window
    return mask


def reference(q, k, v, scale, causal, window):
    """out (B, Tq, H, D) and lse (B, H, Tq)."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    s = s.masked_fill(~visible(q.shape[1], k.shape[1], causal, window), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v), s.logsumexp(-1)


def make_shape(q, k, scale, causal, window):
    b, tq, h, d = q.shape
    tk = k.shape[1]
    return FlashAttentionShape(DTYPE_CODES[q.dtype], b, tq, tk, h, d, scale, causal, window, 1)


def forward(emu, q, k, v, scale, causal=True, window=0):
    b, tq, h, d = q.shape
    shape = make_shape(q, k, scale, causal, window)
    out, lse = emu.empty((b, tq, h, d), q.dtype), emu.empty((b, h, tq), torch.float32)
    work = emu.workspace("flash_attention_forward_workspace_bytes", shape)
    emu.call(
        "flash_attention_forward",
        FlashAttentionForward(
            shape,
            heads_view(q),
            heads_view(k),
            heads_view(v),
            None,
            heads_view(out),
            address(lse),
            address(work),
        ),
    )
    return out, lse


def backward(emu, q, k, v, out, lse, d_out, scale, causal=True, window=0, d_lse=None):
    shape = make_shape(q, k, scale, causal, window)
    dq, dk, dv = (emu.empty(x.shape, x.dtype) for x in (q, k, v))
    work = emu.workspace("flash_attention_backward_workspace_bytes", shape)
    emu.call(
        "flash_attention_backward",
        FlashAttentionBackward(
            shape,
            *map(heads_view, (q, k, v, out, d_out)),
            None,
            address(lse),
            address(d_lse),
            *map(heads_view, (dq, dk, dv)),
            address(work),
        ),
    )
    return dq, dk, dv
