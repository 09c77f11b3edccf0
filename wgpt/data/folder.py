"""The folder being prepared: is it ours, is it done, who holds it, what is kept in .partial."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wgpt.data.assemble import BUILDING
from wgpt.data.dataset import FORMAT_VERSION, read_manifest
from wgpt.data.scan import Found
from wgpt.errors import DataError
from wgpt.files import write_atomically

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


def check_ours(out: Path) -> None:
    """Refuse to write into a folder that holds something else: its contents would be replaced."""
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        if "manifest.json" in names:
            read_manifest(out)
        elif names and PARTIAL not in names:
            raise DataError(
                f"{out}: must be new, empty, or a folder that wgpt prepare made, "
                f"got one that holds {min(names)}"
            )
    elif out.exists():
        raise DataError(f"{out}: must be a folder or not exist yet")


def finished_before(
    out: Path, settings: dict[str, Any], found: Found, overwrite: bool
) -> dict[str, Any] | None:
    """The manifest of a finished folder if it is the answer already, None if there is work."""
    if overwrite or not (out / "manifest.json").exists():
        return None
    manifest = read_manifest(out)
    changed = sorted(
        name for name in settings if manifest.get("settings", {}).get(name) != settings[name]
    )
    if changed:
        raise DataError(
            f"{out}: was prepared with other settings ({', '.join(changed)}); "
            "use another --out, or --overwrite to replace it"
        )
    listed = {e["path"]: e.get("sha256") for e in manifest["sources"] + manifest["skipped"]}
    now = found.contents()
    if listed != now:
        differing = sorted(
            path for path in listed.keys() | now.keys()
            if path not in listed or path not in now or listed[path] != now[path]
        )  # fmt: skip
        raise DataError(
            f"{out}: was prepared from other files ({len(differing)} differ, first "
            f"{differing[0]}); use another --out, or --overwrite to replace it"
        )
    for leftover in (PARTIAL, BUILDING):  # of a run killed after its last rename
        shutil.rmtree(out / leftover, ignore_errors=True)
    logger.info("%s: already prepared from the same files with the same settings", out)
    return manifest


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
    shaping = ("codec", "mel", "mel_sources", "piece_seconds")
    wanted = {"version": FORMAT_VERSION} | {name: settings[name] for name in shaping}
    record = partial / "settings.json"
    if partial.exists():
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if before != wanted:
            changed = sorted(name for name in wanted if before.get(name) != wanted[name])
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
        write_atomically(record, json.dumps(wanted, sort_keys=True).encode())
    shutil.rmtree(partial.parent / BUILDING, ignore_errors=True)


def check_space(out: Path, needed: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: needs {needed / 1e6:.1f} MB for the final arrays, {free / 1e6:.1f} MB are "
            "free; make room and run again, finished files are kept"
        )
