"""From mel slices and tokens to one sequence: the mel branch and the early fusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wgpt import ops
from wgpt.config import ModelConfig
from wgpt.model.cache import Cache
from wgpt.model.transformer import Block, RotaryAngles, add_norm, is_plain
from wgpt.ops.cuda import is_gpu


class MelBranch(nn.Module):
    """Mel slices (B, T*r, M) to hidden states (B, T, Cm): fused embedding, light causal blocks.

    Normalisation constants `mean` and `inv_std` (M,) are buffers: fixed, and saved with the model.
    """

    mean: Tensor
    inv_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        slice_values = (config.frames_per_step + config.mel_context_frames) * config.n_mels
        self.register_buffer("mean", torch.zeros(config.n_mels))
        self.register_buffer("inv_std", torch.ones(config.n_mels))
        self.weight = nn.Parameter(torch.empty(config.mel_dim, slice_values))
        self.bias = nn.Parameter(torch.empty(config.mel_dim))
        self.blocks = nn.ModuleList(
            Block(
                config.mel_dim,
                config.mel_head_dim,
                config.mel_ffn_dim,
                config.window_steps,
                config.dropout,
            )
            for _ in range(config.n_mel_layers)
        )
        self.norm = nn.RMSNorm(config.mel_dim, eps=1e-6)
        self.angles = RotaryAngles(config.mel_head_dim, config.rope_base)

    def forward(
        self, frames: Tensor, cache: Cache | None, first_key: Tensor | None = None
    ) -> Tensor:
        """(B, T*r, M) log-mel frames to (B, T, Cm); first_key as in HybridModel.hidden."""
        x, delta = self.states(frames, cache, first_key)
        return add_norm(self.norm, x, delta, dtype=self.norm.weight.dtype)[1]

    def states(
        self, frames: Tensor, cache: Cache | None, first_key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What `norm` then norms: a pair that stands for its sum, as Block gives it."""
        config = self.config
        steps = frames.shape[1] // config.frames_per_step
        position = 0
        if cache is not None:
            frames = cache.remember_mel(frames, config.mel_context_frames)
            position = cache.position
        if first_key is not None and config.mel_context_frames:
            x = self._embed_apart(frames, first_key)
        else:
            x = self._embed(frames)
            x = x[:, x.shape[1] - steps :]
        angles = self.angles(position, steps, x.device)
        delta = None
        for i, block in enumerate(self.blocks):
            layer = cache.mel_layers[i] if cache is not None else None
            x, delta = block(x, delta, angles, layer, first_key)
        return x, delta

    def _embed(self, frames: Tensor) -> Tensor:
        return ops.mel_embed(
            frames,
            self.mean,
            self.inv_std,
            self.weight,
            self.bias,
            frames_per_step=self.config.frames_per_step,
            context_frames=self.config.mel_context_frames,
        )

    def _embed_apart(self, frames: Tensor, first_key: Tensor) -> Tensor:
        """`_embed` with segments moved apart by absent frames, so that no slice reaches over."""
        r, gap = self.config.frames_per_step, self.config.mel_context_frames
        batch, steps = first_key.shape
        position = torch.arange(steps, device=frames.device)
        moved = position + ((first_key == position).cumsum(1) - 1) * (gap // r)  # (B, T)
        apart = self.mean.expand(batch, int(moved.max()) + 1, r, -1).to(frames).clone()
        rows = torch.arange(batch, device=frames.device)[:, None]
        apart[rows, moved] = frames.view(batch, steps, r, -1)
        return self._embed(apart.flatten(1, 2))[rows, moved]


class Fusion(nn.Module):
    """Token embedding (V + 1 rows, the last for the begin-of-clip token) beside the mel branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.codebook_size + 1, config.token_dim))
        self.mel = MelBranch(config) if config.mel_dim else None

    def forward(
        self,
        tokens: Tensor,
        frames: Tensor | None,
        cache: Cache | None,
        first_key: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T) int64 and frames (B, T*r, M) to (B, T, Ct + Cm).

        norm: the one that follows; its result is the second, or None where it was not fused.
        """
        if self.mel is None:
            return ops.token_concat(tokens, self.table), None
        assert frames is not None
        if norm is None or not self._may_fuse(norm):
            return ops.token_concat(tokens, self.table, self.mel(frames, cache, first_key)), None
        last: Any = self.mel.norm
        following: Any = norm
        return ops.token_concat_norm(
            tokens,
            self.table,
            *self.mel.states(frames, cache, first_key),
            last.weight,
            following.weight,
            mel_eps=last.eps,
            eps=following.eps,
        )

    def _may_fuse(self, norm: nn.Module) -> bool:
        """Whether there may be one kernel for it: on a GPU, with modules that nobody changed and
        weights that are here (those of a sharded block are not, before it runs)."""
        assert self.mel is not None
        return (
            is_gpu(self.table.device)
            and is_plain(self.mel, MelBranch, may_have_bias=True)
            and all(
                is_plain(n, nn.RMSNorm) and not hasattr(n.weight, "device_mesh")
                for n in (self.mel.norm, norm)
            )
        )
