"""The folder being prepared: is it ours, is it done, who holds it, what is kept in .partial."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wgpt.data.assemble import BUILDING
from wgpt.data.dataset import FORMAT_VERSION, Dataset, read_manifest
from wgpt.data.encode import write_partial
from wgpt.data.levels import CodedFrames
from wgpt.data.scan import Found
from wgpt.data.workers import DIED
from wgpt.errors import ConfigError, DataError
from wgpt.files import read_json, write_sealed

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
PART = "part.json"  # see parts.py
PARTS = ".parts"  # of a run on a cluster, and copies of parts that lie at an address
# Settings that finished files depend on; mel_levels only where mel is not float16.
SHAPING = ("codec", "mel", "treatment", "mel_levels")


def check_ours(out: Path) -> None:
    """Refuse to write into a folder that holds something else: its contents would be replaced."""
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        names = {name for name in names if not (out / name / PART).is_file()}  # parts of it
        if "manifest.json" in names:
            read_manifest(out)
        elif PART in names:
            raise DataError(
                f"{out}: holds a part of a preparation; merge it with the others: "
                "wgpt merge PART [PART ...] --out DATA"
            )
        elif names and not names & {PARTIAL, PARTS}:
            raise DataError(
                f"{out}: must be new, empty, or a folder that wgpt prepare made, "
                f"got one that holds {min(names)}"
            )
    elif out.exists():
        raise DataError(f"{out}: must be a folder or not exist yet")


def read_before(out: Path) -> dict[str, Any] | None:
    """The manifest of an earlier preparation, None if there is none."""
    return read_manifest(out) if (out / "manifest.json").exists() else None


def is_done(
    out: Path,
    before: dict[str, Any],
    settings: dict[str, Any],
    found: Found,
    command: str | None,
) -> bool:
    """Whether a finished folder is the answer already; False if there is something to add.

    command: `wgpt prepare` with the settings that the folder has; None where no flags say them.

    Raises:
        DataError: other settings, or recordings that are gone: that is not adding.
    """
    old = before.get("settings", {})
    changed = sorted(
        name
        for name in {*settings, "mel_levels"} - {"mel_sources"}
        if old.get(name) != settings.get(name)
    )
    if changed:
        way = f"to add to it with its own: {command}" if command else "it cannot be added to"
        raise DataError(
            f"{out}: was prepared with other settings ({', '.join(changed)}); use another --out, "
            f"or --overwrite to replace it; {way}"
        )
    gone = sorted(e["path"] for e in before["sources"] if e["sha256"] not in found.known())
    if gone:
        raise DataError(
            f"{out}: was prepared from other files ({len(set(gone))} are gone or changed, first "
            f"{gone[0]}); to add recordings, name those as well; use another --out, or "
            "--overwrite to replace it"
        )
    listed = {e["path"]: e.get("sha256") for e in before["sources"] + before["skipped"]}
    died = any(e["reason"] == DIED for e in before["skipped"])
    if listed != found.contents() or old["mel_sources"] != settings["mel_sources"] or died:
        return False
    for leftover in (PARTIAL, PARTS, BUILDING):  # of a run killed after its last rename
        shutil.rmtree(out / leftover, ignore_errors=True)
    logger.info("%s: already prepared from the same files with the same settings", out)
    return True


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the system drops the lock when the process dies."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: is being prepared by another process; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def open_partial(partial: Path, settings: dict[str, Any]) -> None:
    """Make .partial, or keep what an earlier run with the same settings finished there."""
    shaping = {name: settings[name] for name in SHAPING if name in settings}
    wanted = {"version": FORMAT_VERSION} | shaping
    record = partial / "settings.json"
    if partial.exists():
        try:
            before = read_json(record)
        except (FileNotFoundError, ConfigError):  # of a kill, or damaged
            before = {}
        if before != wanted:
            changed = sorted(n for n in wanted | before if before.get(n) != wanted.get(n))
            n_files = len(list(partial.glob("*.safetensors")))
            if n_files:
                logger.warning(
                    "settings changed since the interrupted run (%s): %d finished files are redone",
                    ", ".join(changed), n_files,
                )  # fmt: skip
            shutil.rmtree(partial)
        for leftover in partial.glob(".*.tmp"):
            leftover.unlink()
    if not partial.exists():
        partial.mkdir()
        write_sealed(record, wanted)
    shutil.rmtree(partial.parent / BUILDING, ignore_errors=True)


def reopen(out: Path, before: dict[str, Any], settings: dict[str, Any], found: Found) -> int:
    """Make finished files again of a finished folder's arrays, so that they are not encoded again.

    Returns:
        How many; none where the settings that shape them differ.
    """
    old = before.get("settings", {})
    if any(old.get(name) != settings.get(name) for name in SHAPING):
        return 0
    dataset = Dataset(out)
    sources = [name for name in dataset.mel_sources if name in settings["mel_sources"]]
    parts: dict[str, list[dict[str, Any]]] = {}
    for entry in before["sources"]:
        if "clips" in entry and entry["sha256"] in found.jobs:
            parts.setdefault(entry["sha256"], []).append(entry)
    n = 0
    for digest, entries in parts.items():
        target = Path(found.jobs[digest].partial)
        if target.exists():
            continue
        entries.sort(key=lambda entry: entry.get("first_step", 0))
        pieces: dict[str, list[np.ndarray]] = {}
        for entry in entries:
            split = dataset.split(entry["split"])
            first, last = split.offsets[entry["clips"][0]], split.offsets[entry["clips"][-1] + 1]
            r = split.frames_per_step
            pieces.setdefault("tokens", []).append(split.tokens[first:last])
            for name in sources:
                array = split.mel[name]
                stored = array.codes if isinstance(array, CodedFrames) else array
                rows = stored[first * r : last * r]
                pieces.setdefault(f"mel.{name}", []).append(rows)
        write_partial(
            target, {name: np.concatenate(rows) for name, rows in pieces.items()},
            entries[0]["facts"],
        )  # fmt: skip
        n += 1
    return n


def keep_splits(partial: Path, before: dict[str, Any] | None, overwrite: bool) -> dict[str, Any]:
    """What was trained on before is never validated on after an addition.

    Kept in .partial, because the manifest that says it is removed before the new one is written.

    Returns:
        {"by": how it was split, "splits": {sha256 or group: split}}; empty for a first time.
    """
    record = partial / "splits.json"
    if overwrite:
        record.unlink(missing_ok=True)
    elif before is not None:
        splits: dict[str, str] = {}
        mixed = set()
        for entry in before["sources"]:
            if "clips" in entry:
                splits[entry["sha256"]] = entry["split"]
                if splits.setdefault(entry["group"], entry["split"]) != entry["split"]:
                    mixed.add(entry["group"])
        splits = {key: split for key, split in splits.items() if key not in mixed}
        kept = {"by": before.get("split_by"), "splits": splits}
        write_sealed(record, kept)
    try:
        return read_json(record, DataError)
    except FileNotFoundError:
        return {}
    except DataError as error:
        raise DataError(
            f"{error}; with it gone, files may change their split: delete {partial} to have it so"
        ) from None


def check_space(out: Path, needed: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: needs {needed / 1e6:.1f} MB for the final arrays, {free / 1e6:.1f} MB are "
            "free; make room and run again, finished files are kept"
        )
