"""The model for generation: the same weights, laid out for a few new steps against a cache.

A step at batch 1 is a few hundred small operations over all weights, so what counts is how few
they are and how the weights lie. Against HybridModel.hidden with a cache: weights are transposed
once, norms' gains are folded into the matrix behind them, residuals are added by the GEMM, keys
and values are written to the cache in one copy, and RoPE is one complex multiplication by phasors.
For that the channels of q and k stand in another order, pairs side by side, which leaves q k^T as
it is.

Rows never mix, and on the CPU in float32 the GEMMs are batch-invariant (ops.PackedMatrix; a BLAS
chooses by the number of rows how it rounds): an item of a batch gets the bits it gets alone.

One row uses each weight once, so a step of a large model takes the time in which its weights are
read. The matrices can be held in bfloat16 or int8 (`weight_dtype`); all else stays float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wgpt import ops
from wgpt.config import WEIGHT_DTYPES
from wgpt.errors import ConfigError
from wgpt.model.cache import Cache, LayerCache
from wgpt.model.depth import DepthTransformer
from wgpt.model.hybrid import HybridModel
from wgpt.model.transformer import Block, is_plain
from wgpt.ops.cuda import is_cpu
from wgpt.ops.flash_attention import attention_of
from wgpt.ops.packed_addmm import rounded

_TABLE_STEPS = 1024
Packer = Callable[[Tensor], ops.PackedMatrix]
_TORCH_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}


def check_weight_dtype(weight_dtype: str, device: torch.device | str) -> None:
    """Raises ConfigError for an unknown one, and for one that the device does not run."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ConfigError(
            f"weight_dtype must be one of {', '.join(WEIGHT_DTYPES)}, got {weight_dtype!r}"
        )
    if weight_dtype != "fp32" and not is_cpu(torch.device(device)):
        raise ConfigError(
            f"weight_dtype {weight_dtype} is for generation on the CPU, got device {device}; leave "
            "it out"
        )


class RotaryTable:
    """Turns of positions as complex numbers; a table of 1024 at a time, formed in float64."""

    def __init__(self, head_dim: int, base: float, like: Tensor) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=like.device)
        self._rates = base ** -(exponents / head_dim)
        self._dtype = torch.promote_types(like.dtype, torch.complex64)
        self._latest = 0, self._phasors(0, _TABLE_STEPS)

    def __call__(self, start: int, n_steps: int) -> Tensor:
        """Complex (n_steps, 1, D/2) of positions start .. start + n_steps - 1."""
        first, table = self._latest
        if start < first or start + n_steps > first + len(table):
            first, table = start, self._phasors(start, max(_TABLE_STEPS, n_steps))
            self._latest = first, table  # at once: streams in other threads use it too
        return table[start - first : start - first + n_steps]

    def _phasors(self, start: int, n_steps: int) -> Tensor:
        steps = torch.arange(start, start + n_steps, dtype=torch.float64, device=self._rates.device)
        angles = torch.outer(steps, self._rates)[:, None, :]
        return torch.polar(torch.ones_like(angles), angles).to(self._dtype)


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    """x / rms(x) * gain in one kernel; torch's own rms_norm is several."""
    return ops.add_rms_norm(x, None, gain)[1]


