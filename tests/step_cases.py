"""A tiny model, batches of packed windows and its training step, for tests of steps."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from wgpt.config import ModelConfig, TrainConfig
from wgpt.data.batches import TrainingBatches
from wgpt.data.dataset import Split
from wgpt.model import HybridModel
from wgpt.training.distributed import ProcessGroup
from wgpt.training.step import TrainingStep

SHAPE = ModelConfig(
    token_dim=32, mel_dim=32, n_layers=1, n_mel_layers=1, head_dim=32, ffn_dim=64, mel_ffn_dim=64,
    codebook_size=50, n_mels=8, end_of_clip=True, n_fine=2, fine_dim=32, fine_ffn_dim=32,
)  # fmt: skip
SETTINGS = TrainConfig(
    batch_size=6, context_s=0.4, lr=0.01, warmup_steps=1, fine_share=0.5, device="cpu"
)


def batches(settings: TrainConfig = SETTINGS) -> TrainingBatches:
    """Packed windows over random clips of 3 to 40 steps."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 20)
    n = int(lengths.sum())
    split = Split(
        name="train", tokens=rng.integers(0, 50, (n, 3)).astype(np.uint16),
        offsets=np.cumsum([0, *lengths]), mel={"wave": rng.normal(size=(n, 8)).astype(np.float16)},
        groups=["."] * 20, frames_per_step=1, codebook_size=50, silence=-11.5,
    )  # fmt: skip
    return TrainingBatches(
        split, batch_size=settings.batch_size, context_steps=settings.context_steps, seed=0,
        mel_source="wave", n_fine=2, end_of_clip=True,
    )  # fmt: skip


def step_with(shape: ModelConfig = SHAPE, **changes) -> TrainingStep:
    torch.manual_seed(0)
    settings = dataclasses.replace(SETTINGS, **changes)
    return TrainingStep(HybridModel(shape), settings, ProcessGroup(), range(settings.batch_size))


def parameters(step: TrainingStep) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in step.model.named_parameters()}
