"""What a long computation has of its process: device, threads, environment, signals."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from wgpt.errors import ConfigError
from wgpt.ops import cuda, info

log = logging.getLogger(__name__)

# What a user, a scheduler, a lost terminal and SLURM's --signal send.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


def resolve_device(name: str) -> str:
    """`auto` becomes cuda if there is a GPU that torch can use, else cpu.

    A GPU without kernels of ours serves too, in plain torch, and a logged warning says why.

    Raises:
        ConfigError: a device that is not there; or WGPT_REQUIRE_CUDA=1, and the device is a GPU
            without kernels of ours, or `auto` finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and _torch_can_use_gpu() else "cpu"
        if name == "cpu" and cuda.is_required():
            raise ConfigError(
                "device: WGPT_REQUIRE_CUDA=1 asks for a GPU, and there is none that torch "
                f"{torch.__version__} can use; wgpt doctor says more"
            )
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if n_cuda else []), *(f"cuda:{i}" for i in range(n_cuda))]
    if name not in known:
        raise ConfigError(
            f"device must be auto or, on this machine, one of {', '.join(known)}, got {name!r}"
        )
    cuda.runs_plain_torch(torch.device(name))  # warns, or raises, before anything starts
    return name


def _torch_can_use_gpu() -> bool:
    """Whether a kernel of torch itself runs there: its build may be too new for an old GPU."""
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        log.warning(
            "the GPU is left alone, for torch %s fails on it: %s", torch.__version__, reason
        )
        return False
    return True


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """What the bits of a training step depend on besides data and settings."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_target": info()["cpu_target"],
        "torch": torch.__version__,
    }


def warn_of_changes(then: Mapping[str, Any], step: int) -> None:
    """Says what of the environment differs from that in which a step was committed."""
    now = environment()
    for name, value in then.items():
        if value != now.get(name):
            log.warning(
                "%s: was %s when step %d was committed, now %s: the bits of further steps "
                "may differ from those of an uninterrupted run",
                name, value, step, now.get(name),
            )  # fmt: skip


class StopSignal:
    """Signals of STOPPING, noted instead of obeyed inside `with`: a loop asks `came` and saves.

    Only the main thread can be told. A signal that was ignored stays so (nohup). A second Ctrl-C
    raises KeyboardInterrupt: what is committed is whole at any moment.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: dict[int, Any] = {}
        self._saying: threading.Thread | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            heard = [s for s in STOPPING if signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._note) for s in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._saying is not None:
            self._saying.join()

    def _note(self, number: int, _: object) -> None:
        if self.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_first, self.came = not self.came, True
        if is_first:
            # By another thread: the signal may have come while this one writes to the same stream,
            # which is not reentrant.
            said = "stops after this step, and saves; a second Ctrl-C stops at once"
            self._saying = threading.Thread(target=log.info, args=(said,))
            self._saying.start()
