"""Residual vector quantisation for training: k-means start, running means, restarts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualQuantizer(nn.Module):
    """K codebooks of V entries; each quantises what the ones before it left.

    Entries follow exponential means of the vectors assigned to them (van den Oord et al., 2017,
    appendix A); an entry that hardly any vector chooses moves onto a random vector of the batch.
    """

    embed: Tensor  # (K, V, width) the entries
    total: Tensor  # (K, V, width) and
    count: Tensor  # (K, V) running sums of the vectors that chose an entry, and their number

    def __init__(self, n_codebooks: int, n_entries: int, width: int, decay: float = 0.99) -> None:
        super().__init__()
        self.n_codebooks, self.n_entries, self.decay = n_codebooks, n_entries, decay
        self.register_buffer("embed", torch.zeros(n_codebooks, n_entries, width))
        self.register_buffer("total", torch.zeros(n_codebooks, n_entries, width))
        self.register_buffer("count", torch.ones(n_codebooks, n_entries))

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator, n_rounds: int = 8) -> None:
        """Set the codebooks one after the other by k-means on latents (N, width)."""
        residual = latents.clone()
        for k in range(self.n_codebooks):
            chosen = torch.randperm(residual.shape[0], generator=generator)[: self.n_entries]
            centres = residual[chosen.to(residual.device)].clone()
            for _ in range(n_rounds):
                nearest = self._nearest(residual, centres)
                count = torch.bincount(nearest, minlength=self.n_entries).to(residual)
                total = torch.zeros_like(centres).index_add_(0, nearest, residual)
                centres = torch.where(count[:, None] > 0, total / count[:, None].clamp(1), centres)
            residual = self._adopt_one(k, centres, residual)

    @torch.no_grad()
    def adopt(self, entries: Tensor, latents: Tensor) -> None:
        """Take trained entries (K, V, width), with the sums that latents (N, width) give them."""
        residual = latents
        for k in range(self.n_codebooks):
            residual = self._adopt_one(k, entries[k], residual)

    def _adopt_one(self, k: int, centres: Tensor, vectors: Tensor) -> Tensor:
        """Set codebook k and its running sums; returns what it leaves of the vectors."""
        nearest = self._nearest(vectors, centres)
        self.embed[k] = centres
        self.count[k] = torch.bincount(nearest, minlength=self.n_entries).to(vectors)
        self.count[k] *= 600 / vectors.shape[0]  # as if from one batch
        self.count[k].clamp_(min=0.05)
        self.total[k] = centres * self.count[k][:, None]
        return vectors - centres[nearest]

    @staticmethod
    def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
        # argmin |v - c|^2 without the constant |v|^2, in blocks to bound the memory.
        half_norm = centres.square().sum(1) / 2
        return torch.cat([(half_norm - v @ centres.T).argmin(1) for v in vectors.split(8192)])

    def forward(
        self, z: Tensor, n_used: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Quantise latents and, while training, move the codebooks.

        Args:
            z: float32 (B, T, width).
            n_used: int64 (B,), how many codebooks each item of the batch uses.
            generator: draws the vectors that unused entries move onto.

        Returns:
            (B, T, width) with straight-through gradients; the commitment loss, relative to the
            variance of z.
        """
        flat = z.flatten(0, 1)
        target = flat.detach()
        residual, quantized = target, torch.zeros_like(target)
        commitment = z.new_zeros(())
        used = n_used.repeat_interleave(z.shape[1])
        scale = target.var(0).sum()
        for k in range(self.n_codebooks):
            nearest = self._nearest(residual, self.embed[k])
            chosen = self.embed[k][nearest]
            mask = (used > k)[:, None]
            quantized = quantized + chosen * mask
            # Encoder towards the sum of the entries so far: only items that use this level.
            gap = (flat - (target - residual + chosen)).square().sum(1) * mask[:, 0]
            commitment = commitment + gap.mean() / scale / self.n_codebooks
            if self.training:
                self._follow(k, residual, nearest, generator)
            residual = residual - chosen
        quantized = flat + (quantized - target)
        return quantized.view(z.shape), commitment

    @torch.no_grad()
    def _follow(self, k: int, vectors: Tensor, nearest: Tensor, generator: torch.Generator) -> None:
        count = torch.bincount(nearest, minlength=self.n_entries).to(vectors)
        total = torch.zeros_like(self.embed[k]).index_add_(0, nearest, vectors)
        self.count[k].mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.total[k].mul_(self.decay).add_(total, alpha=1 - self.decay)
        expected = vectors.shape[0] / self.n_entries
        dead = (self.count[k] < 0.06 * expected).nonzero()[:, 0]
        if dead.numel():
            # A few at a time, so that one batch does not fill the codebook with neighbours.
            dead = dead[: max(1, vectors.shape[0] // 64)]
            at = torch.randint(vectors.shape[0], (dead.numel(),), generator=generator)
            self.count[k][dead] = 0.3 * expected
            self.total[k][dead] = vectors[at.to(vectors.device)] * 0.3 * expected
        self.embed[k] = self.total[k] / self.count[k][:, None]
