"""Calls of the five ops of the training step, with sizes that cross their internal limits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from op_cases import Call
from torch import Tensor

WIDE = {torch.float64: torch.float64}  # else float32


@dataclass
class FirstOutputs(Call):
    """A call whose integer outputs are left out: they have no gradient."""

    def _floating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
            result = function(*arguments, **options)
            outputs = result if isinstance(result, tuple) else (result,)
            return tuple(y for y in outputs if y.is_floating_point())

        return call

    @property
    def op(self) -> Callable[..., Any]:
        return self._floating(super().op)

    @property
    def reference(self) -> Callable[..., Any]:
        return self._floating(super().reference)

    def converted(self, dtype: torch.dtype) -> "FirstOutputs":
        options = {k: dtype if k == "dtype" else v for k, v in self.options.items()}
        return FirstOutputs(self.name, super().converted(dtype).tensors, self.parameters, options)


def norm_call(rows: int = 7, channels: int = 13, *, dtype=torch.float32, delta=True):
    tensors = {
        "x": torch.randn(2, rows, channels).to(dtype),
        "delta": torch.randn(2, rows, channels).to(dtype) if delta else None,
        "weight": torch.randn(channels, dtype=WIDE.get(dtype, torch.float32)),
    }
    return FirstOutputs("add_rms_norm", tensors, ("x", "delta", "weight"), {"eps": 1e-6})


def rotary_call(steps: int = 7, heads: int = 3, head_dim: int = 32, *, dtype=torch.float32):
    angles = torch.rand(steps, head_dim // 2, dtype=torch.float64) * 6
    wide = WIDE.get(dtype, torch.float32)
    tensors = {
        "qkv": torch.randn(2, steps, 3, heads, head_dim).to(dtype),
        "cos": angles.cos().to(wide),
        "sin": angles.sin().to(wide),
    }
    return FirstOutputs("rotary_qkv", tensors, ("qkv",))


def linear_call(rows: int = 7, channels: int = 13, outputs: int = 29, *, dtype=torch.float32):
    tensors = {
        "x": torch.randn(rows, channels).to(dtype),
        "weight": torch.randn(outputs, channels).mul(channels**-0.5).to(dtype),
    }
    return FirstOutputs("linear", tensors, ("x", "weight"))


def ffn_call(rows: int = 7, channels: int = 13, hidden: int = 29, *, dtype=torch.float32):
    tensors = {
        "x": torch.randn(rows, channels).to(dtype),
        "up": torch.randn(hidden, channels).mul(channels**-0.5).to(dtype),
        "down": torch.randn(channels, hidden).mul(hidden**-0.5).to(dtype),
    }
    return FirstOutputs("feed_forward", tensors, ("x", "up", "down"))


def loss_call(rows: int = 7, channels: int = 13, vocab: int = 29, *, dtype=torch.float32):
    targets = torch.randint(vocab, (rows,))
    targets[::3] = -1
    tensors = {
        "hidden": torch.randn(rows, channels).to(dtype),
        "weight": torch.randn(vocab, channels).mul(channels**-0.5).to(dtype),
        "targets": targets,
    }
    return FirstOutputs("linear_cross_entropy", tensors, ("hidden", "weight"))


MAKERS: dict[str, Callable[..., FirstOutputs]] = {
    "add_rms_norm": norm_call,
    "rotary_qkv": rotary_call,
    "linear": linear_call,
    "feed_forward": ffn_call,
    "linear_cross_entropy": loss_call,
}
SIZES = {
    "add_rms_norm": [{"rows": 1, "channels": 1}, {"rows": 131, "channels": 256}, {"delta": False}],
    "rotary_qkv": [{"steps": 1, "heads": 1}, {"steps": 67, "head_dim": 64}, {"head_dim": 6}],
    # Whole and partial panels, blocks of rows and of depth in every direction, and small GEMMs.
    "linear": [
        {"rows": 1},
        {"rows": 701, "channels": 300, "outputs": 257},
        {"rows": 33, "channels": 20001, "outputs": 65},
        {"rows": 16384, "channels": 32, "outputs": 64},
    ],
    "feed_forward": [
        {"rows": 1},
        {"rows": 257, "channels": 64, "hidden": 255},
        {"rows": 2501, "channels": 201, "hidden": 240},
    ],
    "linear_cross_entropy": [
        {"rows": 1},
        {"rows": 131, "channels": 64, "vocab": 1024},
        {"rows": 2501, "channels": 201, "vocab": 240},
    ],
}
