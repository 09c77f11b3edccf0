"""What past steps sounded like to the codec: its latents, of all codebooks, over a few steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from wgpt.config import ModelConfig
from wgpt.model.cache import Cache


def centred(codebooks: Tensor) -> Tensor:
    """Codebooks (K, V, E) about zero, and all by one factor: a sum of one entry of each has unit
    mean square."""
    entries = codebooks - codebooks.mean(1, keepdim=True)
    return entries / entries.square().mean((1, 2)).sum().sqrt()


class LatentHistory(nn.Module):
    """The codec's latents of the newest n steps through two layers, added to the fused input.

        z_t = sum over k of codebooks[k, code k of step t]
        y_t = down(gelu(up(z_t, z_{t-1}, ..., z_{t-n+1})))        zeros before the first step

    Coarse tokens and mel slices hold no phase, and one step hardly does: how a tone continues shows
    in the differences between several (docs/log.md has the figures). Their geometry is the
    codec's and stays fixed: `codebooks` (K, V + 1, E) is a buffer of its `centred` codebooks. The
    last row, of the begin-of-clip token, is zero.
    Initialisation: up 1 / sqrt(fan-in), its bias 0, down 0, so that a model which is given this
    starts as it was without.
    """

    codebooks: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_steps = config.latent_steps
        self.noise = 0.0  # largest standard deviation of noise on the latents while training
        shape = (1 + config.n_fine, config.codebook_size + 1, config.latent_dim)
        self.register_buffer("codebooks", torch.zeros(shape))
        self.up = nn.Linear(config.latent_steps * config.latent_dim, config.latent_hidden)
        self.down = nn.Linear(config.latent_hidden, config.width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew from torch's current seed."""
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.weight)

    def set_codebooks(self, entries: Tensor) -> None:
        """Takes over `centred` codebooks, float (K, V, E)."""
        expected = self.codebooks[:, :-1].shape
        if entries.shape != expected:
            raise ValueError(
                f"codebooks must be (K, V, E) = {tuple(expected)}, got {tuple(entries.shape)}"
            )
        self.codebooks[:, :-1].copy_(entries)

    def forward(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """tokens (B, T, K) int64 in [0, V] to (B, T, C)."""
        return self.down(functional.gelu(self.up(self.history(tokens, cache))))

    def history(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """(B, T, n * E): the latents of each step and the n - 1 before it, the newest first."""
        batch, steps, n_codebooks = tokens.shape
        rows = torch.arange(n_codebooks, device=tokens.device) * self.codebooks.shape[1]
        latents = functional.embedding_bag(
            (tokens + rows).flatten(0, 1), self.codebooks.flatten(0, 1), mode="sum"
        ).view(batch, steps, -1)
        if self.training and self.noise:
            levels = self.noise * torch.rand(batch, 1, 1, device=latents.device)
            latents = latents + levels * torch.randn_like(latents)
        before = cache.latents if cache is not None else None
        if before is None:
            before = latents.new_zeros(batch, self.n_steps - 1, latents.shape[2])
        latents = torch.cat([before, latents], 1)
        if cache is not None:
            cache.latents = latents[:, steps:]
        return torch.cat(
            [latents[:, self.n_steps - 1 - i :][:, :steps] for i in range(self.n_steps)], 2
        )
