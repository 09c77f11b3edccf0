"""This process of a training: its device, its peers under torchrun, its memory."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wgpt.config import ConfigError


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those of torchrun; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def join(device: str) -> World:
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
        return World(rank, size, chosen)

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


def resolve_device(name: str) -> str:
    """`auto` becomes cuda if there is one, else cpu. Raises ConfigError for what is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"device must be auto, cpu, or an available cuda device, got {name!r}")
    return name


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, which allocates the same again.

    By default it hands large blocks back to the kernel, and every step pays for some ten thousand
    page faults. And the kernel is asked to back the heap with huge pages, as far as it goes: a step
    walks through hundreds of megabytes. docs/log.md has both figures. No-op with another C library.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (AttributeError, OSError):
        return
    m_trim_threshold, m_mmap_threshold, madv_hugepage = -1, -3, 14  # malloc.h, sys/mman.h
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 2**31 - 1)
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Blocks that are never touched take address space only; freed, they stay the heap's end, from
    # which later ones are cut, and keep the advice. Two, just below the limits, or they would go.
    page = 2 << 20
    n_bytes = (1 << 30) - page
    blocks = [block for block in (malloc(n_bytes), malloc(n_bytes)) if block is not None]
    for block in blocks:
        begin = -(-block // page) * page
        madvise(begin, (block + n_bytes - begin) // page * page, madv_hugepage)
    for block in blocks:
        free(block)
