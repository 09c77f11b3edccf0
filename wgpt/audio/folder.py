"""What lies in a folder: sound, other files, and what could not be looked into."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from wgpt.audio.formats import sounds
from wgpt.errors import AudioError


@dataclass
class Walk:
    """Every entry of a folder and of its folders, each exactly once.

    Attributes:
        sound: files to be tried as sound, sorted by path.
        other: files that are not sound.
        hidden: hidden files and folders, not looked into.
        unreadable: folders that could not be listed, with the reason.
    """

    sound: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


def walk(folder: str | os.PathLike[str], leave_out: Path | None = None) -> Walk:
    """Look through a folder.

    Links to folders are followed, each real folder once, so a loop of links ends. Broken links
    count as sound by their suffix, so that reading them says what is wrong.

    Args:
        folder: where.
        leave_out: a folder below it that is none of the input, such as the output.

    Raises:
        AudioError: `folder` is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AudioError(f"{root}: must be a folder, got {describe(root)}")
    found = Walk()
    seen: set[tuple[int, int]] = set()
    if leave_out is not None and leave_out.is_dir():
        seen.add(_identity(leave_out))

    def unlisted(error: OSError) -> None:
        found.unreadable.append((Path(error.filename), error.strerror or str(error)))

    for here, folders, files in os.walk(root, followlinks=True, onerror=unlisted):
        if _identity(here) in seen:
            folders.clear()
            continue
        seen.add(_identity(here))
        found.hidden += [Path(here, name) for name in folders + files if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = Path(here, name)
                (found.sound if sounds(path) else found.other).append(path)
    for paths in (found.sound, found.other, found.hidden, found.unreadable):
        paths.sort()
    return found


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """The files below a folder that are to be tried as sound, sorted by path; see `walk`."""
    return walk(folder).sound


def describe(path: Path) -> str:
    """What lies at a path, for messages."""
    if path.is_dir():
        return "a folder"
    if path.is_file():
        return "a file"
    return "something else" if path.exists() else "nothing there"


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
