"""What an input holds, whatever it is: its recordings by relative name, and what is none.

Every kind of input is one function that lists it; `places.opened` opens what it lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from wgpt import audio
from wgpt.data.places import Place, Remote


@dataclass(frozen=True)
class Item:
    """One recording: its name in the input, where it lies, and what the input says of it."""

    name: str
    place: Place
    group: str = ""
    split: str | None = None


@dataclass
class Listing:
    """Everything in an input, each once; unreadable: what could not be listed, and why."""

    sound: list[Item] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    n_hidden: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def list_folder(folder: Path, leave_out: Place) -> Listing:
    """A folder of this machine, by `audio.walk`."""
    seen = audio.walk(folder, leave_out if isinstance(leave_out, Path) else None)

    def named(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    return Listing(
        [Item(named(path), path) for path in seen.sound],
        [named(path) for path in seen.other],
        len(seen.hidden),
        [(named(path), f"a folder that cannot be opened: {why}") for path, why in seen.unreadable],
    )


def list_remote(remote: Remote, leave_out: Place) -> Listing:
    """A folder at an address, with the rules of one of this machine.

    Raises AudioError where it cannot be listed.
    """
    out = str(leave_out).rstrip("/") + "/"
    files = ((name, place) for name, place in remote.files() if not place.startswith(out))
    return list_names(files, remote.sounds)


def list_names(files: Iterable[tuple[str, Place]], sounds: Callable[[str], bool]) -> Listing:
    """What a folder with these names and places holds."""
    found, hidden = Listing(), set()
    for name, place in files:
        parts = PurePosixPath(name).parts
        first = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
        if first is not None:
            hidden.add(parts[: first + 1])
        elif sounds(name):
            found.sound.append(Item(name, place))
        else:
            found.other.append(name)
    found.n_hidden = len(hidden)
    return found
