"""A part that is kept at an address while it is made in a folder of this machine.

What is finished is copied there at once, so that any machine can resume the part; `merge` copies it
back. An address knows no lock: the caller sees to it that one process makes a part.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wgpt.data.folder import PART, PARTIAL
from wgpt.data.places import bad_day_otherwise, filesystem
from wgpt.errors import DataError

_SETTINGS = f"{PARTIAL}/settings.json"


class Mirror:
    """A folder of this machine with the files of a part that lies at an address.

    Raises ConfigError where no package serves the address, OSError where it cannot be read.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address.rstrip("/"), folder
        self.fs, self.root = filesystem(self.address)
        self.root = self.root.rstrip("/")

    def fetch(self) -> None:
        """Copies here what is there: settings, finished files, and the record of a whole part.

        Raises DataError where something else is there.
        """
        files = self._there()
        ours = {name for name in files if name == PART or name.startswith(f"{PARTIAL}/")}
        if set(files) - ours:
            raise DataError(
                f"{self.address}: must be new, empty, or a part that wgpt prepare made, got one "
                f"that holds {min(set(files) - ours)}"
            )
        for name in sorted(ours):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with bad_day_otherwise(self.address):
                self.fs.get_file(f"{self.root}/{name}", str(target))

    def begin(self) -> None:
        """Makes what is there equal to what is here; before anything new is finished.

        Deletes first: a finished file of other settings must not lie beside the new ones.
        """
        with bad_day_otherwise(self.address):
            self.fs.makedirs(f"{self.root}/{PARTIAL}", exist_ok=True)
            for name in self._there():
                if name != _SETTINGS and not (self.folder / name).exists():
                    self.fs.rm_file(f"{self.root}/{name}")
        self.keep(self.folder / _SETTINGS)

    def keep(self, path: Path) -> None:
        """Copies one file of the folder to the address."""
        name = path.relative_to(self.folder).as_posix()
        with bad_day_otherwise(self.address):
            self.fs.put_file(str(path), f"{self.root}/{name}")

    def _there(self) -> list[str]:
        """Names of all files below the address; none where nothing is there."""
        start = f"{self.root}/"
        with bad_day_otherwise(self.address):
            try:
                found = self.fs.find(self.root)
            except FileNotFoundError:
                return []
        return sorted(path[len(start) :] for path in found if path.startswith(start))


@contextlib.contextmanager
def working_copy(address: str) -> Iterator[Mirror]:
    """A mirror of an address in a temporary folder, which is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="wgpt-part-") as folder:
        mirror = Mirror(address, Path(folder))
        mirror.fetch()
        yield mirror
