"""The model for generation: the same weights, laid out for a few new steps against a cache.

A step at batch 1 is a few hundred small operations over all weights, so what counts is how few
they are and how the weights lie. Against HybridModel.hidden with a cache: weights are transposed
once, norms' gains are folded into the matrix behind them, residuals are added by the product, keys
and values are written to the cache in one copy, and rotary turns are one complex multiplication.
For that the channels of q and k stand in another order, pairs side by side, which leaves q k^T as
it is.

Rows never mix and a product always has at least two rows: with one, the BLAS takes another path
that rounds differently. So an item of a batch gets the bits it gets alone (tested on x86-64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wgpt import ops
from wgpt.model.block import Block
from wgpt.model.cache import Cache, LayerCache
from wgpt.model.fine import FineHead
from wgpt.model.hybrid import HybridModel

_TABLE_STEPS = 1024


class RotaryTable:
    """Turns of positions as complex numbers; a table of 1024 at a time, formed in float64."""

    def __init__(self, head_dim: int, base: float, like: Tensor) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=like.device)
        self._rates = base ** -(exponents / head_dim)
        self._dtype = torch.promote_types(like.dtype, torch.complex64)
        self._latest = 0, self._turns(0, _TABLE_STEPS)

    def __call__(self, start: int, n_steps: int) -> Tensor:
        """Complex (n_steps, 1, D/2) of positions start .. start + n_steps - 1."""
        first, table = self._latest
        if start < first or start + n_steps > first + len(table):
            first, table = start, self._turns(start, max(_TABLE_STEPS, n_steps))
            self._latest = first, table  # at once: streams in other threads use it too
        return table[start - first : start - first + n_steps]

    def _turns(self, start: int, n_steps: int) -> Tensor:
        steps = torch.arange(start, start + n_steps, dtype=torch.float64, device=self._rates.device)
        angles = torch.outer(steps, self._rates)[:, None, :]
        return torch.polar(torch.ones_like(angles), angles).to(self._dtype)


class PackedBlock:
    """Block over the newest steps, as rows."""

    def __init__(self, block: Block) -> None:
        attention, ffn = block.attention, block.ffn
        self.width, self.head_dim = attention.out.in_features, attention.head_dim
        self.window, self.scale = attention.window_steps, attention.head_dim**-0.5
        qkv = attention.qkv.weight * block.attention_norm.weight
        # q and k: channels (i, i + D/2) of each head side by side.
        qk = qkv[: 2 * self.width].unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2)
        qkv = torch.cat((qk.flatten(0, 2), qkv[2 * self.width :]))
        self.qkv = qkv.t().contiguous()  # (C, 3C)
        self.out = attention.out.weight.t().contiguous()
        self.up = (ffn.up.weight * block.ffn_norm.weight).t().contiguous()
        self.down = ffn.down.weight.t().contiguous()

    def __call__(
        self, x: Tensor, batch: int, n_steps: int, turns: Tensor, cache: LayerCache
    ) -> Tensor:
        """Rows x (R, C), the first batch * n_steps of them in use, to rows (R, C)."""
        shape, width = (self.width,), self.width
        qkv = torch.rms_norm(x, shape, None, 1e-6).mm(self.qkv)
        used = qkv[: batch * n_steps].view(batch, n_steps, 3, -1, self.head_dim)
        qk = used[:, :, :2].unflatten(4, (-1, 2))
        torch.view_as_complex(qk).mul_(turns[:, None])
        k, v = cache.append(used[:, :, 1:])
        y = torch.ops.wgpt.flash_attention.default(
            used[:, :, 0], k, v, self.scale, True, self.window
        )[0]
        y = y.view(-1, width)
        x = torch.addmm(x, y if len(y) == len(x) else y.expand(len(x), -1), self.out)
        up = torch.rms_norm(x, shape, None, 1e-6).mm(self.up)
        return torch.addmm(x, torch.nn.functional.gelu(up), self.down)


class PackedModel:
    """HybridModel for generation; holds copies of its weights, so pack again after training."""

    @torch.inference_mode()
    def __init__(self, model: HybridModel) -> None:
        self.config = config = model.config
        self.n_fine = 0 if model.fine is None else config.n_fine
        self._table = model.fusion.table.detach()
        self._turns = RotaryTable(config.head_dim, config.rope_base, self._table)
        self._blocks = _pack(model.blocks)
        self._norm = model.norm.weight.detach()
        self._head = model.head.weight.t().contiguous()
        self._mel = model.fusion.mel
        if self._mel is not None:
            self._mel_turns = RotaryTable(config.mel_head_dim, config.rope_base, self._table)
            self._mel_blocks = _pack(self._mel.blocks)
        self._fine = None if model.fine is None else PackedFine(model.fine)
        self._latent = model.latent
        if model.latent is not None:
            self._up = model.latent.up.weight.t().contiguous()
            self._down = model.latent.down.weight.t().contiguous()

    def hidden(self, tokens: Tensor, frames: Tensor | None, cache: Cache) -> Tensor:
        """The normed state (B, C) of the newest step; arguments as in HybridModel.hidden."""
        config = self.config
        batch, n_steps = tokens.shape[:2]
        mel = None if frames is None else self._hear(frames, n_steps, cache)
        coarse = tokens if self._latent is None else tokens[:, :, 0]
        x = _rows(ops.token_concat(coarse, self._table, mel))
        if self._latent is not None:
            history = _rows(self._latent.history(tokens, cache))
            up = torch.addmm(self._latent.up.bias, history, self._up)
            x = torch.addmm(x, torch.nn.functional.gelu(up), self._down)
        turns = self._turns(cache.position, n_steps)
        for block, layer in zip(self._blocks, cache.layers, strict=True):
            x = block(x, batch, n_steps, turns, layer)
        cache.position += n_steps
        newest = x[: batch * n_steps].view(batch, n_steps, -1)[:, -1]
        return torch.rms_norm(newest, (config.width,), self._norm, 1e-6)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of the coarse token, from states (B, C)."""
        return _rows(hidden).mm(self._head)[: len(hidden)]

    def sample_fine(
        self, hidden: Tensor, coarse: Tensor, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Codes (B, n_fine) of the finer codebooks, as FineHead.sample; (B, 0) without one."""
        if self._fine is None:
            return coarse.new_empty(len(coarse), 0)
        return self._fine.sample(hidden, coarse, draw)

    def _hear(self, frames: Tensor, n_steps: int, cache: Cache) -> Tensor:
        """Frames (B, n * r, M) to the mel branch's states (B, n, Cm)."""
        config, mel = self.config, self._mel
        assert mel is not None
        frames = cache.remember_mel(frames, config.mel_context_frames)
        x = ops.mel_embed(
            frames,
            mel.mean,
            mel.inv_std,
            mel.weight.detach(),
            mel.bias.detach(),
            frames_per_step=config.frames_per_step,
            context_frames=config.mel_context_frames,
        )
        batch = len(x)
        x = _rows(x[:, x.shape[1] - n_steps :])
        turns = self._mel_turns(cache.position, n_steps)
        for block, layer in zip(self._mel_blocks, cache.mel_layers, strict=True):
            x = block(x, batch, n_steps, turns, layer)
        x = torch.rms_norm(x[: batch * n_steps], (config.mel_dim,), mel.norm.weight, 1e-6)
        return x.view(batch, n_steps, -1)


class PackedFine:
    """FineHead.sample over packed blocks."""

    def __init__(self, fine: FineHead) -> None:
        config = fine.config
        self._blocks = _pack(fine.blocks)
        self._turns = RotaryTable(config.fine_head_dim, config.rope_base, fine.table)
        self._table = fine.table.detach()
        self._project = fine.project.weight.t().contiguous()
        heads = fine.heads * fine.norm.weight
        self._heads = heads.transpose(1, 2).contiguous()  # (n_fine, W, V)

    def sample(self, hidden: Tensor, coarse: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes (B, n_fine) of one step, from states (B, C) and coarse codes (B,)."""
        batch = len(hidden)
        state = _rows(hidden).mm(self._project)
        caches = [LayerCache(0, len(self._heads)) for _ in self._blocks]
        code, codes = coarse, []
        for depth, head in enumerate(self._heads):
            x = state + self._table[depth][code]  # (1, W) is added to both of two rows
            turns = self._turns(depth, 1)
            for block, cache in zip(self._blocks, caches, strict=True):
                x = block(x, batch, 1, turns, cache)
            x = torch.rms_norm(x, (x.shape[1],), None, 1e-6)
            code = draw(x.mm(head)[:batch])
            codes.append(code)
        return torch.stack(codes, 1)


def _pack(blocks: torch.nn.ModuleList) -> list[PackedBlock]:
    return [PackedBlock(block) for block in blocks if isinstance(block, Block)]


def _rows(x: Tensor) -> Tensor:
    """(..., C) as rows (R, C) with R >= 2: a single row is there twice."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.expand(2, -1).contiguous() if len(rows) == 1 else rows