class InferenceBlock:
    """Block over the newest steps, as rows."""

    def __init__(self, block: Block, pack: Packer) -> None:
        attention, ffn = block.attention, block.ffn
        self.width, self.head_dim = attention.out.in_features, attention.head_dim
        self.window, self.scale = attention.window_steps, attention.head_dim**-0.5
        qkv = _weight_of(attention.qkv) * block.attention_norm.weight
        self.attention = attention_of(qkv.device)
        self._ones = qkv.new_ones(self.width)
        # q and k: channels (i, i + D/2) of each head side by side.
        qk = qkv[: 2 * self.width].unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2)
        qkv = torch.cat((qk.flatten(0, 2), qkv[2 * self.width :]))
        self.qkv = pack(qkv.t())  # (C, 3C)
        self.out = pack(_weight_of(attention.out).t())
        self.up = pack((_weight_of(ffn.up) * block.ffn_norm.weight).t())
        self.down = pack(_weight_of(ffn.down).t())

    def __call__(
        self, x: Tensor, batch: int, n_steps: int, phasors: Tensor, cache: LayerCache
    ) -> Tensor:
        """Rows x (batch * n_steps, C) to rows of that shape."""
        qkv = self.qkv.mm(_normed(x, self._ones))
        qkv = qkv.view(batch, n_steps, 3, -1, self.head_dim)
        qk = qkv[:, :, :2].unflatten(4, (-1, 2))
        torch.view_as_complex(qk).mul_(phasors[:, None])
        k, v = cache.append(qkv[:, :, 1:])
        y = self.attention(qkv[:, :, 0], k, v, self.scale, True, self.window)
        x = self.out.addmm(x, y.view(-1, self.width))
        up = self.up.mm(_normed(x, self._ones))
        return self.down.addmm(x, torch.nn.functional.gelu(up))


