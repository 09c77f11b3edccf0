"""The residual codebooks of a step: a small transformer over depth, from the decoder's state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from wgpt.config import ModelConfig
from wgpt.model.cache import LayerCache
from wgpt.model.transformer import Block, add_norm, rotary_angles


class DepthTransformer(nn.Module):
    """Predicts codebooks 1 .. n_fine of step t+1, one after the other, from decoder state h_t.

    A sequence of n_fine positions per step, each step on its own (Lee et al., RQ-Transformer,
    arXiv 2203.01941):

        position 0              1                 ...  n_fine - 1
        reads    h_t, code 0    h_t, codes 0..1        h_t, codes 0 .. n_fine-1
        gives    logits of 1    logits of 2            logits of n_fine

    Each codebook has an embedding table of its own, and each position an output layer of its own.
    The embedded code and the projected state are added. Initialisation: table std 0.3, projection
    1 / sqrt(fan-in), blocks as in HybridModel, output layers 0.5 / sqrt(fan-in).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.fine_dim, config.codebook_size
        self.table = nn.Parameter(torch.empty(config.n_fine, size, width))
        self.project = nn.Linear(config.width, width, bias=False)
        self.blocks = nn.ModuleList(
            Block(width, config.fine_head_dim, config.fine_ffn_dim, 0, config.dropout)
            for _ in range(config.n_fine_layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.heads = nn.Parameter(torch.empty(config.n_fine, size, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew from torch's current seed."""
        nn.init.normal_(self.table, std=0.3)
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attention.qkv, block.ffn.up):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            for layer in (block.attention.out, block.ffn.down):
                nn.init.zeros_(layer.weight)
        nn.init.normal_(self.heads, std=0.5 * self.heads.shape[2] ** -0.5)

    @torch.no_grad()
    def start_from(self, entries: Tensor) -> None:
        """Draws both tables anew as the codec's entries, (1 + n_fine, V, E), seen in W channels.

        Codes that sound alike then begin alike, and what is left to say of a step is a difference
        of embeddings: 500 steps of training reach 6.18 instead of 6.31 nats (docs/log.md). One
        random projection serves all embeddings, with codebook 0 of std 0.45; the output layers
        keep the std of the table above, each.
        """
        channels, width = entries.shape[2], self.table.shape[2]
        std = max(channels, width) ** -0.5
        projection = torch.empty(2, channels, width).normal_(std=std).to(entries)
        embedded, written = entries[:-1] @ projection[0], entries[1:] @ projection[1]
        self.table.copy_(embedded * (0.45 / embedded[0].std()))
        written *= 0.5 * width**-0.5 / written.std((1, 2), keepdim=True)
        self.heads.copy_(written)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits (B, n_fine, T, V) of codebooks 1 .. n_fine.

        Args:
            hidden: (B, T, C) decoder states, as HybridModel.hidden returns them.
            codes: (B, 1 + n_fine, T) int64 of the steps these states predict, coarse first;
                -1 where unknown (it is read as code 0: give such a step no weight, as `loss` does).
        """
        batch, steps, _ = hidden.shape
        n_fine = self._check_codes(hidden, codes)
        read = codes[:, :-1].clamp(min=0).transpose(1, 2).reshape(batch * steps, n_fine)
        x = self._embed(read, 0) + self.project(hidden).reshape(batch * steps, 1, -1)
        x = self._blocks(x, self._angles(x), None)
        logits = torch.bmm(x.transpose(0, 1), self.heads.transpose(1, 2))  # (n_fine, B * T, V)
        return logits.view(n_fine, batch, steps, -1).transpose(0, 1)

    def nll(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """NLL in nats and whether the likeliest code is the right one, each (B, n_fine, T).

        Both are 0 where `known_targets` is False. Arguments as in `forward`.
        """
        logits = self(hidden, codes)
        targets = codes[:, 1:].where(self.known_targets(codes), -1)
        losses = functional.cross_entropy(
            logits.flatten(0, 2).float(), targets.flatten(), ignore_index=-1, reduction="none"
        )
        return losses.view_as(targets), logits.detach().argmax(-1) == targets

    @staticmethod
    def known_targets(codes: Tensor) -> Tensor:
        """Where codebooks 1 .. n_fine can be scored, bool (B, n_fine, T): the code itself and those
        before it in the same step are known (not -1)."""
        return (codes >= 0).cumprod(1)[:, 1:].bool()

    def sample(self, hidden: Tensor, coarse: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes (B, n_fine) int64 of one step, drawn one codebook after the other.

        Args:
            hidden: (B, C) decoder state.
            coarse: (B,) int64, the coarse token drawn from the same state.
            draw: takes logits (B, V) of one codebook, returns codes (B,) int64.
        """
        state = self.project(hidden)[:, None]
        angles = self._angles(state)
        caches = [LayerCache() for _ in self.blocks]
        codes: list[Tensor] = []
        for depth in range(self.config.n_fine):
            previous = codes[-1] if codes else coarse
            x = state + self._embed(previous[:, None], depth)
            x = self._blocks(
                x, (angles[0][depth : depth + 1], angles[1][depth : depth + 1]), caches
            )
            codes.append(draw(functional.linear(x[:, 0], self.heads[depth])))
        return torch.stack(codes, dim=1)

    def flops_per_step(self) -> float:
        """Forward FLOPs for one step of audio, over all its codebooks."""
        config, n = self.config, self.config.n_fine
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        weights += config.codebook_size * config.fine_dim
        pairs = config.n_fine_layers * config.fine_dim * n * (n + 1) / 2
        return 2.0 * self.project.weight.numel() + 2.0 * n * weights + 4.0 * pairs

    def _embed(self, codes: Tensor, first: int) -> Tensor:
        """(N, n) codes of codebooks first .. first + n - 1 to (N, n, W)."""
        size = self.config.codebook_size
        rows = torch.arange(first, first + codes.shape[1], device=codes.device) * size
        return functional.embedding(codes + rows, self.table.flatten(0, 1))

    def _angles(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_angles(0, config.n_fine, config.fine_head_dim, config.rope_base, like.device)

    def _blocks(
        self, x: Tensor, angles: tuple[Tensor, Tensor], caches: list[LayerCache] | None
    ) -> Tensor:
        delta = None
        for i, block in enumerate(self.blocks):
            x, delta = block(x, delta, angles, caches[i] if caches is not None else None)
        return add_norm(self.norm, x, delta)[1]

    def _check_codes(self, hidden: Tensor, codes: Tensor) -> int:
        n_fine = self.config.n_fine
        expected = (hidden.shape[0], 1 + n_fine, hidden.shape[1])
        if tuple(codes.shape) != expected:
            raise ValueError(
                f"codes must be (B, 1 + n_fine, T) = {expected} for these states, got "
                f"{tuple(codes.shape)}"
            )
        return n_fine
