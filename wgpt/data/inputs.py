"""What is to be prepared: folders, files and lists, as one list of entries with their groups."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from wgpt import audio
from wgpt.data.containers import lister_of
from wgpt.data.pieces import opened
from wgpt.data.places import (
    Place,
    Remote,
    check_downloads,
    expand,
    is_address,
    last_name,
    relative_names,
)
from wgpt.data.sources import Listing, list_folder, list_remote
from wgpt.errors import DataError

LIST_SUFFIXES = frozenset(".txt .lst .m3u .csv .tsv .jsonl .ndjson".split())
TOP_GROUP = "."
SPLIT_ORDER = {"test": 0, "valid": 1}  # of two copies the held-out one is kept
PATH_COLUMNS = ("path", "audio_filepath", "file_name")
_SPLITS = {
    "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "eval": "test", "held-out": "test", "held_out": "test",
}  # fmt: skip
# .../train-clean-100/SPEAKER/CHAPTER/SPEAKER-CHAPTER-0000.flac
_LIBRISPEECH = re.compile(r"(?:.*?/)??(?:(train|dev|test)-[a-z0-9-]+/)?(\d+)/(\d+)/\2-\3-\d+\.\w+$")


@dataclass(frozen=True)
class Entry:
    """One file to try.

    Attributes:
        path: where it lies: a path of this machine, or an address.
        name: what the manifest calls it: relative, with no path of this machine.
        group: what belongs together: a column, LibriSpeech's speaker, or the first folder.
        split: train, valid or test where that was given, else None.
    """

    path: Place
    name: str
    group: str
    split: str | None = None


@dataclass
class Inputs:
    """All that was found: `entries` to try, and what was not taken for sound."""

    entries: list[Entry] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    n_hidden: int = 0
    unreadable: list[dict[str, Any]] = field(default_factory=list)  # folders: path, reason

    def other_suffixes(self) -> dict[str, int]:
        """How many files that are not sound, by suffix."""
        return dict(sorted(Counter(Path(n).suffix.lower() or "none" for n in self.other).items()))


def collect(
    train: Sequence[Place],
    valid: Sequence[Place],
    test: Sequence[Place],
    leave_out: Place,
    download: bool = False,
) -> Inputs:
    """Look through all inputs.

    Args:
        train: folders, audio files, list files, and what `containers` knows; split by rule where
            a list does not say.
        valid, test: the same, for the given splits.
        leave_out: a folder that is none of the input: where the result goes.
        download: let recordings be read from the Hub (hf://).

    Returns:
        Entries with test before valid before the rest, so that of two copies the held-out one
        is kept, and by name within.

    Raises:
        DataError: a list file breaks its format, or nothing was found.
        AudioError: an input is not there.
        ConfigError: no package serves an address, or it is not to be downloaded from.
    """
    found = Inputs()
    check_downloads([*train, *valid, *test], download)
    train, valid, test = expand(train), expand(valid), expand(test)
    remotes: dict[Place, Remote] = {
        place: Remote(place) for place in (*train, *valid, *test) if isinstance(place, str)
    }
    labels = _labels([*train, *valid, *test], remotes)
    for paths, split in ((train, None), (valid, "valid"), (test, "test")):
        for path in paths:
            _add(found, path, remotes.get(path), labels[path], split, leave_out)
    check_downloads([entry.path for entry in found.entries], download)  # those of lists
    if any(_official(entry.name) == "train" for entry in found.entries):
        found.entries = [
            replace(entry, split=entry.split or _official(entry.name)) for entry in found.entries
        ]
    _make_names_unique(found.entries)
    found.entries.sort(key=lambda e: (SPLIT_ORDER.get(e.split or "", 2), e.name))
    if not found.entries:
        seen = ", ".join(f"{n} {suffix}" for suffix, n in found.other_suffixes().items())
        unread = "".join(f"; {e['path']}: {e['reason']}" for e in found.unreadable[:3])
        raise DataError(
            f"{', '.join(map(str, [*train, *valid, *test]))}: must hold audio files (wav, flac, "
            f"ogg, opus, mp3, m4a, ...), found {seen or 'no file'}{unread}"
        )
    return found


def _make_names_unique(entries: list[Entry]) -> None:
    """Files of several inputs may share a name: the later ones get a number."""
    taken = Counter(entry.name for entry in entries)
    if len(taken) == len(entries):
        return
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        name, n, path = entry.name, 2, PurePosixPath(entry.name)
        while name in seen:
            name, n = path.with_name(f"{path.stem}-{n}{path.suffix}").as_posix(), n + 1
        seen.add(name)
        entries[index] = replace(entry, name=name)


def _labels(paths: Iterable[Place], remotes: dict[Place, Remote]) -> dict[Place, str]:
    """What stands before the names of an input's files: nothing for one input, else its name."""
    paths = list(dict.fromkeys(paths))
    if len(paths) == 1:
        return {paths[0]: ""}
    labels: dict[Path | str, str] = {}
    for path in paths:
        own = last_name(path.resolve() if isinstance(path, Path) else path) or "root"
        if path.is_file() if isinstance(path, Path) else not remotes[path].is_folder:
            labels[path] = ""
            continue
        name, n = own, 2
        while f"{name}/" in labels.values():
            name, n = f"{own}-{n}", n + 1
        labels[path] = f"{name}/"
    return labels


def _add(
    found: Inputs, path: Place, remote: Remote | None, label: str, split: str | None,
    leave_out: Place,
) -> None:  # fmt: skip
    is_folder = path.is_dir() if isinstance(path, Path) else remote is not None and remote.is_folder
    is_file = path.is_file() if isinstance(path, Path) else not is_folder
    lister = lister_of(path, is_folder) if is_folder or is_file else None
    if lister is not None:
        _add_listing(found, lister(path), label, split)
    elif isinstance(path, Path) and is_folder:
        _add_listing(found, list_folder(path, leave_out), label, split)
    elif remote is not None and remote.is_folder:
        _add_listing(found, list_remote(remote, leave_out), label, split)
    elif is_file and Path(last_name(path)).suffix.lower() in LIST_SUFFIXES:
        found.entries += _read_list(path, split)
    elif is_file:
        found.entries.append(Entry(path, last_name(path), TOP_GROUP, split))
    else:
        raise audio.AudioError(
            f"{path}: must be a folder, an audio file or a list, got nothing there"
        )


def _add_listing(found: Inputs, listing: Listing, label: str, split: str | None) -> None:
    for item in listing.sound:
        group = item.group or _group(item.name)
        if group == TOP_GROUP and label:
            group = label.rstrip("/")
        given = split or _SPLITS.get((item.split or "").partition(".")[0])
        found.entries.append(Entry(item.place, label + item.name, group, given))
    found.other += [label + name for name in listing.other]
    found.n_hidden += listing.n_hidden
    found.unreadable += [{"path": label + name, "reason": why} for name, why in listing.unreadable]


def _group(name: str) -> str:
    """LibriSpeech's speaker, else the first folder of a relative path, "." at the top."""
    match = _LIBRISPEECH.fullmatch(name)
    if match:
        return match[2]
    first, slash, _ = name.partition("/")
    return first if slash else TOP_GROUP


def _official(name: str) -> str | None:
    """The split that a LibriSpeech folder's name gives, such as dev-clean."""
    match = _LIBRISPEECH.fullmatch(name)
    return _SPLITS[match[1]] if match and match[1] else None


def _read_list(path: Place, split: str | None) -> list[Entry]:
    """A list file: one path a line, or CSV, TSV or JSON lines with path, group and split."""
    try:
        with opened(path) as file:
            text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: must be a readable list, got: {error.strerror}") from error
    rows = list(_rows(path, text))
    if not rows:
        raise DataError(f"{path}: must list at least one file, got none")
    wheres = [_listed_at(path, row["path"]) for _, row in rows]
    entries = []
    seen: set[str] = set()
    names = relative_names(wheres, path)
    for (line, row), where, name in zip(rows, wheres, names, strict=True):
        if name in seen:
            raise DataError(
                f"{path}: line {line}: every path must be listed once, got {name} again"
            )
        seen.add(name)
        given = str(row.get("split") or "").strip().lower()
        if given and given not in _SPLITS:
            raise DataError(
                f"{path}: line {line}: split must be train, valid or test, got {given!r}"
            )
        group = str(row.get("group") or "").strip() or _group(name)
        entries.append(Entry(where, name, group, split or _SPLITS.get(given)))
    return entries


def _listed_at(path: Place, row: str) -> Place:
    """Where a row of a list points: from the list's folder on."""
    if is_address(row):
        return row
    if isinstance(path, Path):
        return Path(os.path.normpath(path.parent / row))
    protocol, _, folder = path.rpartition("/")[0].partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(folder, row))}"


