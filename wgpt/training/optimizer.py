"""The optimizer of a training and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from wgpt.config import TrainConfig


def learning_rate(step: int, settings: TrainConfig) -> float:
    """Linear warm-up to lr, then a half cosine to lr * min_lr_ratio at max_steps. step from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    span = max(settings.max_steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / span, 1.0)
    low = settings.lr * settings.min_lr_ratio
    return low + (settings.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True
    )
