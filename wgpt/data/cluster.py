"""All parts of a preparation on a Ray cluster: a task each, told of in the process that asked.

The parts are those of `parts`, so their files resume and merge as those of any machines. Every node
must see the recordings, and the folder or address of the parts, by the same name.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

from wgpt.data.folder import PART
from wgpt.data.inputs import Entry, Inputs
from wgpt.data.parts import hash_inputs, make_part, part_number
from wgpt.data.places import Place, absolute, below, places
from wgpt.data.progress import Progress
from wgpt.data.workers import EncoderSpec
from wgpt.errors import ConfigError, DataError, WgptError

logger = logging.getLogger(__name__)

MAX_PARTS = 1024
MAX_TRIES = 4  # of a part whose process dies; the second and later encode in a process apart


def make_parts(
    folder: Place,
    inputs: Inputs,
    spec: EncoderSpec,
    settings: dict[str, Any],
    *,
    jobs: int | None,
    progress: bool,
) -> list[Place]:
    """Makes every part below `folder` by tasks of one CPU each, and returns where they are.

    Joins the cluster of RAY_ADDRESS or of this machine, or starts one of this machine's cores.
    A part whose process or node dies is made again, elsewhere if need be; its finished files are
    kept.

    Args:
        folder: for the parts; a folder or an address that all nodes see.
        inputs: all of them.
        spec, settings: as of `parts.make_part`.
        jobs: most tasks at a time; None: as many as the cluster has CPUs.
        progress: whether to show it.

    Raises:
        ConfigError: without Ray.
        DataError: there is no cluster; a part failed, or died too often; the same command resumes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours tells nobody
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'wgpt[ray]'") from None
    if isinstance(spec.codec, (str, Path)) and Path(spec.codec).exists():  # tasks run elsewhere
        spec = dataclasses.replace(spec, codec=Path(spec.codec).absolute())
    n = _count_parts(len(inputs.entries))
    inputs_sha256 = hash_inputs(inputs)
    entries: list[list[Entry]] = [[] for _ in range(n)]
    for entry in inputs.entries:
        here = dataclasses.replace(entry, path=places(absolute(entry.path))[0])
        entries[part_number(entry, n) - 1].append(here)
    folder = places(absolute(folder))[0]
    outs = [below(folder, f"{i}-of-{n}") for i in range(1, n + 1)]
    started = _join()
    task: Any = ray.remote(num_cpus=1, max_retries=0)(make_part)
    meter = Progress("encoding parts", len(inputs.entries), n, progress, unit="part")
    tries = dict.fromkeys(range(1, n + 1), 0)
    waiting = list(tries)[::-1]
    flying: dict[Any, int] = {}

    def fly() -> None:
        while waiting and len(flying) < (jobs or n):
            i = waiting.pop()
            own = dataclasses.replace(inputs, entries=entries[i - 1])
            ref = task.remote(
                outs[i - 1], (i, n), own, inputs_sha256, spec, settings,
                jobs=1, overwrite=True, apart=tries[i] > 0,
            )  # fmt: skip
            flying[ref] = i

    try:
        with closing(meter):
            fly()
            while flying:
                (ref,), _ = ray.wait(list(flying), num_returns=1)
                i = flying.pop(ref)
                try:
                    record = ray.get(ref)
                except RayTaskError as error:
                    raise _failed(outs[i - 1], error.cause) from error
                except RayError as error:  # its process, its node, or what it asked for is gone
                    logger.warning("part %d of %d: %s", i, n, str(error).strip().splitlines()[0])
                    record = None
                if record is None:
                    tries[i] += 1
                    if tries[i] == MAX_TRIES:
                        raise DataError(
                            f"{outs[i - 1]}: the process or node that makes this part died "
                            f"{MAX_TRIES} times; finished files are kept, run again"
                        )
                    waiting.append(i)
                else:
                    _check_seen(outs[i - 1], entries[i - 1], record)
                    _tell(record)
                    meter.advance(len(entries[i - 1]))
                fly()
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)
        if started:
            ray.shutdown()
    return outs


def _join() -> bool:
    """Joins a cluster or starts one; False if this process is in one. DataError if it cannot."""
    import ray

    if ray.is_initialized():
        return False
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # a network, a version, a token: many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"--engine ray: no Ray cluster can be joined or started: {reason}; check "
            "RAY_ADDRESS, and where `ray start` said that token authentication is enabled, "
            "set RAY_AUTH_MODE=token here too"
        ) from error
    return True


def _count_parts(n_entries: int) -> int:
    """A power of two, so that a few more recordings leave every part what it was."""
    return min(1 << max(n_entries - 1, 0).bit_length(), MAX_PARTS)


def _check_seen(out: Place, entries: list[Entry], record: dict[str, Any]) -> None:
    """Raises DataError where a node and this machine do not see the same files."""
    if isinstance(out, Path) and not (out / PART).exists():
        raise DataError(
            f"{out}: a node made this part and this machine does not see it; let parts lie where "
            "all nodes see them: --parts FOLDER or s3://..."
        )
    unreadable = {row["path"] for row in record["unreadable_files"]}
    for entry in entries:
        is_here = isinstance(entry.path, Path) and os.access(entry.path, os.R_OK)
        if entry.name in unreadable and is_here and Path(entry.path).is_file():
            raise DataError(
                f"{entry.path}: a node cannot read it and this machine can; recordings must lie "
                "where all nodes see them"
            )


def _failed(out: Place, cause: BaseException) -> WgptError:
    if isinstance(cause, WgptError):
        return cause
    return DataError(
        f"{out}: making this part failed: {type(cause).__name__}: {cause}; free the cause and run "
        "again, finished files are kept"
    )


def _tell(record: dict[str, Any]) -> None:
    """Says here which files of a part were skipped."""
    told: set[str] = set()
    for row in record["entries"]:
        if row["sha256"] in record["reasons"] and row["sha256"] not in told:
            told.add(row["sha256"])
            logger.warning("skipped %s: %s", row["name"], record["reasons"][row["sha256"]])
    for row in record["unreadable_files"]:
        logger.warning("skipped %s: %s", row["path"], row["reason"])
