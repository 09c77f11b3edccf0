"""mel_embed and flash_attention as differentiable functions that run on the emulator."""

import torch
from attention_cases import backward, forward
from emulator import (
    DTYPE_CODES,
    MelEmbedBackward,
    MelEmbedForward,
    MelEmbedShape,
    address,
)


def flash_attention_on(emu):
    """ops.flash_attention with its arguments, forward and backward on `emu`."""

    class FlashAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, scale, causal, window):
            q, k, v = map(emu.tensor, (q, k, v))
            out, lse = forward(emu, q, k, v, scale, causal, window)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.options = scale, causal, window
            return out.clone(), lse.clone()

        @staticmethod
        def backward(ctx, d_out, d_lse):
            d_out, d_lse = emu.tensor(d_out), emu.tensor(d_lse)
            grads = backward(emu, *ctx.saved_tensors, d_out, *ctx.options, d_lse)
            return *(grad.clone() for grad in grads), None, None, None

    def flash_attention(q, k, v, scale=None, causal=True, window=None, return_lse=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = FlashAttention.apply(q, k, v, scale, causal, window or 0)
        return (out, lse) if return_lse else out

    return flash_attention


def mel_embed_on(emu):
    """ops.mel_embed with its arguments, forward and backward on `emu`."""

    class MelEmbed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, frames, mean, inv_std, weight, bias, pos, per_step, context):
            frames, mean, inv_std, weight, bias, pos = map(
                emu.tensor, (frames, mean, inv_std, weight, bias, pos)
            )
            b, n_frames, mels = frames.shape
            t, cm = n_frames // per_step, weight.shape[0]
            types = DTYPE_CODES[weight.dtype], DTYPE_CODES[frames.dtype]
            strides = frames.stride()[:2]
            shape = MelEmbedShape(*types, b, t, mels, cm, per_step, context, *strides)
            y, slope = (emu.empty((b, t, cm), weight.dtype) for _ in range(2))
            tensors = (frames, mean, inv_std, weight, bias, pos, y, slope)
            emu.call("mel_embed_forward", MelEmbedForward(shape, *map(address, tensors)))
            ctx.shape, ctx.pos = shape, pos
            ctx.save_for_backward(frames, mean, inv_std, weight, bias, slope)
            return y.clone()

        @staticmethod
        def backward(ctx, d_y):
            frames, mean, inv_std, weight, bias, slope = ctx.saved_tensors
            pos = ctx.pos
            d_weight, d_bias = emu.empty(weight.shape, d_y.dtype), emu.empty(bias.shape, d_y.dtype)
            d_pos = None if pos is None else emu.empty(pos.shape, d_y.dtype)
            d_y = emu.tensor(d_y)
            work = emu.workspace("mel_embed_backward_workspace_bytes", ctx.shape)
            inputs = (frames, mean, inv_std, d_y, slope, d_weight, d_bias, d_pos)
            rows = 0 if pos is None else pos.shape[0]
            arguments = MelEmbedBackward(ctx.shape, *map(address, inputs), rows, address(work))
            emu.call("mel_embed_backward", arguments)
            grads = (None if grad is None else grad.clone() for grad in (d_weight, d_bias, d_pos))
            return None, None, None, *grads, None, None

    def mel_embed(
        frames, mean, inv_std, weight, bias, pos=None, *, frames_per_step, context_frames
    ):
        options = frames_per_step, context_frames
        return MelEmbed.apply(frames, mean, inv_std, weight, bias, pos, *options)

    return mel_embed
