"""Encoding many files, here or in worker processes, with the same bytes either way.

Every encoder runs torch on one thread, so that the number of processes never changes a sum's
order; processes, not threads, use the cores.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wgpt.config import MelConfig
from wgpt.data.encode import CodecProtocol, Encoder, Job, Outcome, read_facts
from wgpt.data.levels import MelLevels
from wgpt.data.progress import Progress
from wgpt.data.scan import Found
from wgpt.data.treatment import Treatment
from wgpt.ops.runtime import one_thread

logger = logging.getLogger(__name__)

MANY_FILES, MANY_BYTES = 24, 8 << 20  # from here on worker processes pay for their start
# A decoder's crash and a lack of memory look alike from outside: the next run tries it again.
DIED = "its worker process died twice (killed, out of memory, or a crash)"


@dataclass(frozen=True)
class EncoderSpec:
    """All that a process needs to build its encoder; `codec` is a name, a path, or an object."""

    codec: str | Path | CodecProtocol
    mel: MelConfig
    mel_sources: tuple[str, ...]
    treatment: Treatment
    max_seconds: float
    download: bool
    levels: MelLevels | None = None

    def build(self) -> Encoder:
        """Load the codec and the mel front ends."""
        return Encoder(
            load_codec(self.codec, self.download),
            self.mel,
            self.mel_sources,
            self.treatment,
            self.max_seconds,
            self.levels,
        )


def load_codec(codec: str | Path | CodecProtocol, download: bool) -> CodecProtocol:
    """A codec by name or path; an object is returned as it is."""
    if not isinstance(codec, (str, Path)):
        return codec
    import wgpt.codec  # loading it costs seconds that `--help` should not pay

    loaded: CodecProtocol = wgpt.codec.load(str(codec), download=download)
    return loaded


def encode_all(
    found: Found,
    spec: EncoderSpec,
    encoder: Encoder,
    jobs: int | None,
    progress: bool,
    *,
    keep: Callable[[Path], None] | None = None,
    apart: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Encode what is not finished.

    Args:
        found: the recordings.
        spec, encoder: of the codec; the encoder is used where this process encodes.
        jobs: worker processes; None: as many as are worth it.
        progress: whether to show it.
        keep: called with every finished file.
        apart: use a worker process even for one job, so that a file which kills it is named.

    Returns:
        Facts and reasons for skipping, by sha256.
    """
    facts: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for digest, job in found.jobs.items():
        known = read_facts(Path(job.partial), spec.mel_sources)
        if known is not None:
            facts[digest] = known
    todo = [job for digest, job in found.jobs.items() if digest not in facts]
    n_jobs = choose_jobs(todo) if jobs is None else min(jobs, max(len(todo), 1))
    if any("memory://" in job.path for job in todo):  # of this process alone
        n_jobs, apart = 1, False
    if facts:
        logger.info("continuing: %d files finished before, %d to do", len(facts), len(todo))
    else:
        logger.info("encoding %d files, %d at a time", len(todo), n_jobs)
    meter = Progress("encoding", sum(job.size_bytes for job in todo), len(todo), progress)

    def finished(job: Job, done: Outcome) -> None:
        meter.advance(job.size_bytes)
        known = None if done.reason else read_facts(Path(job.partial), spec.mel_sources)
        if known is None:
            reasons[job.sha256] = done.reason or "its finished file could not be read back"
            logger.warning("skipped %s: %s", found.entries[job.sha256].name, reasons[job.sha256])
        else:
            facts[job.sha256] = known
            if keep is not None:
                keep(Path(job.partial))

    with contextlib.closing(meter):
        if n_jobs == 1 and not apart:
            encode_here(encoder, todo, finished)
        else:
            encode_in_processes(spec, todo, n_jobs, finished)
    return facts, reasons


def choose_jobs(todo: list[Job]) -> int:
    """A process per core where the work is worth their start of some seconds each."""
    n_bytes = sum(job.size_bytes for job in todo)
    if len(todo) < MANY_FILES and n_bytes < MANY_BYTES:
        return 1
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(min(n_cores or 1, len(todo)), 1)


def encode_here(
    encoder: Encoder, jobs: list[Job], finished: Callable[[Job, Outcome], None]
) -> None:
    """Encode one after another in this process, calling `finished` for each."""
    with one_thread():
        for job in jobs:
            finished(job, encoder.encode_file(job))


def encode_in_processes(
    spec: EncoderSpec, jobs: list[Job], n_workers: int, finished: Callable[[Job, Outcome], None]
) -> None:
    """Encode in `n_workers` processes, calling `finished` here for each in order of completion.

    If a worker dies (killed, out of memory, a crash in a decoder), the files in flight are tried
    again, each alone in a fresh process; one that kills it again is reported as bad.

    Raises:
        Whatever building an encoder or writing a result raises.
    """
    waiting = list(reversed(jobs))
    while waiting:
        # Few in flight, so that a crash makes few suspects.
        suspects = _run_pool(spec, waiting, n_workers, 2 * n_workers, finished)
        if suspects:
            names = ", ".join(job.path for job in suspects)
            logger.warning("a worker process died; trying one at a time: %s", names)
        while suspects:
            for job in _run_pool(spec, suspects, 1, 1, finished):
                finished(job, Outcome(job.sha256, reason=DIED))


def _run_pool(
    spec: EncoderSpec,
    waiting: list[Job],
    n_workers: int,
    n_ahead: int,
    finished: Callable[[Job, Outcome], None],
) -> list[Job]:
    """Empty `waiting` from its end; returns early with the jobs in flight if a worker dies."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(n_workers, len(waiting)), context, initializer=_start_worker, initargs=(spec,)
    )
    flying: dict[concurrent.futures.Future[Outcome], Job] = {}
    lost: list[Job] = []
    try:
        while (waiting or flying) and not lost:
            while waiting and len(flying) < n_ahead and not lost:
                job = waiting.pop()
                try:
                    flying[pool.submit(_encode, job)] = job
                except BrokenProcessPool:
                    lost.append(job)
            landed, _ = concurrent.futures.wait(
                flying, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in landed:
                job = flying.pop(future)
                try:
                    finished(job, future.result())
                except BrokenProcessPool:
                    lost.append(job)
        return [*lost, *flying.values()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# In a worker process: its encoder, or the exception that building it raised.
_built: Encoder | BaseException | None = None


def _start_worker(spec: EncoderSpec) -> None:
    global _built
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        _built = spec.build()
    except Exception as error:  # raised by the first task instead: a pool hides it here
        _built = error


def _leave_with_parent() -> None:
    """End this process when its parent is gone; a killed parent cannot say goodbye."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode(job: Job) -> Outcome:
    if isinstance(_built, Encoder):
        return _built.encode_file(job)
    raise _built if _built is not None else RuntimeError("worker: no encoder was built")
