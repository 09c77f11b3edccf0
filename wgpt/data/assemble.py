"""Finished files to the final arrays and manifest, moved into place in one last step."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wgpt.data.dataset import FORMAT, FORMAT_VERSION, SPLITS
from wgpt.data.encode import read_partial
from wgpt.errors import DataError
from wgpt.files import sha256_of, sync_folder, write_atomically

# A bin that hardly varies (a band above the material's bandwidth) must not be blown up into noise.
STD_FLOOR = 0.1
BUILDING = ".building"


@dataclass
class Source:
    """One distinct file in order of path: where its result lies and what it becomes."""

    path: str
    sha256: str
    group: str
    partial: Path
    facts: dict[str, Any]
    split: str = ""
    clips: list[int] = field(default_factory=list)

    @property
    def n_steps(self) -> int:
        return sum(self.facts["steps"])


def choose_valid(hashes: list[str], valid_fraction: float) -> set[str]:
    """The validation files: the lowest content hashes.

    A share of valid_fraction by number of files, at least one and not all of them when there are
    two or more; none when valid_fraction is 0 or there is one file only.
    """
    if valid_fraction == 0 or len(hashes) < 2:
        return set()
    n_valid = min(max(round(valid_fraction * len(hashes)), 1), len(hashes) - 1)
    return set(sorted(hashes)[:n_valid])


class ArrayFile:
    """An .npy file of known shape written in pieces from front to back."""

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype, self.shape = path, np.dtype(dtype), shape
        self.n_rows = 0
        self.file: BinaryIO = open(path, "wb")
        np.lib.format.write_array_header_1_0(
            self.file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": shape,
            },
        )

    def append(self, rows: np.ndarray) -> None:
        """Append rows of shape (n, *shape[1:])."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape[1:]:
            raise DataError(
                f"{self.path}: rows must be {self.dtype} {self.shape[1:]}, "
                f"got {rows.dtype} {rows.shape[1:]}"
            )
        self.file.write(np.ascontiguousarray(rows).tobytes())
        self.n_rows += len(rows)

    def close(self) -> None:
        """Flush to disk and check that every row came."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.n_rows != self.shape[0]:
            raise DataError(f"{self.path}: must get {self.shape[0]} rows, got {self.n_rows}")


class Moments:
    """Running per-bin sum and sum of squares in float64, of offsets from the first frame.

    Taking the first frame off keeps the sums small, so no digits cancel in the variance.
    """

    def __init__(self, n_mels: int) -> None:
        self.n = 0
        self.shift: np.ndarray | None = None
        self.total, self.square = np.zeros(n_mels), np.zeros(n_mels)

    def add(self, frames: np.ndarray) -> None:
        """Count frames float16 (n, M)."""
        values = frames.astype(np.float64)
        if self.shift is None and len(values):
            self.shift = values[0].copy()
        if self.shift is not None:
            values -= self.shift
        self.n += len(values)
        self.total += values.sum(axis=0)
        self.square += np.square(values).sum(axis=0)

    def constants(self) -> dict[str, list[float]]:
        """{"mean": [M], "inv_std": [M]} with the deviation floored at STD_FLOOR."""
        if self.n == 0 or self.shift is None:
            raise DataError("train: must hold at least one frame to normalise by")
        offset = self.total / self.n
        std = np.sqrt(np.maximum(self.square / self.n - offset * offset, 0.0))
        inv_std = 1.0 / np.maximum(std, STD_FLOOR)
        return {"mean": (self.shift + offset).tolist(), "inv_std": inv_std.tolist()}


def assemble(
    out: Path,
    sources: list[Source],
    settings: dict[str, Any],
    *,
    duplicates: list[dict[str, Any]],
    skipped: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write the arrays of both splits and the manifest, then move them into `out`.

    The manifest moves last and an old one is removed first, so a folder with a manifest is whole.

    Returns:
        The manifest.
    """
    valid = choose_valid([source.sha256 for source in sources], settings["valid_fraction"])
    for source in sources:
        source.split = "valid" if source.sha256 in valid else "train"
    building = out / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    moments = {name: Moments(settings["mel"]["n_mels"]) for name in settings["mel_sources"]}
    totals = {}
    for split in SPLITS:
        mine = [source for source in sources if source.split == split]
        _write_split(building / split, mine, settings,
                     moments if split == "train" else {})  # fmt: skip
        totals[split] = {
            "files": len(mine),
            "clips": sum(len(source.clips) for source in mine),
            "steps": sum(source.n_steps for source in mine),
            "seconds": round(sum(source.facts["seconds"] for source in mine), 6),
        }
    arrays = sorted(path for path in building.rglob("*.npy"))
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "codec": settings["codec"],
        "mel": settings["mel"],
        "mel_sources": settings["mel_sources"],
        "settings": settings,
        "totals": totals,
        "normalisation": {name: moment.constants() for name, moment in moments.items()},
        "files": {
            path.relative_to(building).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
            for path in arrays
        },
        "sources": sorted([_entry(s) for s in sources] + duplicates, key=lambda e: e["path"]),
        "skipped": sorted(skipped, key=lambda e: e["path"]),
    }
    _move(out, building, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return manifest


def bytes_needed(sources: list[Source], settings: dict[str, Any]) -> int:
    """Bytes the final arrays will take."""
    mel = settings["mel"]
    frame_bytes = 2 * mel["n_mels"] * mel["frames_per_step"] * len(settings["mel_sources"])
    step_bytes = int(2 * settings["codec"]["n_codebooks"] + frame_bytes)
    return sum(source.n_steps for source in sources) * step_bytes


def _write_split(
    folder: Path,
    sources: list[Source],
    settings: dict[str, Any],
    moments: dict[str, Moments],
) -> None:
    """Write tokens.npy, offsets.npy and mel/*.npy, and number the sources' clips."""
    n_steps, n_codebooks = sum(s.n_steps for s in sources), settings["codec"]["n_codebooks"]
    frames = (n_steps * settings["mel"]["frames_per_step"], settings["mel"]["n_mels"])
    files = {"tokens": ArrayFile(folder / "tokens.npy", np.uint16, (n_steps, n_codebooks))}
    for name in settings["mel_sources"]:
        files[f"mel.{name}"] = ArrayFile(folder / "mel" / f"{name}.npy", np.float16, frames)
    offsets = [0]
    for source in sources:
        arrays, facts = read_partial(source.partial)
        for name, file in files.items():
            file.append(arrays[name])
        for name, moment in moments.items():
            moment.add(arrays[f"mel.{name}"])
        for steps in facts["steps"]:
            source.clips.append(len(offsets) - 1)
            offsets.append(offsets[-1] + steps)
    table = ArrayFile(folder / "offsets.npy", np.int64, (len(offsets),))
    table.append(np.array(offsets, dtype=np.int64))
    for file in (*files.values(), table):
        file.close()


def _entry(source: Source) -> dict[str, Any]:
    entry = {
        "path": source.path,
        "sha256": source.sha256,
        "seconds": round(source.facts["seconds"], 6),
        "steps": source.n_steps,
        "split": source.split,
        "clips": source.clips,
        "group": source.group,
    }
    notes = list(source.facts["notes"])
    if len(source.clips) > 1:
        notes.append(f"cut into {len(source.clips)} clips, each encoded as if it began in silence")
    return entry | ({"notes": notes} if notes else {})


def _move(out: Path, building: Path, manifest: bytes) -> None:
    # Written in here: a temporary that a kill leaves beside the real one would stay for good.
    write_atomically(building / "manifest.json", manifest)
    (out / "manifest.json").unlink(missing_ok=True)
    sync_folder(out)
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        for folder in (building / split / "mel", building / split):
            sync_folder(folder)
        os.replace(building / split, out / split)
    sync_folder(out)
    os.replace(building / "manifest.json", out / "manifest.json")
    sync_folder(out)
    building.rmdir()
