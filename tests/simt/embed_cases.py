"""Calls of the token_concat and mel_embed kernels, for the emulator's tests."""

import torch
from emulator import (
    DTYPE_CODES,
    MelEmbedShape,
    TokenConcatBackward,
    TokenConcatForward,
    TokenConcatShape,
    address,
)

# |got - expected| / |expected| against float64 on the same (rounded) inputs.
CONCAT_ERROR = {torch.float32: 2e-7, torch.bfloat16: 6e-3, torch.float16: 8e-4}
MEL_ERROR = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(MEL_ERROR)


def concat_shape(dtype, b, t, v, ct, cm, mel=None):
    strides = (mel.stride(0), mel.stride(1)) if mel is not None else (0, 0)
    return TokenConcatShape(DTYPE_CODES[dtype], b, t, v, ct, cm, *strides)


def concat_forward(emu, tokens, table, mel, pos):
    (b, t), (v, ct) = tokens.shape, table.shape
    cm = mel.shape[2] if mel is not None else 0
    tokens, table, pos = emu.tensor(tokens), emu.tensor(table), emu.tensor(pos)
    y = emu.empty((b, t, ct + cm), table.dtype)
    shape = concat_shape(table.dtype, b, t, v, ct, cm, mel)
    emu.call(
        "token_concat_forward",
        TokenConcatForward(
            shape, address(tokens), address(table), address(mel), address(pos), address(y)
        ),
    )
    return y


def concat_backward(emu, tokens, d_y, v, ct, pos_rows=0):
    b, t, c = d_y.shape
    shape = concat_shape(d_y.dtype, b, t, v, ct, c - ct)
    tokens, d_y = emu.tensor(tokens), emu.tensor(d_y)
    d_table = emu.empty((v, ct), d_y.dtype)
    d_pos = emu.empty((pos_rows, c), d_y.dtype) if pos_rows else None
    work = emu.workspace("token_concat_backward_workspace_bytes", shape)
    emu.call(
        "token_concat_backward",
        TokenConcatBackward(
            shape,
            address(tokens),
            address(d_y),
            address(d_table),
            address(d_pos),
            pos_rows,
            address(work),
        ),
    )
    return d_table, d_pos


def mel_inputs(emu, size, dtype, frames_dtype, seed=0):
    """Inputs in the arena; frames are a strided view."""
    b, t, m, cm, r, c = size
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(b, t * r, m + 4, generator=g).to(frames_dtype)
    frames = emu.tensor(wide)[:, :, :m]
    mean, inv_std = torch.randn(m, generator=g) * 0.3, torch.rand(m, generator=g) + 0.5
    k = (c + r) * m
    weight = (torch.randn(cm, k, generator=g) / k**0.5).to(dtype)
    bias = torch.randn(cm, generator=g).to(dtype)
    pos = torch.randn(t + 2, cm, generator=g).to(dtype)
    shape = MelEmbedShape(
        DTYPE_CODES[dtype],
        DTYPE_CODES[frames_dtype],
        b,
        t,
        m,
        cm,
        r,
        c,
        frames.stride(0),
        frames.stride(1),
    )
    return shape, frames, *(emu.tensor(x) for x in (mean, inv_std, weight, bias, pos))


def mel_slices(frames, mean, inv_std, r, c):
    """x (B, T, (c + r) M) in float64."""
    x = (frames.double() - mean.double()) * inv_std.double()
    x = torch.nn.functional.pad(x, (0, 0, c, 0))
    return x.unfold(1, c + r, r).transpose(2, 3).flatten(2)
