"""Files that appear whole or not at all, and their hashes: one implementation for the package.

A sealed JSON file holds, as `seal`, the sha256 of everything else in it: a flipped bit is found.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from wgpt.errors import ConfigError, WgptError

BLOCK_BYTES = 1 << 20
JSON_LIMIT_BYTES = 64 << 20
_SEAL = "seal"
_DIGITS_LIMIT = 40  # of a number in JSON: 2^63 has 19, a float64 17 and an exponent
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
def locked(folder: str | os.PathLike[str], what: str, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of an existing folder; the system unlocks when this one dies.

    what: is being done here, for the message; wait: until the other is done, for what is short.
    Raises ConfigError where another does it already, and says which; does nothing on a system
    without such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: is being {what} by {_holder(descriptor)}; wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who has locked an open folder, as far as /proc tells."""
    inode = f":{os.fstat(descriptor).st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "->" not in words and words[1] == "FLOCK" and words[5].endswith(inode):
                command = Path(f"/proc/{words[4]}/cmdline").read_bytes().decode(errors="replace")
                return f"process {words[4]} ({command.replace(chr(0), ' ').strip()[:200]})"
    return "another process"


def remove_leftovers(folder: str | os.PathLike[str], name: str = "") -> None:
    """Deletes the temporary files of `replacing` that a killed process left in a folder.

    name: those of one file alone, in a folder that is not ours.
    """
    for path in Path(folder).glob(f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"):
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


# -- JSON ------------------------------------------------------------------------------------------


def write_sealed(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Writes a JSON object with its seal, by `replacing`. Numbers must be finite."""
    value = json.loads(json.dumps(value, allow_nan=False))  # as a reader will see it
    sealed = {**value, _SEAL: _seal_of(value)}
    write_atomically(path, json.dumps(sealed, indent=2) + "\n")


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for what is none, nests too deep, names a key twice, or
    holds a number that is not finite or has more than 40 digits."""

    def refuse(what: str) -> NoReturn:
        raise ValueError(what)

    def number(text: str) -> Any:
        if len(text) > _DIGITS_LIMIT:
            refuse(f"a number of {len(text)} digits")
        value = float(text) if set(text) & set(".eE") else int(text)
        return refuse(f"the number {text}") if value in (float("inf"), -float("inf")) else value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        return value if len(value) == len(pairs) else refuse("a key twice")

    try:
        value = json.loads(
            text,
            parse_constant=lambda text: refuse(f"the number {text}"),
            parse_int=number,
            parse_float=number,
            object_pairs_hook=unique,
        )
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value if isinstance(value, dict) else refuse(f"a {type(value).__name__}")


def read_json(
    path: str | os.PathLike[str],
    error: type[WgptError] = ConfigError,
    limit_bytes: int = JSON_LIMIT_BYTES,
) -> dict[str, Any]:
    """A JSON object from a regular file; its seal is checked and left out, where it has one.

    Raises FileNotFoundError, or `error` naming the file for one that is larger than limit_bytes,
    is not UTF-8, is refused by `parse_json`, or whose seal is broken.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a FIFO would be waited for
            raise ValueError("no regular file")
        if facts.st_size > limit_bytes:
            raise ValueError(f"{facts.st_size} bytes, more than {limit_bytes}")
        value = parse_json(path.read_bytes().decode())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:
        raise error(f"{path}: must be a JSON object, got {problem}") from None
    last = next(reversed(value.values()), None)
    is_sealed = isinstance(last, str) and re.fullmatch("[0-9a-f]{64}", last)
    seal = value.pop(_SEAL, None)
    if (seal or is_sealed) and seal != _seal_of(value):  # even where the word "seal" was damaged
        raise error(f"{path}: does not match its seal; it was damaged, or changed by hand")
    return value


def check_sha256(
    folder: str | os.PathLike[str], sums: Mapping[str, Any], error: type[WgptError], way_out: str
) -> None:
    """Raises `error` naming the first file of a folder that is missing or has another sha256.

    sums: by file name; way_out: the end of the message.
    """
    for name, expected in sums.items():
        path = Path(folder) / name
        if not path.is_file():
            raise error(f"{path}: is missing; {way_out}")
        got = sha256_of(path)
        if got != expected:
            raise error(
                f"{path}: must have sha256 {expected}, got {got}; it was damaged or changed, "
                f"{way_out}"
            )


def _seal_of(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
