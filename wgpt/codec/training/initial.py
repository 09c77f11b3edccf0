"""Weights to start from: torch's draws, with every convolution scaled by data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wgpt.codec.network import (
    Architecture,
    Conv,
    Layer,
    Lstm,
    Residual,
    decoder_layers,
    encoder_layers,
    parameter_shapes,
)
from wgpt.codec.training.forward import Forward


def draw_parameters(a: Architecture, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Every tensor but the codebooks, as torch initialises Conv1d and LSTM, biases zero."""
    parameters: dict[str, nn.Parameter] = {}
    for name, shape in parameter_shapes(a).items():
        if name.startswith("quantizer."):
            continue
        value = torch.zeros(shape)
        if name.endswith("original1") or ".lstm.weight" in name:
            fan_in = shape[0] // 4 if ".lstm." in name else math.prod(shape[1:])
            limit = fan_in**-0.5
            value.uniform_(-limit, limit, generator=generator)
        parameters[name] = nn.Parameter(value)
    for name, parameter in parameters.items():
        if name.endswith("original0"):
            direction = parameters[name[:-1] + "1"].detach()
            parameter.data = direction.flatten(1).norm(dim=1).view(parameter.shape)
    return parameters


@torch.no_grad()
def scale_layers(a: Architecture, parameters: dict[str, nn.Parameter], wave: Tensor) -> None:
    """Scale every convolution in turn so that its output has unit variance on `wave` (B, L, 1).

    Layer-sequential unit-variance initialisation (Mishkin and Matas, 2016); the second
    convolution of a residual block gets half of that, the last of the decoder the level of the
    wave itself.
    """

    def run(conv: Conv, x: Tensor, target: float) -> Tensor:
        forward = Forward([conv], x.shape[1], torch.float32)
        out = forward.convolve([conv], x, forward.matrices(parameters))
        scale = target / max(float(out.std()), 1e-6)
        parameters[f"{conv.name}.parametrizations.weight.original0"].mul_(scale)
        return out * scale

    def walk(layers: list[Layer], x: Tensor, last: float) -> Tensor:
        for layer in layers:
            if isinstance(layer, Lstm):
                x = Forward([layer], x.shape[1], torch.float32).lstm(layer, x, parameters)
            elif isinstance(layer, Residual):
                skip = x if layer.shortcut is None else run(layer.shortcut, x, 1.0)
                x = skip + run(layer.outer, run(layer.inner, x, 1.0), 0.5)
            else:
                x = run(layer, x, last if layer is layers[-1] else 1.0)
        return x

    latents = walk(encoder_layers(a), wave, 1.0)
    walk(decoder_layers(a), latents, float(wave.std()))
