"""This process of a training and its peers under torchrun."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wgpt.ops.runtime import resolve_device


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """This process among those of torchrun; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def join(device: str) -> ProcessGroup:
        """Reads torchrun's environment and, if there are several processes, joins them."""
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        name = resolve_device(device)
        if name == "cuda" and size > 1:
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        chosen = torch.device(name)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if size > 1 and not dist.is_initialized():
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        return ProcessGroup(rank, size, chosen)

    def leave(self) -> None:
        """Ends the process group, so that no process is torn down with its peers' links open."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return (
            flag
            if self.size == 1
            else bool(self.sum(torch.tensor(float(flag), device=self.device)))
        )

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sums gradients over processes, in one flat message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
