"""Committed steps of a training: folders that appear whole, by one rename, or not at all.

    FOLDER/step-00000250/...           what the training keeps of a step
                         state.json    step, whatever it needs to go on, and the sha256 of the
                                       files; sealed

A kill leaves a committed step or a hidden folder that is ignored, and swept by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wgpt.errors import CheckpointError
from wgpt.files import read_json, sha256_of, sync_folder, write_sealed

# Files that every step has; of a sharded optimizer, optimizer-00001-of-00002.safetensors and so on.
ALWAYS = ("model.safetensors", "optimizer.safetensors")
_SPARE_BYTES = 1 << 20


@contextlib.contextmanager
def committing(folder: Path, step: int, state: dict[str, Any], n_bytes: int) -> Iterator[Path]:
    """Yields an empty folder; what is written there becomes folder/step-N, hashed and on disk.

    Args:
        state: JSON values for `state_of` to give back.
        n_bytes: what will be written; OSError before anything is, where the disk has no room.
    """
    target = path_of(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_BYTES:
        what = f"needs {n_bytes + _SPARE_BYTES} bytes, and the disk has {free} left"
        raise OSError(errno.ENOSPC, what, str(target))
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        sums = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            sums[path.name] = sha256_of(path)
        write_sealed(temporary / "state.json", {"step": step, **state, "sha256": sums})
        remove(target)
        os.rename(temporary, target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def newest_step(folder: Path) -> int | None:
    """The last committed step, or None."""
    found = list_steps(folder)
    return int(found[-1].name.removeprefix("step-")) if found else None


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; a kill leaves all of it, or a folder that remove_leftovers knows."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old")
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden)


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Deletes all checkpoints but the `keep` newest and that of the step `best`."""
    for old in list_steps(folder)[:-keep]:
        if best is None or old != path_of(folder, best):
            remove(old)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed `committing` or `remove` left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint, every file of it compared with its sha256.

    Raises CheckpointError when there is none, or when the newest is damaged: the message names the
    newest whole one, since going back further than asked must be the user's own decision.
    """
    found = list_steps(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no checkpoint to resume from")
    problem = damage(found[-1])
    if problem:
        good = next((p for p in reversed(found[:-1]) if not damage(p)), None)
        advice = (
            f"the newest whole one is {good}; delete the later ones to resume from it"
            if good
            else f"no whole one is left; delete {folder}, and --resume starts at step 0"
        )
        raise CheckpointError(f"{problem}; {advice}")
    return found[-1]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What `committing` was given as state, and the step. Raises CheckpointError."""
    path = checkpoint / "state.json"
    try:
        state = read_json(path, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    step, sums = state.get("step"), state.get("sha256")
    if type(step) is not int or path_of(checkpoint.parent, step) != checkpoint:
        raise CheckpointError(f"{path}: step must be that of {checkpoint.name}, got {step}")
    names = set(sums) if isinstance(sums, dict) else set()
    kinds = {re.sub(r"-\d{5}-of-\d{5}(?=\.)", "", name) for name in names}
    if not set(ALWAYS) <= kinds or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise CheckpointError(f"{path}: must hold the sha256 of {', '.join(ALWAYS)}")
    return state


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder, or the empty string."""
    try:
        sums = state_of(checkpoint)["sha256"]
    except CheckpointError as error:
        return str(error)
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path}: is missing"
        got = sha256_of(path)
        if got != expected:
            return f"{path}: sha256 must be {expected}, got {got}"
    return ""


def unwritten(folder: Path, what: str, error: Exception, command: str) -> str:
    """The message about a disk that failed: what is safe of a training, and how to go on.

    folder: of the checkpoints; what: the path at fault where the error names none.
    """
    kept = list_steps(folder)
    safe = f"all up to {kept[-1]} is safe" if kept else "no step was committed yet"
    where = "" if getattr(error, "filename", None) else f"{what}: "
    return f"{where}{error}; {safe}. When the disk is well again: {command}"
