"""Tensors of a checkpoint in a file for each process: torch.distributed.checkpoint, safetensors.

    FOLDER/optimizer-00001-of-00002.safetensors    what the first of two processes holds

Each file's header says where its parts lie in the whole tensors, so that any number of processes
reads what it needs of any number of files; a file without that holds whole tensors. No pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch.distributed as dist
from torch import Tensor

from wgpt.errors import CheckpointError

_STEM = "optimizer"


def path_of(folder: Path, rank: int, size: int) -> Path:
    """The file of a process."""
    return folder / f"{_STEM}-{rank + 1:05d}-of-{size:05d}.safetensors"


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes sharded tensors into an existing folder; all processes call this.

    A 0-dimensional one is written as (1,). Raises OSError in all where one cannot write.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, save

    given = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
    with _plain_errors(folder):
        save(
            given,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),  # the same each time
        )
    if dist.get_rank() == 0:
        size = dist.get_world_size()
        for rank in range(size):
            # Looked up by name: another host's new file need not be in the folder's cached list.
            made = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            if made.exists():  # a process may have nothing
                made.rename(path_of(folder, rank, size))


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, whole or sharded, from all safetensors files of a folder; each process reads
    its own parts. Raises CheckpointError where the files hold others."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    found = names_in(folder)
    if found != set(tensors):
        odd = sorted(found ^ set(tensors))[0]
        what = f"has no {odd}" if odd in tensors else f"holds {odd}, which this model has not"
        raise CheckpointError(f"{folder}: {what}")
    scalars = {name: t for name, t in tensors.items() if t.dim() == 0}
    for file in _files(folder):
        with safetensors.safe_open(file, "pt") as opened:
            for name in scalars.keys() & set(opened.keys()):
                scalars[name].copy_(opened.get_tensor(name).reshape(()))
    rest = {name: t for name, t in tensors.items() if t.dim()}
    with _plain_errors(folder):
        load(rest, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def names_in(folder: Path) -> set[str]:
    """Names of the tensors in all safetensors files of a folder."""
    names: set[str] = set()
    for file in _files(folder):
        with safetensors.safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """What went wrong in any process, instead of torch's CheckpointException, which is no
    Exception."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming a single process", as asked
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError):
            raise cause from None
        raise CheckpointError(f"{folder}: process {rank}: {cause}") from None
