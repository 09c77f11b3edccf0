"""This process of a training and its peers under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from wgpt.errors import ConfigError, TrainError, WgptError
from wgpt.ops.runtime import resolve_device

TIMEOUT = "WGPT_TIMEOUT_S"  # environment: how long a process waits for the others, s
_TIMEOUT_S = 3600.0  # validation and saving are the first process's, and the others wait
_BOARD = "wgpt-failed"  # key of the first message of a process that failed
_POLL_S = 0.05
_BOARD_S = 5.0  # a peer that fails closes its links before its message can be read


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """This process among those of torchrun; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    store: Any = None  # what all processes can read and write, where there are several

    @staticmethod
    def join(device: str) -> ProcessGroup:
        """Reads torchrun's environment and, if there are several processes, joins them.

        Raises ConfigError for a timeout that is none, or for more processes than GPUs; TrainError
        where not all come.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            n_gpus = torch.cuda.device_count()
            if local >= n_gpus:
                raise ConfigError(
                    f"--device {device}: each process of torchrun needs a GPU of its own, and this "
                    f"machine has {n_gpus}; --nproc-per-node={n_gpus}, or --device cpu"
                )
            torch.cuda.set_device(local)  # before anything runs: all would take memory of GPU 0
        name = resolve_device(device)
        if name == "cuda" and size > 1:
            name = f"cuda:{local}"
        chosen = torch.device(name)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if size == 1:
            return ProcessGroup(rank, size, chosen)
        wait = timedelta(seconds=_timeout_s())
        shared, _, _ = next(iter(rendezvous("env://", timeout=wait)))
        store = store_of_this_start(shared, rank, size, wait.total_seconds())
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                store=dist.PrefixStore("torch", store),
                rank=rank,
                world_size=size,
                timeout=wait,
            )
        return ProcessGroup(rank, size, chosen, store)

    def leave(self) -> None:
        """Ends the process group, so that no process is torn down with its peers' links open."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # -- values --------------------------------------------------------------------------------

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

    # -- gradients -----------------------------------------------------------------------------

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module under DistributedDataParallel: its backward sums the gradients of all
        processes, bucket by bucket while it runs; alone the module itself."""
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # Buffers are constants. torch 2.13 renamed the argument.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        parallel = nn.parallel.DistributedDataParallel(module, **options)
        parallel.register_comm_hook(None, _sum_bucket)
        return parallel

    # -- failures ------------------------------------------------------------------------------

    def tell(self, error: Exception | str) -> None:
        """Leaves word of why this process ends, for those that wait for it."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # whose host may have ended too
                self.store.compare_set(_BOARD, "", f"process {self.rank}: {error}")

    def explain(self, error: RuntimeError) -> str | None:
        """Why a collective failed: what the process that ended left word of, the timeout, or that
        it was killed. None where the error is another."""
        if self.size == 1 or isinstance(error, WgptError):
            return None
        said = str(error)
        is_late = "out waiting" in said or "imed out" in said or "imeout" in said
        if not (is_late or isinstance(error, dist.DistError) or "onnection" in said):
            return None
        with contextlib.suppress(RuntimeError):
            self.store.wait([_BOARD], timedelta(seconds=_BOARD_S))
            return str(self.store.get(_BOARD).decode())
        if is_late:
            return (
                f"process {self.rank} waited {_timeout_s():g} s for the others, which validate, "
                f"save or hang; {TIMEOUT}=SECONDS lets it wait longer"
            )
        return "another process ended without a word (killed?); torchrun says which"


def store_of_this_start(shared: Any, rank: int, size: int, wait_s: float) -> Any:
    """The part of a store that all processes started together share, and nobody did before.

    torchrun keeps its store when it starts processes again, with the addresses of those that ended,
    and hosts may count restarts differently (https://github.com/pytorch/pytorch/issues/135712). So
    each process says a word of its own, and the first repeats all words until everybody has seen
    theirs among them.

    Raises TrainError where they do not all come within wait_s.
    """
    mine, said = uuid.uuid4().hex, [f"wgpt-said-{i}" for i in range(size)]
    seen = [f"wgpt-seen-{i}" for i in range(1, size)]
    shared.set(said[rank], mine)
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        if rank == 0 and shared.check(said):
            words = b",".join(shared.get(key) for key in said)
            shared.set("wgpt-words", words)
            if shared.check(seen) and all(shared.get(key) == words for key in seen):
                shared.set("wgpt-agreed", words)
                return dist.PrefixStore(mine, shared)
        elif rank and shared.check(["wgpt-words"]):
            words = shared.get("wgpt-words")
            if mine.encode() in words:
                shared.set(seen[rank - 1], words)
                if shared.check(["wgpt-agreed"]) and shared.get("wgpt-agreed") == words:
                    return dist.PrefixStore(words.decode().partition(",")[0], shared)
        time.sleep(_POLL_S)
    raise TrainError(
        f"process {rank} waited {wait_s:g} s for all {size} to start; torchrun says which did not"
    )


def _timeout_s() -> float:
    """Seconds that a process waits for the others."""
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given) if given else _TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 30 * 86400:
        raise ConfigError(f"{TIMEOUT} must be seconds above 0, at most 30 days, got {given!r}")
    return seconds


def is_first_process() -> bool:
    """Whether this one speaks for all of torchrun's; alone it does."""
    return int(os.environ.get("RANK", 0)) == 0


# DistributedDataParallel refuses annotations that are strings, as all are in this file.
def _sum_bucket(_, bucket):  # type: ignore[no-untyped-def]
    """Gradients of a bucket summed over processes: the loss is already a share of the whole."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
