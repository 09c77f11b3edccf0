"""What an audio folder holds: its files by content hash, and the entries they get in a manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wgpt.data.assemble import Source
from wgpt.data.encode import Job, hash_file

TOP_GROUP = "."


@dataclasses.dataclass
class Found:
    """What hashing the folder gave: distinct files in order of path, duplicates, unreadables."""

    jobs: dict[str, Job]  # by sha256
    paths: dict[str, str]  # sha256 to relative path of the first file with it
    duplicates: list[dict[str, Any]]
    unreadable: list[dict[str, Any]]

    def contents(self) -> dict[str, str | None]:
        """sha256 by relative path of every file, None where it could not be read."""
        return (
            {path: digest for digest, path in self.paths.items()}
            | {entry["path"]: entry["sha256"] for entry in self.duplicates}
            | {entry["path"]: None for entry in self.unreadable}
        )


def hash_all(audio_dir: Path, files: list[Path], partial: Path, progress: bool) -> Found:
    """Hash the files; each distinct content becomes one job whose result goes below `partial`."""
    found = Found({}, {}, [], [])
    for path in tqdm(files, "hashing", unit="file", disable=None if progress else True):
        name = path.relative_to(audio_dir).as_posix()
        try:
            digest, status = hash_file(path)
        except OSError as error:
            found.unreadable.append({"path": name, "reason": error.strerror or str(error)})
            continue
        if digest in found.jobs:
            found.duplicates.append(
                {"path": name, "sha256": digest, "duplicate_of": found.paths[digest]}
            )
            continue
        found.paths[digest] = name
        found.jobs[digest] = Job(
            path=str(path),
            sha256=digest,
            changed_ns=status.st_mtime_ns,
            size_bytes=status.st_size,
            partial=str(partial / f"{digest}.safetensors"),
        )
    return found


def group(path: str) -> str:
    """The first folder of a relative path, "." at the top."""
    first, slash, _ = path.partition("/")
    return first if slash else TOP_GROUP


def list_sources(found: Found, facts: dict[str, dict[str, Any]]) -> list[Source]:
    """The files that worked, in order of path."""
    chosen = [
        Source(path, digest, group(path), Path(found.jobs[digest].partial), facts[digest])
        for digest, path in found.paths.items()
        if digest in facts
    ]
    return sorted(chosen, key=lambda source: source.path)


def listed(
    found: Found, facts: dict[str, Any], reasons: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Manifest entries of the duplicates kept and of every file skipped."""
    kept, skipped = [], list(found.unreadable)
    for digest, reason in reasons.items():
        skipped.append({"path": found.paths[digest], "sha256": digest, "reason": reason})
    for entry in found.duplicates:
        if entry["sha256"] in facts:
            kept.append(entry | {"group": group(entry["path"])})
        else:
            skipped.append(
                {"path": entry["path"], "sha256": entry["sha256"],
                 "reason": reasons[entry["sha256"]]}
            )  # fmt: skip
    return kept, skipped
