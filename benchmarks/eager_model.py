"""The same model as a good PyTorch user would write it: SDPA, nn.Embedding, torch.cat, fused AdamW.

The opponent of bench_train.py. It shares no code with wgpt.model; `copy_weights` makes both equal.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from wgpt.config import ModelConfig
from wgpt.model import HybridModel


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), cos and sin (T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class EagerBlock(nn.Module):
    """Pre-norm block over (B, T, C)."""

    def __init__(self, width: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, steps, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, steps, 3, -1, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, steps, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class EagerModel(nn.Module):
    """Tokens (B, T), and frames (B, T, M) for a hybrid, to logits (B, T, V)."""

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__()
        self.table = nn.Embedding(config.codebook_size + 1, config.token_dim)
        self.mel_blocks = nn.ModuleList()
        if config.mel_dim:
            self.register_buffer("mean", torch.zeros(config.n_mels))
            self.register_buffer("inv_std", torch.ones(config.n_mels))
            self.mel_in = nn.Linear(config.n_mels, config.mel_dim)
            self.mel_norm = nn.RMSNorm(config.mel_dim, eps=1e-6)
            for _ in range(config.n_mel_layers):
                self.mel_blocks.append(
                    EagerBlock(config.mel_dim, config.mel_head_dim, config.mel_ffn_dim)
                )
        self.blocks = nn.ModuleList(
            EagerBlock(config.width, config.head_dim, config.ffn_dim)
            for _ in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        for name, head_dim in (("wide", config.head_dim), ("mel", config.mel_head_dim)):
            rates = config.rope_base ** -(torch.arange(0, head_dim, 2).double() / head_dim)
            angles = torch.outer(torch.arange(steps).double(), rates)
            self.register_buffer(f"cos_{name}", angles.cos().float())
            self.register_buffer(f"sin_{name}", angles.sin().float())

    def forward(self, tokens: Tensor, frames: Tensor | None) -> Tensor:
        x = self.table(tokens)
        if frames is not None:
            mel = functional.gelu(self.mel_in((frames - self.mean) * self.inv_std))
            for block in self.mel_blocks:
                mel = block(mel, self.cos_mel, self.sin_mel)
            x = torch.cat([x, self.mel_norm(mel)], dim=-1)
        for block in self.blocks:
            x = block(x, self.cos_wide, self.sin_wide)
        return self.head(self.norm(x))

    @torch.no_grad()
    def copy_weights(self, model: HybridModel) -> None:
        """Takes every weight of ours."""
        self.table.weight.copy_(model.fusion.table)
        pairs = list(zip(self.blocks, model.blocks, strict=True))
        mel = model.fusion.mel
        if mel is not None:
            self.mel_in.weight.copy_(mel.weight)
            self.mel_in.bias.copy_(mel.bias)
            self.mel_norm.weight.copy_(mel.norm.weight)
            pairs += zip(self.mel_blocks, mel.blocks, strict=True)
        for mine, ours in pairs:
            mine.norm1.weight.copy_(ours.attention_norm.weight)
            mine.norm2.weight.copy_(ours.ffn_norm.weight)
            mine.qkv.weight.copy_(ours.attention.qkv.weight)
            mine.out.weight.copy_(ours.attention.out.weight)
            mine.up.weight.copy_(ours.ffn.up.weight)
            mine.down.weight.copy_(ours.ffn.down.weight)
        self.norm.weight.copy_(model.norm.weight)
        self.head.weight.copy_(model.head.weight)
