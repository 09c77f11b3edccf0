"""One kernel of ours in a plain torch model: causal self-attention by `ops.flash_attention`.

    python examples/attention_in_torch.py

`wgpt.ops` needs torch alone. The same layer with torch's own attention must give the same sums; the
last line says how far apart they are and how long each takes, forward and backward.
"""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wgpt import ops


class SelfAttention(nn.Module):
    """Causal self-attention; x (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int, n_heads: int, fused: bool) -> None:
        super().__init__()
        self.n_heads, self.fused = n_heads, fused
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).unbind(2)  # (B, T, H, D) views
        if self.fused:
            y = ops.flash_attention(q, k, v, causal=True)  # (B, T, H, D), read in place
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        projected: Tensor = self.out(y.flatten(2))
        return projected


def step_ms(layer: SelfAttention, x: Tensor) -> float:
    """Milliseconds of a forward and a backward: the best of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        layer(x).square().mean().backward()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def main() -> None:
    torch.manual_seed(0)
    ours, theirs = SelfAttention(256, 4, True), SelfAttention(256, 4, False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 750, 256)
    apart = (ours(x) - theirs(x)).abs().max().item()
    print(f"{apart:.1e} apart; {step_ms(ours, x):.1f} ms, torch {step_ms(theirs, x):.1f} ms")


if __name__ == "__main__":
    main()
