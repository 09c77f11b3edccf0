"""Blocks start as the identity (zero projections); tests of what blocks do need them awake."""

import torch
from torch import nn

from wgpt.model import HybridModel
from wgpt.model.transformer import Block


@torch.no_grad()
def awake(model: HybridModel) -> HybridModel:
    """The model with random projections at the end of every branch, from torch's current seed."""
    for block in model.modules():
        if isinstance(block, Block):
            for layer in (block.attention.out, block.ffn.down):
                nn.init.normal_(layer.weight, std=0.5 * layer.in_features**-0.5)
    return model
