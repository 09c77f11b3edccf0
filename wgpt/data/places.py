"""Where recordings lie: paths of this machine, and addresses that fsspec opens (s3://bucket/a.flac).

A Path never holds "://", so a string that does is an address. `pieces.opened` copies what is read
of one to a file of this machine for as long as it is read: decoders see a file, and the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wgpt.audio.formats import SUFFIXES, sniff
from wgpt.errors import AudioError, ConfigError, WgptError
from wgpt.files import is_bad_day

Place = Path | str  # a str holds "://"

_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "download"}
_HEAD_BYTES = 16
# Answers about one object; whatever else a filesystem raises is the network's or the server's.
_OF_THE_OBJECT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_address(place: object) -> bool:
    """Whether a place is an address and no path: `PROTOCOL://...`."""
    return isinstance(place, str) and _PROTOCOL.match(place) is not None


def places(given: str | Path | Sequence[str | Path]) -> list[Place]:
    """Paths and addresses as a person gives them, one or several."""
    listed = [given] if isinstance(given, (str, Path)) else given
    return [str(place) if is_address(place) else Path(place) for place in listed]


def filesystem(address: str, error: type[WgptError] = ConfigError) -> tuple[Any, str]:
    """The fsspec filesystem of an address and the path in it.

    Raises `error` where no package serves the protocol, and says which would.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol = address.partition("://")[0].lower()
    try:
        fs, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as problem:
        extra = _EXTRAS.get(protocol)
        known = known_implementations.get(protocol, {}).get("err")
        way = f"pip install 'wgpt[{extra}]'" if extra else known
        if way is None:
            raise error(f"{address}: no filesystem of fsspec is called {protocol}") from problem
        raise error(f"{address}: needs a package that is not installed: {way}") from problem
    except Exception as problem:  # a filesystem may look for its credentials here
        raise error(f"{address}: cannot be opened: {_one_line(problem)}") from problem
    return fs, path


def check_downloads(given: Sequence[Place], download: bool) -> None:
    """Raises ConfigError for an address of the Hub without `download`, as for its models."""
    for place in given:
        if "hf://" in str(place).lower() and not download:
            raise ConfigError(
                f"{place}: lies on the Hugging Face Hub; allow a download with --download "
                "(download=True)"
            )


def below(folder: Place, name: str) -> Place:
    """A name below a folder."""
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def absolute(place: Place) -> str:
    """A place as any process of this machine finds it."""
    return place if isinstance(place, str) else str(place.absolute())


def as_path(place: Place) -> str:
    """An absolute path that orders and names a place beside others: /s3/bucket/a.flac."""
    if isinstance(place, Path):
        return os.path.abspath(place)
    return os.path.normpath("/" + place.replace("://", "/", 1))


def last_name(place: Place) -> str:
    """What a place is called in its folder."""
    return place.name if isinstance(place, Path) else place.rstrip("/").rpartition("/")[2]


def relative_names(found: Sequence[Place], listed_in: Place) -> list[str]:
    """Names of what a file lists: from that file's folder on, or from the folder of them all."""
    wheres = [Path(as_path(place)) for place in found]
    base = os.path.dirname(as_path(listed_in))
    if not all(where.is_relative_to(base) for where in wheres):
        base = os.path.commonpath([where.parent for where in wheres])
    return [Path(os.path.relpath(where, base)).as_posix() for where in wheres]


def expand(given: Sequence[Place]) -> list[Place]:
    """Addresses with *, ? or [ become what matches, since no shell does it; paths stay, and so does
    the name of a file that holds one of these.

    Raises ConfigError where nothing matches.
    """
    found: list[Place] = []
    for place in given:
        if isinstance(place, Path) or not set("*?[") & set(place):
            found.append(place)
            continue
        fs, pattern = filesystem(place)
        with _said_of(place, ConfigError):
            if fs.exists(pattern):
                found.append(place)
                continue
            matches = sorted(fs.glob(pattern))
        if not matches:
            raise ConfigError(f"{place}: matches nothing there")
        found += [fs.unstrip_protocol(match) for match in matches]
    return found


class Remote:
    """What lies at an address: a file, or a folder with all that is below it.

    Attributes:
        is_folder: whether it is a folder; False for a file.
    """

    def __init__(self, address: str) -> None:
        """Raises AudioError where nothing is there or it cannot be looked at."""
        self.address = address
        self.fs, self.path = filesystem(address, AudioError)
        with _said_of(address, AudioError):
            try:
                self.is_folder = self.fs.info(self.path)["type"] == "directory"
            except FileNotFoundError:
                raise AudioError(
                    f"{address}: must be a folder, an audio file or a list, got nothing there"
                ) from None

    def files(self) -> Iterator[tuple[str, str]]:
        """Relative name and address of every file below a folder, sorted by name."""
        with _said_of(self.address, AudioError):
            found = self.fs.find(self.path, detail=True)
        root = self.path.rstrip("/") + "/"
        for path, facts in sorted(found.items()):
            if facts["type"] == "file" and path.startswith(root):
                yield path[len(root) :], self.fs.unstrip_protocol(path)

    def sounds(self, name: str) -> bool:
        """`formats.sounds` of a file below: by its suffix, or by its first bytes."""
        if Path(name).suffix.lower() in SUFFIXES:
            return True
        path = f"{self.path.rstrip('/')}/{name}"
        with contextlib.suppress(*_OF_THE_OBJECT), bad_day_otherwise(self.address):
            return sniff(self.fs.cat_file(path, start=0, end=_HEAD_BYTES)) is not None
        return False


def fetch(address: str, copy: Path) -> None:
    """Copies one object to a file of this machine. Raises as `pieces.opened`."""
    with bad_day_otherwise(address):
        fs, path = filesystem(address)
        fs.get_file(path, str(copy))


@contextlib.contextmanager
def bad_day_otherwise(address: str) -> Iterator[None]:
    """Passes what is said of one object, with words; the rest is the machine's fault."""
    try:
        yield
    except WgptError:
        raise
    except _OF_THE_OBJECT as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not readable"
        raise type(error)(error.errno or errno.ENOENT, reason) from error
    except OSError as error:
        if is_bad_day(error):
            raise
        raise OSError(errno.EIO, f"{address}: {_one_line(error)}") from error
    except Exception as error:  # each filesystem has its own types
        raise OSError(errno.EIO, f"{address}: {_one_line(error)}") from error


@contextlib.contextmanager
def _said_of(address: str, error: type[WgptError]) -> Iterator[None]:
    """Turns whatever a filesystem raises into one sentence of `error`."""
    try:
        yield
    except WgptError:
        raise
    except Exception as problem:  # each filesystem has its own types
        raise error(f"{address}: cannot be read: {_one_line(problem)}") from problem


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
