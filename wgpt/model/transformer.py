"""A pre-norm causal Transformer block with rotary positions, over wgpt's fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as _every_module
from torch.utils.checkpoint import checkpoint

from wgpt import ops
from wgpt.model.cache import LayerCache
from wgpt.ops.autocast import autocast_type


def is_plain(layer: nn.Module, kind: type[nn.Module], *, may_have_bias: bool = False) -> bool:
    """Whether a fused op may stand in for calling `layer`: its forward is that of `kind`, without a
    bias, and nobody hooked it or gave it weights that bring a forward of their own (quantised
    ones)."""
    own = layer._parameters
    return (
        type(layer).forward is kind.forward
        and (type(own.get("weight")) is nn.Parameter or not _overrides_functions(layer.weight))
        and (own.get("bias") is None or may_have_bias)
        and not (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
            or _every_module._global_forward_hooks
            or _every_module._global_forward_pre_hooks
            or _every_module._global_backward_hooks
            or _every_module._global_backward_pre_hooks
        )
    )


def _overrides_functions(tensor: Any) -> bool:
    """Whether its type replaces torch's functions, as quantised tensors replace linear."""
    own, usual = (
        getattr(x.__torch_function__, "__func__", x.__torch_function__)
        for x in (type(tensor), Tensor)
    )
    return own is not usual and own is not torch._C._disabled_torch_function_impl


def linear(layer: Any, x: Tensor) -> Tensor:
    """layer(x) of a linear layer without bias, or of the module put in its place."""
    y: Tensor = ops.linear(x, layer.weight) if is_plain(layer, nn.Linear) else layer(x)
    return y


def add_norm(
    norm: Any, x: Tensor, delta: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x + delta (delta None: x), and that normed by an nn.RMSNorm or the module put in its place.

    The normed sum is in `dtype`, by default what GEMMs take.
    """
    if is_plain(norm, nn.RMSNorm):
        return ops.add_rms_norm(x, delta, norm.weight, eps=norm.eps, dtype=dtype)
    total = x if delta is None else (x + delta).to(x.dtype)
    return total, norm(total).to(dtype or autocast_type(total))


def rotary_angles(
    start: int, n_steps: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (n_steps, head_dim/2), of positions start .. start + n_steps - 1.

    Pair i is rotated by position * base^(-2i/D) (Su et al., RoFormer, arXiv 2104.09864). Angles are
    formed in float64, so that a long stream keeps its phase, and returned in float32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    steps = torch.arange(start, start + n_steps, dtype=torch.float64, device=device)
    angles = torch.outer(steps, base**-exponents)
    return angles.cos().float(), angles.sin().float()


class RotaryAngles(nn.Module):
    """`rotary_angles` of one width of heads; those of a window can be made once and kept."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self._kept: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def keep(self, n_steps: int, device: torch.device) -> None:
        """Makes those of positions 0 .. n_steps - 1, unless they are there."""
        if (n_steps, device) not in self._kept:
            made = rotary_angles(0, n_steps, self.head_dim, self.base, device)
            self._kept[n_steps, device] = made

    def forward(self, start: int, n_steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of positions start .. start + n_steps - 1."""
        kept = None
        if (
            self._kept and start == 0 and type(n_steps) is int
        ):  # of an exported model it is a symbol
            kept = self._kept.get((n_steps, device))
        return kept or rotary_angles(start, n_steps, self.head_dim, self.base, device)


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) to (B, T, C), optionally within a sliding window."""

    def __init__(self, width: int, head_dim: int, window_steps: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window_steps = window_steps
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        first_key: Tensor | None,
    ) -> Tensor:
        """One pass; with a cache, x is the newest steps and the cache is extended by them.

        first_key: int32 (B, T), the first step that each may see; None for all.
        """
        batch, steps, width = x.shape
        qkv = linear(self.qkv, x)
        qkv = qkv.view(batch, steps, 3, width // self.head_dim, self.head_dim)
        q, k, v = ops.rotary_qkv(qkv, *angles)
        if cache is not None:
            k, v = cache.append(torch.stack((k, v), 2))
        y = ops.flash_attention(q, k, v, causal=True, window=self.window_steps, first_key=first_key)
        return linear(self.out, y.reshape(batch, steps, width))


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if is_plain(self.up, nn.Linear) and is_plain(self.down, nn.Linear):
            return ops.feed_forward(x, self.up.weight, self.down.weight)
        return linear(self.down, functional.gelu(linear(self.up, x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    The last sum is left to whoever norms next: a block takes and returns a pair (x, delta) that
    stands for x + delta.

    With `is_checkpointed`, its backward computes the activations again from what entered it.
    """

    is_checkpointed = False

    def __init__(
        self, width: int, head_dim: int, ffn_dim: int, window_steps: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, head_dim, window_steps)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn = FeedForward(width, ffn_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        first_key: Tensor | None = None,
        normed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, delta (B, T, C) to a new pair of them; first_key as in Attention.

        normed: what attention_norm makes of x, where that is known and there is no delta.
        """
        if self.is_checkpointed and cache is None and torch.is_grad_enabled():
            result: tuple[Tensor, Tensor] = checkpoint(
                self._run, x, delta, angles, None, first_key, normed,
                use_reentrant=False, preserve_rng_state=self.dropout.p > 0,
            )  # fmt: skip
            return result
        return self._run(x, delta, angles, cache, first_key, normed)

    def _run(
        self,
        x: Tensor,
        delta: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        first_key: Tensor | None,
        normed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if normed is None:
            x, normed = add_norm(self.attention_norm, x, delta)
        delta = self.dropout(self.attention(normed, angles, cache, first_key))
        x, normed = add_norm(self.ffn_norm, x, delta)
        return x, self.dropout(self.ffn(normed))
