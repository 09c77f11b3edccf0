"""Calls of the token_concat and mel_embed kernels, for the emulator's tests."""

import torch
from emulator import (
    DTYPE_CODES,
    MelEmbedBackward,
    MelEmbedForward,
    MelEmbedShape,
    TokenConcatBackward,
    TokenConcatForward,
    TokenConcatShape,
    address,
)
from numerics import accumulation_dtype, assert_rows_as_accurate_as_torch, nudge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def concat_table_gradient(tokens, d_y, v, ct):
    """d_table (V, Ct) in the type of d_y, and of the first ct channels; tokens out of range add
    nothing."""
    keep = ((tokens >= 0) & (tokens < v)).flatten()
    rows = d_y[..., :ct].flatten(0, 1)[keep]
    return torch.zeros(v, ct, dtype=d_y.dtype).index_add_(0, tokens.flatten()[keep], rows)


def concat_backward_values(emu, tokens, d_y, v, ct):
    """{name: (got, torch's float32 rounded once, float64, float64 of nudged inputs)}."""
    t, dtype = tokens.shape[1], d_y.dtype
    got = concat_backward(emu, tokens, d_y, v, ct, pos_rows=t + 3)

    def answers(d_y):
        pos = torch.nn.functional.pad(d_y.sum(0), (0, 0, 0, 3))
        return concat_table_gradient(tokens, d_y, v, ct), pos

    plain = [x.to(dtype) for x in answers(d_y.float())]
    exact, nudged = answers(d_y.double()), answers(nudge(d_y.double(), dtype))
    values = zip(got, plain, exact, nudged, strict=True)
    return dict(zip(("d_table", "d_pos"), values, strict=True))


def check_concat_backward(emu, size, dtype, seed=2):
    b, t, v, ct, cm = size
    g = torch.Generator().manual_seed(seed)
    # Half of all steps share one token, which then owns several pieces; some tokens never occur.
    tokens = torch.where(
        torch.rand(b, t, generator=g) < 0.5, v // 2, torch.randint(v, (b, t), generator=g)
    )
    tokens[-1, -1] = v - 1  # the last step has the last token
    if b * t > 1:
        tokens[0, 0] = -3  # out of range: ignored
    d_y = torch.randn(b, t, ct + cm, generator=g).to(dtype)
    for name, values in concat_backward_values(emu, tokens, d_y, v, ct).items():
        assert_rows_as_accurate_as_torch(name, *values)


def mel_inputs(emu, size, dtype, frames_dtype, seed=0, frame_strides=None):
    """Inputs in the arena; frames are a strided view, of strides (batch, frame) if given."""
    b, t, m, cm, r, c = size
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(b, t * r, m + 4, generator=g).to(frames_dtype)[:, :, :m]
    strides = frame_strides or (t * r * (m + 4), m + 4)
    whole = emu.empty((strides[0] * (b - 1) + strides[1] * (t * r - 1) + m,), frames_dtype)
    frames = whole.as_strided((b, t * r, m), (*strides, 1)).copy_(values)
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


def mel_slices(frames, mean, inv_std, r, c, dtype=torch.float64):
    """x (B, T, (c + r) M), normalised in `dtype`."""
    x = (frames.to(dtype) - mean.to(dtype)) * inv_std.to(dtype)
    x = torch.nn.functional.pad(x, (0, 0, c, 0))
    return x.unfold(1, c + r, r).transpose(2, 3).flatten(2)


def mel_answers(inputs, r, c, dtype):
    """y, y without pos, and slope as plain torch gives them in `dtype`."""
    frames, mean, inv_std, weight, bias, pos = inputs
    x = mel_slices(frames, mean, inv_std, r, c, accumulation_dtype(dtype)).to(dtype)
    z = (x @ weight.to(dtype).T + bias.to(dtype)).requires_grad_()
    y = torch.nn.functional.gelu(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    y = y.detach()
    return y + pos.to(dtype)[: y.shape[1]], y, slope


def nudged_inputs(inputs, dtype):
    return [nudge(x.double(), dtype) for x in inputs]


def mel_forward_values(emu, size, dtype, frames_dtype=None, frame_strides=None, seed=0):
    """{name: (got, plain torch, float64, float64 of nudged inputs)} of y with and without pos."""
    b, t, _, cm, r, c = size
    shape, *inputs = mel_inputs(emu, size, dtype, frames_dtype or dtype, seed, frame_strides)
    got = []
    for pos in (inputs[5], None):
        y, slope = (emu.empty((b, t, cm), dtype) for _ in range(2))
        slope = slope if pos is None else None
        tensors = (*inputs[:5], pos, y, slope)
        emu.call("mel_embed_forward", MelEmbedForward(shape, *map(address, tensors)))
        got += [y] if slope is None else [y, slope]
    plain, exact = mel_answers(inputs, r, c, dtype), mel_answers(inputs, r, c, torch.float64)
    nudged = mel_answers(nudged_inputs(inputs, dtype), r, c, torch.float64)
    return dict(
        zip(("y + pos", "y", "slope"), zip(got, plain, exact, nudged, strict=True), strict=True)
    )


def check_mel_forward(emu, *arguments, **options):
    for name, values in mel_forward_values(emu, *arguments, **options).items():
        assert_rows_as_accurate_as_torch(name, *values)


def mel_gradients(frames, mean, inv_std, d_y, slope, r, c, dtype):
    """d_weight, d_bias and d_pos[:T] as plain torch gives them in `dtype`."""
    x = mel_slices(frames, mean, inv_std, r, c, accumulation_dtype(dtype)).to(dtype).flatten(0, 1)
    d_z = (d_y.to(dtype) * slope.to(dtype)).flatten(0, 1)
    return d_z.T @ x, d_z.sum(0), d_y.to(dtype).sum(0)


def check_mel_backward(emu, size, dtype, frame_strides=None):
    b, t, _, cm, r, c = size
    shape, *inputs = mel_inputs(emu, size, dtype, dtype, 1, frame_strides)
    weight, bias, pos = inputs[3:]
    g = torch.Generator().manual_seed(2)
    d_y, slope = (emu.tensor(torch.randn(b, t, cm, generator=g).to(dtype)) for _ in range(2))
    d_weight, d_bias, d_pos = (emu.empty(v.shape, dtype) for v in (weight, bias, pos))
    work = emu.workspace("mel_embed_backward_workspace_bytes", shape)
    tensors = (*inputs[:3], d_y, slope, d_weight, d_bias, d_pos)
    arguments = MelEmbedBackward(shape, *map(address, tensors), t + 2, address(work))
    emu.call("mel_embed_backward", arguments)
    assert not d_pos[t:].any()
    data = [*inputs[:3], d_y, slope]
    plain, exact = (mel_gradients(*data, r, c, kind) for kind in (dtype, torch.float64))
    nudged = mel_gradients(*nudged_inputs(data, dtype), r, c, torch.float64)
    got = (d_weight, d_bias, d_pos[:t])
    for name, *values in zip(
        ("d_weight", "d_bias", "d_pos"), got, plain, exact, nudged, strict=True
    ):
        assert_rows_as_accurate_as_torch(name, *values)