def _rows(path: Place, text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line numbers and rows that hold at least `path`."""
    suffix = Path(last_name(path)).suffix.lower()
    if suffix in (".csv", ".tsv"):
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","
        )
        if not set(reader.fieldnames or ()) & set(PATH_COLUMNS):
            raise DataError(
                f"{path}: its first line must name the columns, path among them (and group and "
                f"split if wanted), got {', '.join(reader.fieldnames or ()) or 'nothing'}"
            )
        for row in reader:
            yield reader.line_num, _with_path(path, reader.line_num, row)
        return
    for line, content in enumerate(text.splitlines(), 1):
        content = content.strip()
        if not content or content.startswith("#"):
            continue
        if suffix in (".jsonl", ".ndjson"):
            try:
                row = json.loads(content)
            except ValueError as error:
                raise DataError(f"{path}: line {line}: must be JSON, got: {error}") from error
            yield line, _with_path(path, line, row)
        else:
            yield line, {"path": content}


def _with_path(path: Place, line: int, row: Any) -> dict[str, Any]:
    named = [row[key] for key in PATH_COLUMNS if row.get(key)] if isinstance(row, dict) else []
    if not named or not isinstance(named[0], str):
        raise DataError(f"{path}: line {line}: must have a path, got {row}")
    try:
        holds = b"\0" not in os.fsencode(named[0])
    except UnicodeEncodeError:
        holds = False
    if not holds:
        raise DataError(f"{path}: line {line}: path must be a file's name, got {named[0]!r}")
    return row | {"path": named[0]}