class InferenceModel:
    """HybridModel for generation; holds copies of its weights, so pack again after training.

    weight_dtype: in which the matrices are held; fp32, or on the CPU bf16 or int8. Raises
    ConfigError for another.
    """

    @torch.inference_mode()
    def __init__(self, model: HybridModel, weight_dtype: str = "fp32") -> None:
        check_weight_dtype(weight_dtype, model.fusion.table.device)
        pack = functools.partial(ops.PackedMatrix, dtype=_TORCH_DTYPES[weight_dtype])
        self.config = config = model.config
        self.n_fine = 0 if model.fine is None else config.n_fine
        self._table = model.fusion.table.detach()
        self._phasors = RotaryTable(config.head_dim, config.rope_base, self._table)
        self._blocks = _pack_blocks(model.blocks, pack)
        self._norm = model.norm.weight.detach()
        self._head = pack(_weight_of(model.head).t())
        self._mel = model.fusion.mel
        if self._mel is not None:
            self._mel_phasors = RotaryTable(config.mel_head_dim, config.rope_base, self._table)
            self._mel_blocks = _pack_blocks(self._mel.blocks, pack)
        self._fine = None if model.fine is None else PackedFine(model.fine, pack)
        self._latent = model.latent
        if model.latent is not None:
            up, self._up_bias = _affine(model.latent.up)
            self._up = pack(up.t())
            self._down = pack(_weight_of(model.latent.down).t())

    def hidden(self, tokens: Tensor, frames: Tensor | None, cache: Cache) -> Tensor:
        """The normed state (B, C) of the newest step; arguments as in HybridModel.hidden."""
        batch, n_steps = tokens.shape[:2]
        mel = None if frames is None else self._hear(frames, n_steps, cache)
        coarse = tokens if self._latent is None else tokens[:, :, 0]
        x = ops.token_concat(coarse, self._table, mel).flatten(0, 1)
        if self._latent is not None:
            history = self._latent.history(tokens, cache).flatten(0, 1)
            up = self._up.addmm(self._up_bias, history)
            x = self._down.addmm(x, torch.nn.functional.gelu(up))
        phasors = self._phasors(cache.position, n_steps)
        for block, layer in zip(self._blocks, cache.layers, strict=True):
            x = block(x, batch, n_steps, phasors, layer)
        cache.position += n_steps
        newest = x.view(batch, n_steps, -1)[:, -1]
        return _normed(newest, self._norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of the coarse token, from states (B, C)."""
        return self._head.mm(hidden)

    def sample_fine(
        self, hidden: Tensor, coarse: Tensor, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Residual codes (B, n_fine), as DepthTransformer.sample; (B, 0) without one."""
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
        x = x[:, x.shape[1] - n_steps :].flatten(0, 1)
        phasors = self._mel_phasors(cache.position, n_steps)
        for block, layer in zip(self._mel_blocks, cache.mel_layers, strict=True):
            x = block(x, batch, n_steps, phasors, layer)
        x = _normed(x, mel.norm.weight)
        return x.view(batch, n_steps, -1)


class PackedFine:
    """DepthTransformer.sample over packed blocks."""

    def __init__(self, fine: DepthTransformer, pack: Packer) -> None:
        config = fine.config
        self._blocks = _pack_blocks(fine.blocks, pack)
        self._phasors = RotaryTable(config.fine_head_dim, config.rope_base, fine.table)
        self._table = fine.table.detach()
        self._project = pack(_weight_of(fine.project).t())
        heads = fine.heads * fine.norm.weight
        self._ones = torch.ones_like(fine.norm.weight)
        self._heads = [pack(head) for head in heads.transpose(1, 2)]  # (W, V) each

    def sample(self, hidden: Tensor, coarse: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes (B, n_fine) of one step, from states (B, C) and coarse codes (B,)."""
        batch = len(hidden)
        state = self._project.mm(hidden)
        caches = [LayerCache(0, len(self._heads)) for _ in self._blocks]
        code, codes = coarse, []
        for depth, head in enumerate(self._heads):
            x = state + self._table[depth][code]
            phasors = self._phasors(depth, 1)
            for block, cache in zip(self._blocks, caches, strict=True):
                x = block(x, batch, 1, phasors, cache)
            x = _normed(x, self._ones)
            code = draw(head.mm(x))
            codes.append(code)
        return torch.stack(codes, 1)


@torch.no_grad()
def round_weights(model: HybridModel, weight_dtype: str) -> None:
    """Gives a model the matrices that InferenceModel(model, weight_dtype) computes with, in
    place: norms' gains are in the matrix behind them, and are 1."""
    dtype = _TORCH_DTYPES[weight_dtype]
    if dtype is None:
        return

    def round_(weight: Tensor, norm: nn.RMSNorm | None = None) -> None:
        """weight (..., F, C), behind a norm over C."""
        if norm is not None:
            weight *= norm.weight
        for matrix in weight.view(-1, *weight.shape[-2:]):
            matrix.copy_(rounded(matrix.t(), dtype).t())

    for block in model.modules():
        if isinstance(block, Block):
            round_(block.attention.qkv.weight, block.attention_norm)
            round_(block.attention.out.weight)
            round_(block.ffn.up.weight, block.ffn_norm)
            round_(block.ffn.down.weight)
            for norm in (block.attention_norm, block.ffn_norm):
                nn.init.ones_(norm.weight)
    round_(model.head.weight)
    if model.latent is not None:
        round_(model.latent.up.weight)
        round_(model.latent.down.weight)
    if model.fine is not None:
        round_(model.fine.project.weight)
        round_(model.fine.heads, model.fine.norm)
        nn.init.ones_(model.fine.norm.weight)


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The matrix (F, C) and bias (F,) of a linear layer, or of what was put in its place (LoRA,
    weight norm, quantisation): its images of zero and of the unit vectors."""
    if is_plain(layer, nn.Linear, may_have_bias=True):
        weight, bias = (getattr(layer, name) for name in ("weight", "bias"))
        none = weight.new_zeros(len(weight))
        return weight.detach(), none if bias is None else bias.detach()
    widths = (getattr(module, "in_features", None) for module in layer.modules())
    width = next((width for width in widths if width is not None), None)
    if width is None:
        raise ConfigError(
            f"{type(layer).__name__}: generation expects a layer with in_features here, to compute "
            "its matrix; merge the adapter into the model first"
        )
    inside = (t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
    points = torch.eye(width + 1, width).to(next(inside, torch.empty(0)))
    modes = {module: module.training for module in layer.modules()}
    try:
        images = layer.eval()(points)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return (images[:-1] - images[-1]).t(), images[-1]


def _weight_of(layer: nn.Module) -> Tensor:
    """The matrix of a linear layer without bias. Raises ConfigError where there is one."""
    weight, bias = _affine(layer)
    if bias.any():
        raise ConfigError(
            f"{type(layer).__name__}: generation expects a layer without bias here; train the "
            "adapter without one (peft: bias='none', lora_bias=False)"
        )
    return weight


def _pack_blocks(blocks: torch.nn.ModuleList, pack: Packer) -> list[InferenceBlock]:
    return [InferenceBlock(block, pack) for block in blocks if isinstance(block, Block)]
