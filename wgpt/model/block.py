"""A pre-norm causal Transformer block with rotary positions, over wgpt's flash attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from wgpt import ops
from wgpt.model.cache import LayerCache


def rotary_angles(
    start: int, n_steps: int, head_dim: int, base: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (n_steps, 1, head_dim/2), of positions start .. start + n_steps - 1.

    Pair i turns by position * base^(-2i/D) (Su et al., RoFormer, arXiv 2104.09864). Angles are
    formed in float64, so that a long stream keeps its phase, and returned in `like`'s dtype.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=like.device) / head_dim
    steps = torch.arange(start, start + n_steps, dtype=torch.float64, device=like.device)
    angles = torch.outer(steps, base**-exponents)[:, None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def apply_rotary(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the channel pairs (i, i + D/2) of x (B, T, H, D) by the given angles."""
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) to (B, T, C), optionally within a sliding window."""

    def __init__(self, width: int, head_dim: int, window_steps: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window_steps = window_steps
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: LayerCache | None) -> Tensor:
        """One pass; with a cache, x is the newest steps and the cache is extended by them."""
        batch, steps, width = x.shape
        q, k, v = self.qkv(x).view(batch, steps, 3, -1, self.head_dim).unbind(2)
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        if cache is not None:
            k, v = cache.append(torch.stack((k, v), 2))
        y = ops.flash_attention(q, k, v, causal=True, window=self.window_steps)
        return self.out(y.reshape(batch, steps, width))


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.down(functional.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

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
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: LayerCache | None = None
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))
