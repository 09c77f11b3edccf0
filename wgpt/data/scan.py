"""What the inputs hold: files by content hash, and the entries they get in a manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wgpt.data.encode import Job, hash_file
from wgpt.data.inputs import Entry
from wgpt.data.splits import Source
from wgpt.files import is_bad_day


@dataclasses.dataclass
class Found:
    """What hashing gave: distinct files in order, duplicates, and what could not be read."""

    jobs: dict[str, Job]  # by sha256
    entries: dict[str, Entry]  # sha256 to the first entry with it
    duplicates: list[dict[str, Any]]
    unreadable: list[dict[str, Any]]

    def add(self, digest: str, entry: Entry) -> bool:
        """Notes a file; False if another had the same content before."""
        if digest not in self.entries:
            self.entries[digest] = entry
            return True
        self.duplicates.append(
            {"path": entry.name, "sha256": digest, "group": entry.group,
             "duplicate_of": self.entries[digest].name}
        )  # fmt: skip
        return False

    def contents(self) -> dict[str, str | None]:
        """sha256 by name of every file, None where it could not be read."""
        return (
            {entry.name: digest for digest, entry in self.entries.items()}
            | {entry["path"]: entry["sha256"] for entry in self.duplicates}
            | {entry["path"]: None for entry in self.unreadable}
        )

    def known(self) -> set[str]:
        """sha256 of everything that is there."""
        return set(self.jobs)


def hash_all(
    entries: list[Entry], unreadable: list[dict[str, Any]], partial: Path, progress: bool
) -> Found:
    """Hash the files; each distinct content becomes one job whose result goes below `partial`.

    Raises:
        OSError: the machine's fault (an I/O error): no file is left out for it.
    """
    found = Found({}, {}, [], list(unreadable))
    for entry in tqdm(entries, "hashing", unit="file", disable=None if progress else True):
        try:
            digest, status = hash_file(entry.path)
        except OSError as error:
            if is_bad_day(error):
                raise
            reason = error.strerror or str(error)
            found.unreadable.append({"path": entry.name, "reason": reason})
            continue
        if not found.add(digest, entry):
            continue
        found.jobs[digest] = Job(
            path=str(entry.path),
            sha256=digest,
            changed_ns=status.st_mtime_ns,
            size_bytes=status.st_size,
            partial=str(partial / f"{digest}.safetensors"),
        )
    return found


def list_sources(
    found: Found, facts: dict[str, dict[str, Any]], reasons: dict[str, str]
) -> tuple[list[Source], list[dict[str, Any]], list[dict[str, Any]]]:
    """The files that worked, by group and name; manifest entries of duplicates and of the skipped.

    Two files whose samples are the same (a WAV and its FLAC) are duplicates too.
    """
    sources: list[Source] = []
    duplicates: list[dict[str, Any]] = []
    skipped = list(found.unreadable)
    by_sound: dict[str, str] = {}
    for digest, entry in found.entries.items():
        if digest not in facts:
            skipped.append({"path": entry.name, "sha256": digest, "reason": reasons[digest]})
            continue
        first = by_sound.setdefault(facts[digest]["sound_sha256"], entry.name)
        if first != entry.name:
            duplicates.append(
                {"path": entry.name, "sha256": digest, "group": entry.group, "duplicate_of": first}
            )
            continue
        partial = Path(found.jobs[digest].partial)
        sources.append(
            Source(entry.name, digest, entry.group, partial, facts[digest], given=entry.split)
        )
    for duplicate in found.duplicates:
        digest = duplicate["sha256"]
        if digest in facts:
            duplicates.append(duplicate)
        else:
            skipped.append({"path": duplicate["path"], "sha256": digest, "reason": reasons[digest]})
    # Neighbours belong together: see Split.joined.
    return sorted(sources, key=lambda source: (source.group, source.path)), duplicates, skipped
