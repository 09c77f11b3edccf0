"""A small model and its inputs, for tests of torch's and others' tools."""

import dataclasses

import torch
from waking import awake

from wgpt.config import ModelConfig
from wgpt.model import HybridModel

SMALL = ModelConfig(
    token_dim=32, mel_dim=32, n_layers=2, n_mel_layers=1, head_dim=32, ffn_dim=96, mel_ffn_dim=48,
    codebook_size=50, n_mels=8, frames_per_step=2, mel_context_frames=4,
)  # fmt: skip
LATENT = dataclasses.replace(
    SMALL, n_fine=3, n_fine_layers=1, fine_dim=32, fine_head_dim=32, fine_ffn_dim=48,
    latent_steps=2, latent_dim=8, latent_hidden=24,
)  # fmt: skip


def build(config: ModelConfig = SMALL) -> HybridModel:
    torch.manual_seed(0)
    return awake(HybridModel(config)).eval()


def inputs(steps: int = 9, config: ModelConfig = SMALL, batch: int = 2):
    generator = torch.Generator().manual_seed(steps)
    shape = (batch, steps, 1 + config.n_fine) if config.latent_steps else (batch, steps)
    tokens = torch.randint(0, config.codebook_size + 1, shape, generator=generator)
    return tokens, torch.randn(batch, 2 * steps, config.n_mels, generator=generator)


def targets(steps: int = 9, batch: int = 2):
    return torch.randint(0, 50, (batch, steps), generator=torch.Generator().manual_seed(1))
