"""An EnCodec network with gradients, on a CPU: every convolution a matrix product in bfloat16.

Sound is time-major, (B, T, C), and f neighbouring samples are one row of f C numbers, so that few
channels at a high rate still fill a matrix. A causal convolution is then

    rows     [ last p samples of the row before | f samples ]     (B T/f, (p + f) C)
    weight   banded: tap j of output i stands at sample i stride + j dilation
    outputs  [ f / stride samples ]                               (B T/f, f / stride C_out)

The bands waste two thirds of the multiplications at the audio rate, and pay all the same: on an
AMX core a layer of 16 channels takes 0.6 ms for eight seconds of sound, against 12 to 20 ms in
torch's conv1d with its gradients (docs/log.md). Weights, gains and the first and last samples are
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wgpt.codec.network import Conv, Layer, Lstm, Residual, effective_weight

ROW = 128  # numbers in a row, about: two AMX tiles of bfloat16 pairs

Parameters = Mapping[str, Tensor]


def _band_index(conv: Conv, n_rows: int, n_out: int) -> Tensor:
    """Which tap stands at (input sample, output sample), the kernel's size where none does."""
    at = torch.arange(n_rows)[:, None] - conv.stride * torch.arange(n_out)
    tap = at // conv.dilation
    holds = (at >= 0) & (at % conv.dilation == 0) & (tap < conv.kernel)
    return torch.where(holds, tap, conv.kernel)


def _context(before: int, row: int) -> Iterator[tuple[int, int, int]]:
    """Where the numbers before a row come from: (first place, how many, how many rows back)."""
    for shift in range(1, -(-before // row) + 1):
        first = max(0, before - shift * row)
        yield first, before - (shift - 1) * row - first, shift


class _RowConv(torch.autograd.Function):
    """ELU or nothing, then one matrix product of rows with their context."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, fold: int, context: int, elu: bool
    ) -> Tensor:
        n_batch, n, channels = x.shape
        x = x.view(n_batch, n // fold, fold * channels)
        before = context * channels
        if elu or context:
            rows = x.new_empty(n_batch, n // fold, before + fold * channels)
            here = rows[:, :, before:]
            torch.ops.aten.elu.out(x, out=here) if elu else here.copy_(x)
            for first, width, shift in _context(before, fold * channels):
                rows[:, shift:, first : first + width] = here[:, :-shift, -width:]
                rows[:, :shift, first : first + width] = 0
        else:
            rows = x
        ctx.save_for_backward(rows, weight)
        ctx.n, ctx.before, ctx.elu = n, before, elu
        return torch.addmm(bias, rows.flatten(0, 1), weight).view(n_batch, n // fold, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        d_out = grads[0].contiguous()
        flat = d_out.flatten(0, 1)
        d_weight = rows.flatten(0, 1).T @ flat
        d_bias = flat.sum(0)
        d_x = None
        if ctx.needs_input_grad[0]:
            before = ctx.before
            d_x = (flat @ weight[before:].T).view(*rows.shape[:2], -1)
            if before:
                d_before = (flat @ weight[:before].T).view(*rows.shape[:2], -1)
                for first, width, shift in _context(before, d_x.shape[2]):
                    d_x[:, :-shift, -width:] += d_before[:, shift:, first : first + width]
            if ctx.elu:
                d_x = torch.ops.aten.elu_backward(d_x, 1.0, 1.0, 1.0, True, rows[:, :, before:])
            d_x = d_x.reshape(rows.shape[0], ctx.n, -1)
        return d_x, d_weight, d_bias, None, None, None


class Forward:
    """Runs layers with gradients.

    dtype: bfloat16, or float32 where bfloat16 is slow.
    """

    def __init__(self, layers: list[Layer], n_samples: int, dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self._plans: dict[str, tuple[int, int, Tensor | None]] = {}
        for layer in layers:
            n_samples = self._plan(layer, n_samples)

    def _plan(self, layer: Layer, n: int) -> int:
        if isinstance(layer, Residual):
            for conv in (layer.inner, layer.outer, layer.shortcut):
                if conv is not None:
                    self._plan(conv, n)
            return n
        if isinstance(layer, Lstm):
            return n
        if layer.up > 1:
            self._plans[layer.name] = (1, 1, None)
            return n * layer.up
        fold = layer.stride
        while fold * max(layer.n_in, layer.n_out // layer.stride) < ROW and n % (2 * fold) == 0:
            fold *= 2
        context = (layer.kernel - 1) * layer.dilation + 1 - layer.stride
        index = None
        if fold > layer.stride:
            index = _band_index(layer, context + fold, fold // layer.stride)
        self._plans[layer.name] = (fold, context, index)
        return n // layer.stride

    def matrices(self, parameters: Parameters) -> dict[str, tuple[Tensor, Tensor]]:
        """The banded weight, in `dtype`, and the bias of every convolution."""
        found = {}
        for layer in self.layers:
            parts = [layer] if isinstance(layer, Conv) else []
            if isinstance(layer, Residual):
                parts = [c for c in (layer.inner, layer.outer, layer.shortcut) if c is not None]
            for conv in parts:
                weight = effective_weight(conv, parameters)
                weight = weight.permute((2, 0, 1) if conv.up > 1 else (2, 1, 0))  # (k, in, out)
                fold, _, index = self._plans[conv.name]
                if conv.up > 1:  # (2 up, C_in, C_out): taps of the sample itself, of the one before
                    halves = weight.unflatten(0, (2, conv.up)).flip(0).permute(0, 2, 1, 3)
                    matrix = halves.flatten(2).flatten(0, 1)
                    n_out = conv.up
                elif index is None:
                    matrix, n_out = weight.flatten(0, 1), 1
                else:
                    bands = F.pad(weight, (0, 0, 0, 0, 0, 1))[index]  # (rows, outs, C_in, C_out)
                    matrix = bands.transpose(1, 2).flatten(2).flatten(0, 1)
                    n_out = fold // conv.stride
                bias = parameters[f"{conv.name}.bias"].repeat(n_out)
                found[conv.name] = (matrix.to(self.dtype), bias.to(self.dtype))
        return found

    def _conv(self, conv: Conv, x: Tensor, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        weight, bias = matrices[conv.name]
        fold, context, _ = self._plans[conv.name]
        n_batch, n, _ = x.shape
        out: Any = _RowConv.apply(x, weight, bias, fold, context, conv.elu)
        return out.view(n_batch, n // conv.stride * conv.up, conv.n_out)

    def convolve(
        self, layers: list[Layer], x: Tensor, matrices: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Layers without LSTM."""
        for layer in layers:
            if isinstance(layer, Residual):
                inner = self._conv(layer.inner, x, matrices)
                skip = x if layer.shortcut is None else self._conv(layer.shortcut, x, matrices)
                x = skip + self._conv(layer.outer, inner, matrices)
            elif isinstance(layer, Conv):
                x = self._conv(layer, x, matrices)
        return x

    def lstm(self, layer: Lstm, x: Tensor, parameters: Parameters) -> Tensor:
        """x plus the LSTM of x, (B, T, C)."""
        flat = [
            parameters[f"{layer.name}.{kind}_l{i}"].to(self.dtype)
            for i in range(layer.n_layers)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        zero = x.new_zeros(layer.n_layers, x.shape[0], layer.width)
        out = torch.lstm(
            x.transpose(0, 1).contiguous(), (zero, zero), flat, True, layer.n_layers, 0.0, True,
            False, False,
        )[0]  # fmt: skip
        return x + out.transpose(0, 1)
