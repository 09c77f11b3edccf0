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
from numerics import (
    assert_rows_as_accurate_as_torch,
    attention_roundings,
    nudge,
    worst_row,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(emu, b, tq, tk, h, d, dtype, seed=0, gain=1.0, n=3, pad=8):
    """n (B, T, H, D) tensors in the arena, the first with Tq steps: heads of a wider row."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        t = tq if i == 0 else tk
        wide = torch.randn(b, t, h, d + pad, generator=g) * (gain if i < 2 else 1.0)
        out.append(emu.tensor(wide.to(dtype))[..., :d])
    return out


def visible(tq, tk, causal, window, first_key=None):
    """(Tq, Tk), or with first_key (B, Tq): (B, 1, Tq, Tk)."""
    position = torch.arange(tq)[:, None] + tk - tq
    key = torch.arange(tk)[None]
    mask = torch.ones(tq, tk, dtype=torch.bool)
    if causal:
        mask &= key <= position
    if window:
        mask &= key > position - window
        if not causal:
            mask &= key < position + window
    return mask if first_key is None else mask & (key >= first_key[:, None, :, None])


def reference(q, k, v, scale, causal, window, first_key=None):
    """out (B, Tq, H, D) and lse (B, H, Tq)."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    seen = visible(q.shape[1], k.shape[1], causal, window, first_key)
    s = s.masked_fill(~seen, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v), s.logsumexp(-1)


def differentiate(tensors, d_out, d_lse, options, nudged_as=None):
    """What plain torch answers in the type of q, k, v, with gradients if there is a d_out.

    nudged_as: move the inputs (float64) by one rounding of that type's accumulation, and what the
    backward must round: the output to that type, lse, and the sum d_out . out.
    """
    if nudged_as:
        tensors = [nudge(x, nudged_as) for x in tensors]
    leaves = [x.clone().requires_grad_(d_out is not None) for x in tensors]
    out, lse = reference(*leaves, *options)
    y, answers = out.detach(), {"out": out.detach()}
    if d_out is not None:
        d_out = d_out.to(y.dtype)
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.to(y.dtype)
        if nudged_as:
            d_lse = d_lse + (d_out * (y.to(nudged_as).double() - y)).sum(-1).transpose(1, 2)
            d_out, moved = attention_roundings(d_out, y, lse.detach(), nudged_as)
            d_lse = d_lse + moved
        grads = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
        answers |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return answers


def compare(got, q, k, v, scale, causal=True, window=0, first_key=None, d_out=None, d_lse=None):
    """{name: (got, plain torch, float64, float64 of nudged inputs)} of out, or out, dq, dk, dv."""
    options = (scale, causal, window, first_key)
    plain = differentiate([q, k, v], d_out, d_lse, options)
    wide = [x.double() for x in (q, k, v)]
    exact = differentiate(wide, d_out, d_lse, options)
    nudged = differentiate(wide, d_out, d_lse, options, q.dtype)
    names = zip(exact, got, strict=True)
    return {name: (mine, plain[name], exact[name], nudged[name]) for name, mine in names}


def check_rows(got, *inputs, **options):
    """Holds every row to tests/numerics.py's rule; the arguments of `compare`."""
    for name, values in compare(got, *inputs, **options).items():
        assert_rows_as_accurate_as_torch(name, *values)


def worst_of_rows(got, *inputs, **options):
    """The largest error of a row, 1 being its limit; the arguments of `compare`."""
    return max(worst_row(*values)[0] for values in compare(got, *inputs, **options).values())


def make_shape(q, k, scale, causal, window):
    b, tq, h, d = q.shape
    tk = k.shape[1]
    return FlashAttentionShape(DTYPE_CODES[q.dtype], b, tq, tk, h, d, scale, causal, window, 1)


def forward(emu, q, k, v, scale, causal=True, window=0, first_key=None):
    b, tq, h, d = q.shape
    shape = make_shape(q, k, scale, causal, window)
    out, lse = emu.empty((b, tq, h, d), q.dtype), emu.empty((b, h, tq), torch.float32)
    work = emu.workspace("flash_attention_forward_workspace_bytes", shape)
    keys = emu.tensor(first_key)
    emu.call(
        "flash_attention_forward",
        FlashAttentionForward(
            shape,
            heads_view(q),
            heads_view(k),
            heads_view(v),
            address(keys),
            heads_view(out),
            address(lse),
            address(work),
        ),
    )
    return out, lse


def backward(
    emu, q, k, v, out, lse, d_out, scale, causal=True, window=0, d_lse=None, first_key=None
):
    shape = make_shape(q, k, scale, causal, window)
    dq, dk, dv = (emu.empty(x.shape, x.dtype) for x in (q, k, v))
    work = emu.workspace("flash_attention_backward_workspace_bytes", shape)
    keys = emu.tensor(first_key)
    emu.call(
        "flash_attention_backward",
        FlashAttentionBackward(
            shape,
            *map(heads_view, (q, k, v, out, d_out)),
            address(keys),
            address(lse),
            address(d_lse),
            *map(heads_view, (dq, dk, dv)),
            address(work),
        ),
    )
    return dq, dk, dv
