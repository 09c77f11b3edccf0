"""The layers of an EnCodec at work: each takes new samples and the state the last call left.

One frame is hardly any arithmetic, so the cost is the number of tensor operations. Sound is kept
time-major, (B, n, C): a convolution is then one GEMM over a strided view of its input,

    inputs   [ context | new samples ]      a window of k samples: k*C neighbouring numbers
    outputs            [ one per hop ]      windows (B*n, k*C) @ weight (k*C, C_out) + bias

and a transposed convolution with kernel 2r and stride r is the same with windows of two samples
and r*C_out outputs, read as r samples. Weight normalisation is folded in at construction. GEMMs
are ops.PackedMatrix's, so an item of a batch gets the bits that it gets alone.
States are replaced by every step and never written to, so copies of a stream can share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from wgpt import ops
from wgpt.codec import network
from wgpt.codec.network import Architecture, Conv, Lstm, Residual

State = Any  # a tensor (B, ...) or a tuple of them


def _left_context(x: Tensor, n_context: int, reflect: bool) -> Tensor:
    """What stands before the first samples x (B, n, C): zeros, or x mirrored about x[:, 0].

    Too short an x is continued by zeros before it is mirrored, as in transformers.
    """
    if not reflect:
        return x.new_zeros(x.shape[0], n_context, x.shape[2])
    missing = n_context + 1 - x.shape[1]
    if missing > 0:
        x = F.pad(x, (0, 0, 0, missing))
    return x[:, 1 : n_context + 1].flip(1)


class Layer(Protocol):
    """One stage of a stream: parameters only, since the state belongs to the stream."""

    n_start: int  # samples that must be there before the first step
    up: int  # samples out for `down` samples in
    down: int

    def start(self, x: Tensor) -> State:
        """The state before the first samples x (B, n, C)."""

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Samples (B, n, C) to samples (B, n * up // down, C_out), and the next state."""


