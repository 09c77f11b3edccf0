"""Files that appear whole or not at all, and their hashes: one implementation for the package."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from wgpt.errors import ConfigError

BLOCK_BYTES = 1 << 20
# Errors of the machine and not of a file: what met one must be tried again, not left out.
BAD_DAY = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ENOSPC", "EDQUOT", "ENOMEM", "EMFILE", "ENFILE", "EROFS", "ESTALE",
                 "ENODEV", "ENXIO", "ETIMEDOUT", "ENOTCONN", "EREMOTEIO")
    if hasattr(errno, name)
)  # fmt: skip


def is_bad_day(error: BaseException) -> bool:
    """Whether an error is the machine's fault (memory, disk, network) and not that of a file."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in BAD_DAY


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; what is written there then replaces `path`.

    A kill leaves the old file or the new one. So does a power cut where `durable`: the bytes are
    then flushed to disk before the rename, and the name after it (46 ms on a shared disk).
    After an exception the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def write_atomically(
    path: str | os.PathLike[str], content: bytes | str, durable: bool = True
) -> None:
    """Writes bytes, or text as UTF-8, by `replacing`."""
    with replacing(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keeps other processes out of an existing folder; the system unlocks when this one dies.

    what: is being done here, for the message. Raises ConfigError where another does it already;
    does nothing on a system without such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: is being {what} by another process; wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Deletes the temporary files of `replacing` that a killed process left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in a folder durable; does nothing where folders cannot be opened."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's content, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
