"""token_concat_norm: the early fusion with the norms on both of its sides, one kernel on CUDA."""

from typing import Any

import torch
from torch import Tensor

from wgpt.errors import DerivativeError
from wgpt.ops.add_rms_norm import add_rms_norm
from wgpt.ops.autocast import autocast_type
from wgpt.ops.cuda import is_gpu, runs_plain_torch
from wgpt.ops.gradient import is_transformed, translated
from wgpt.ops.token_concat import token_concat

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels that the kernels hold in registers: in vectors of four, or one by one.
_MOST_CHANNELS, _MOST_ODD_CHANNELS = 768, 256


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
    """cat(table[tokens], rms_norm(x + delta) mel_weight), and that normed by weight.

    On a GPU that our kernels serve it is one kernel each way, but for the table's gradient, where
    table and mel_weight have one dtype and C = Ct + Cm is at most 768 (256 where 4 does not divide
    Ct and Cm); anywhere else it is add_rms_norm, token_concat and add_rms_norm. Differentiable in
    all but tokens.

    Args:
        tokens: (B, T) int64, each in [0, V).
        table: (V, Ct).
        x: (B, T, Cm), the mel branch's stream.
        delta: (B, T, Cm), its last block's result in a dtype of its own, or None.
        mel_weight: (Cm,), of the mel branch's norm, whose result has its dtype.
        weight: (C,), of the norm of both halves.
        mel_eps, eps: added to the mean squares.

    Returns:
        (B, T, C) in the widest dtype of table and mel_weight, and that normed, in the dtype that
        autocast wants for GEMMs, else the same.

    Raises:
        OpError: as the three ops.
    """
    if _fits(tokens, table, x, delta, mel_weight, weight):
        wide = mel_weight.float(), weight.float()
        dtype = autocast_type(table)
        fused: Tensor
        normed: Tensor
        try:
            fused, normed = _TokenConcatNorm.apply(
                tokens, table, x, delta, *wide, mel_eps, eps, dtype
            )
        except (ValueError, MemoryError) as error:
            raise translated("token_concat_norm", error) from None
        return fused, normed
    mel = add_rms_norm(x, delta, mel_weight, eps=mel_eps, dtype=mel_weight.dtype)[1]
    fused = token_concat(tokens, table, mel)
    return fused, add_rms_norm(fused, None, weight, eps=eps)[1]


def _fits(
    tokens: Tensor,
    table: Tensor,
    x: Tensor,
    delta: Tensor | None,
    mel_weight: Tensor,
    weight: Tensor,
) -> bool:
    """Whether the kernels do it: on tensors that no compiler, transform or mesh has taken over."""
    if torch.compiler.is_compiling() or is_transformed() or not is_gpu(x.device):
        return False
    tensors = [t for t in (tokens, table, x, delta, mel_weight, weight) if t is not None]
    if any(hasattr(t, "device_mesh") for t in tensors) or table.dim() != 2:  # DTensor
        return False
    parts = table.shape[1], x.shape[-1]
    most = _MOST_ODD_CHANNELS if any(n % 4 for n in parts) else _MOST_CHANNELS
    return (
        0 < parts[1]
        and sum(parts) <= most
        and table.dtype == mel_weight.dtype
        and all(t.dtype in _TYPES for t in tensors[1:])
        and not runs_plain_torch(x.device)
    )


@torch.library.register_fake("wgpt_kernels::token_concat_norm")
def _fake(
    tokens: Tensor,
    table: Tensor,
    x: Tensor,
    delta: Tensor | None,
    mel_weight: Tensor,
    weight: Tensor,
    mel_eps: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*tokens.shape, weight.shape[0])
    rows = (tokens.numel(),)
    return (
        table.new_empty(shape),
        table.new_empty(shape, dtype=dtype),
        weight.new_empty(rows),
        weight.new_empty(rows),
    )


@torch.library.register_fake("wgpt_kernels::token_concat_norm_backward")
def _fake_backward(
    d_fused: Tensor | None,
    d_normed: Tensor,
    fused: Tensor,
    tokens: Tensor,
    x: Tensor,
    delta: Tensor | None,
    mel_inv_rms: Tensor,
    inv_rms: Tensor,
    mel_weight: Tensor,
    weight: Tensor,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, mel_channels = weight.shape[0], mel_weight.shape[0]
    own_type = delta is not None and delta.dtype != x.dtype
    return (
        fused.new_empty((vocab, channels - mel_channels)),
        x.new_empty(x.shape),
        (x if delta is None else delta).new_empty(x.shape if own_type else (0,)),
        weight.new_empty((channels + mel_channels,)),
    )


class _TokenConcatNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        table: Tensor,
        x: Tensor,
        delta: Tensor | None,
        mel_weight: Tensor,
        weight: Tensor,
        mel_eps: float,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        fused, normed, mel_inv_rms, inv_rms = torch.ops.wgpt_kernels.token_concat_norm(
            tokens, table, x, delta, mel_weight, weight, mel_eps, eps, dtype
        )
        ctx.save_for_backward(fused, tokens, x, delta, mel_inv_rms, inv_rms, mel_weight, weight)
        ctx.vocab, ctx.dtype = len(table), dtype
        ctx.set_materialize_grads(False)
        return fused, normed

    @staticmethod
    def backward(
        ctx: Any, d_fused: Tensor | None, d_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DerivativeError("token_concat_norm: second derivatives are not implemented")
        fused, _, _, delta, *_ = ctx.saved_tensors
        if d_normed is None:
            d_normed = torch.zeros_like(fused, dtype=ctx.dtype)
        try:
            d_table, d_x, d_delta, d_weights = torch.ops.wgpt_kernels.token_concat_norm_backward(
                d_fused, d_normed, *ctx.saved_tensors, ctx.vocab
            )
        except MemoryError as error:
            raise translated("token_concat_norm_backward", error) from None
        if delta is not None and d_delta.numel() == 0:
            d_delta = d_x
        n = fused.shape[-1]
        d_delta = None if delta is None else d_delta
        return None, d_table, d_x, d_delta, d_weights[n:], d_weights[:n], None, None, None