class Convolution:
    """ELU or nothing, then a causal convolution, or a transposed one as a convolution of pairs."""

    def __init__(self, conv: Conv, tensors: Mapping[str, Tensor], reflect: bool) -> None:
        weight = network.effective_weight(conv, tensors)
        bias = tensors[f"{conv.name}.bias"]
        if conv.up > 1:
            # Tap 0 is the previous input: the second half of its kernel falls on this output.
            weight = weight.unflatten(2, (2, conv.up)).flip(2)  # (C, C_out, 2, r)
            weight = weight.permute(2, 0, 3, 1)  # (2, C, r, C_out)
            self.kernel, self.dilation, self.down, self.up = 2, 1, 1, conv.up
            weight, self.bias = weight.flatten(2).flatten(0, 1), bias.repeat(conv.up)
            reflect = False
        else:
            self.kernel, self.dilation = conv.kernel, conv.dilation
            self.down, self.up = conv.stride, 1
            weight, self.bias = weight.permute(2, 1, 0).flatten(0, 1), bias.clone()
        self.weight = ops.PackedMatrix(weight)  # (k * C, r * C_out)
        self.n_context = (self.kernel - 1) * self.dilation + 1 - self.down
        self.elu, self.reflect = conv.elu, reflect
        self.n_start = self.n_context + 1 if reflect and self.n_context else 1

    def start(self, x: Tensor) -> Tensor:
        context = _left_context(x, self.n_context, self.reflect)
        return F.elu(context) if self.elu else context

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        n_batch, n_in, n_channels = x.shape
        if self.elu:
            x = F.elu(x)
        if self.kernel > 1:
            x = torch.cat((state, x), 1)
            row, sample, channel = x.stride()
            windows = x.as_strided(
                (n_batch, n_in // self.down, self.kernel, n_channels),
                (row, self.down * sample, self.dilation * sample, channel),
            ).reshape(-1, self.weight.shape[0])
            state = x[:, n_in:]
        else:
            windows = x.reshape(-1, n_channels)
        out = self.weight.addmm(self.bias, windows)
        return out.view(n_batch, n_in // self.down * self.up, -1), state


class ResidualBlock:
    """x or a 1x1 convolution of it, plus ELU, convolution, ELU, 1x1 convolution of x."""

    up = down = 1

    def __init__(self, block: Residual, tensors: Mapping[str, Tensor], reflect: bool) -> None:
        self.inner = Convolution(block.inner, tensors, reflect)
        self.n_start = self.inner.n_start
        outer = Convolution(block.outer, tensors, reflect)
        self.weight, self.bias = outer.weight, outer.bias
        self.shortcut = None
        if block.shortcut is not None:
            shortcut = Convolution(block.shortcut, tensors, reflect)
            self.shortcut, self.bias = shortcut.weight, self.bias + shortcut.bias

    def start(self, x: Tensor) -> Tensor:
        return self.inner.start(x)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = self.inner.step(x, state)
        hidden = F.elu_(hidden).flatten(0, 1)  # hidden is ours alone
        flat = x.reshape(-1, x.shape[2])
        if self.shortcut is None:
            out = self.weight.addmm(self.bias, hidden).add_(flat)
        else:
            out = self.shortcut.addmm(self.bias, flat)
            out = self.weight.addmm(out, hidden)
        return out.view(x.shape), state


class LstmStack:
    """x plus a stack of LSTM layers over x."""

    n_start = up = down = 1

    def __init__(self, lstm: Lstm, tensors: Mapping[str, Tensor]) -> None:
        self.width = lstm.width
        self.layers = []
        for i in range(lstm.n_layers):
            names = (f"weight_ih_l{i}", f"weight_hh_l{i}", f"bias_ih_l{i}", f"bias_hh_l{i}")
            w_in, w_hidden, b_in, b_hidden = (tensors[f"{lstm.name}.{n}"] for n in names)
            # torch orders the gates i, f, g, o; the three sigmoids go side by side here.
            order = torch.arange(4 * self.width, device=w_in.device).view(4, -1)
            order = order[[0, 1, 3, 2]].flatten()
            self.layers.append(
                (
                    ops.PackedMatrix(w_in[order].t()),
                    ops.PackedMatrix(w_hidden[order].t()),
                    (b_in + b_hidden)[order],
                )
            )

    def start(self, x: Tensor) -> State:
        return (x.new_zeros(x.shape[0], self.width),) * (2 * len(self.layers))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        width, sequence, after = self.width, x, []
        for i, (w_in, w_hidden, bias) in enumerate(self.layers):
            hidden, cell = state[2 * i : 2 * i + 2]
            gates_in = w_in.addmm(bias, sequence.reshape(-1, width))
            outputs = []
            for gate_in in gates_in.view(*x.shape[:2], -1).unbind(1):
                gates = w_hidden.addmm(gate_in, hidden)
                update, keep, show = gates[:, : 3 * width].sigmoid().chunk(3, 1)
                cell = torch.addcmul(keep * cell, update, gates[:, 3 * width :].tanh())
                hidden = show * cell.tanh()
                outputs.append(hidden)
            sequence = torch.stack(outputs, 1)
            after += [hidden, cell]
        return sequence + x, tuple(after)


def build(plan: list[network.Layer], tensors: Mapping[str, Tensor], reflect: bool) -> list[Layer]:
    """Layers of a plan, in order, with copies of their parameters.

    reflect says whether convolutions start from mirrored samples instead of zeros.
    """
    layers: list[Layer] = []
    for layer in plan:
        if isinstance(layer, Lstm):
            layers.append(LstmStack(layer, tensors))
        elif isinstance(layer, Residual):
            layers.append(ResidualBlock(layer, tensors, reflect))
        else:
            layers.append(Convolution(layer, tensors, reflect))
    return layers


class Network:
    """An EnCodec network ready to run: the layers of both directions and the codebooks.

    Its streams (`wgpt.codec.stream`) share these parameters; nothing writes to them.

    Attributes:
        architecture: its shape.
        encoder, decoder: layers in the order that sound passes them.
        codebooks: float32 (K, V, E).
    """

    def __init__(self, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
        """tensors: float32, under the names of transformers, of `parameter_shapes`."""
        self.architecture = architecture
        reflect = architecture.pad_mode == "reflect"
        self.encoder = build(network.encoder_layers(architecture), tensors, reflect)
        self.decoder = build(network.decoder_layers(architecture), tensors, reflect)
        names = (f"quantizer.layers.{k}.codebook.embed" for k in range(architecture.n_codebooks))
        self.codebooks = torch.stack([tensors[name] for name in names])


def repeat(state: State, n: int) -> State:
    """The state of a stream of one for a batch of n."""
    if isinstance(state, tuple):
        return tuple(repeat(x, n) for x in state)
    return None if state is None else state.repeat(n, *[1] * (state.dim() - 1))


def concatenate(states: list[State]) -> State:
    """States of several streams as that of one batch."""
    if isinstance(states[0], tuple):
        return tuple(concatenate(list(x)) for x in zip(*states, strict=True))
    return torch.cat(states)
