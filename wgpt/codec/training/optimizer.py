"""The codec's optimiser: Muon for matrices, AdamW for the rest, in steps relative to their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Optimiser groups whose `size` makes a step relative to the size of the tensors in it.

    Adam's steps are absolute. The gain of the decoder's last layer is about 0.02 and an absolute
    step that suits the others throws it about (measured: gradients grew a hundredfold within a
    thousand steps, the activations too, and training diverged). Sizes are rounded to powers of
    two, so that there are few groups; gains take a seventh of the others' step.
    """
    by_size: dict[int, list[Tensor]] = {}
    for name, parameter in parameters.items():
        size = float(parameter.detach().square().mean().sqrt())
        if name.endswith("original0"):
            size *= 0.15
        elif "bias" in name:
            size = 0.03
        by_size.setdefault(round(math.log2(max(size, 1e-4))), []).append(parameter)
    return [{"params": group, "size": 2.0**power} for power, group in sorted(by_size.items())]


class Optimizer:
    """Muon for matrices (convolutions flattened to two dimensions), AdamW for gains and biases.

    Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal one, so
    that every direction is learnt at the same speed: the autoencoder reaches in 800 steps what
    takes Adam about 8,000 (docs/log.md). Steps are relative to a tensor's size at the start.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        matrices = {
            k: p for k, p in parameters.items()
            if p.dim() >= 2 and not k.endswith("original0") and min(p.flatten(1).shape) > 1
        }  # fmt: skip
        # torch's Muon takes matrices only: the same memory under another shape.
        self._flat = {k: nn.Parameter(p.detach().flatten(1)) for k, p in matrices.items()}
        self._matrices = matrices
        groups = [
            {"params": [flat], "size": float(flat.detach().square().mean().sqrt()) / 0.2}
            for flat in self._flat.values()
        ]  # "match_rms_adamw" makes the root mean square of a step 0.2 lr
        rest = {k: p for k, p in parameters.items() if k not in matrices}
        self._muon = torch.optim.Muon(
            groups, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(
            parameter_groups(rest), betas=(0.9, 0.98), weight_decay=0.0, foreach=True
        )
        self._named = self._flat | rest

    def step(self, lr: float) -> None:
        """One step of size `lr` relative to the tensors; reads the gradients."""
        for k, p in self._matrices.items():
            self._flat[k].grad = None if p.grad is None else p.grad.flatten(1)
        for optimizer in (self._muon, self._adam):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["size"]
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state, as "<what>.<parameter>"."""
        return {
            f"{what}.{k}": value
            for k, p in self._named.items()
            for optimizer in (self._muon, self._adam)
            for what, value in optimizer.state.get(p, {}).items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for k, p in self._named.items():
            optimizer = self._muon if k in self._flat else self._adam
            names = ("momentum_buffer",) if k in self._flat else ("step", "exp_avg", "exp_avg_sq")
            if f"{names[0]}.{k}" in tensors:
                optimizer.state[p] = {name: tensors[f"{name}.{k}"] for name in names}
