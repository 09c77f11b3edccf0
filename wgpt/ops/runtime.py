"""Where torch computes: the device a name stands for, and how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wgpt.errors import ConfigError


def resolve_device(name: str) -> str:
    """`auto` becomes cuda if there is one, else cpu. Raises ConfigError for what is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if n_cuda else []), *(f"cuda:{i}" for i in range(n_cuda))]
    if name not in known:
        raise ConfigError(
            f"device must be auto or, on this machine, one of {', '.join(known)}, got {name!r}"
        )
    return name


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
