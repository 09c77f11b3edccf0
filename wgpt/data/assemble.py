"""Finished files to the final arrays and manifest, moved into place in one last step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wgpt.data.dataset import FORMAT, FORMAT_VERSION, SPLITS
from wgpt.data.encode import read_partial
from wgpt.data.levels import MelLevels
from wgpt.data.splits import Source
from wgpt.errors import DataError
from wgpt.files import sha256_of, sync_folder, write_sealed

# A bin that hardly varies (a band above the material's bandwidth) must not be blown up into noise.
STD_FLOOR = 0.1
BUILDING = ".building"


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
    finish: Callable[[dict[str, Any], Path], None] = lambda manifest, building: None,
) -> dict[str, Any]:
    """Write the arrays of all splits and the manifest, then move them into `out`.

    The manifest moves last and an old one is removed first, so a folder with a manifest is whole.

    Args:
        finish: adds to the manifest, and to the folder that will become `out`, before the move.

    Returns:
        The manifest.
    """
    building = out / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    moments = {name: Moments(settings["mel"]["n_mels"]) for name in settings["mel_sources"]}
    totals = {split: _write_split(building, split, sources, settings, moments) for split in SPLITS}
    arrays = sorted(path for path in building.rglob("*.npy"))
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "codec": settings["codec"],
        "mel": settings["mel"],
        "mel_sources": settings["mel_sources"],
        "settings": settings,
        "totals": totals,
        # Constants of the training split; a folder without one has none.
        "normalisation": {name: moment.constants() for name, moment in moments.items() if moment.n},
        "files": {
            path.relative_to(building).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
            for path in arrays
        },
        "sources": sorted(
            [entry for source in sources for entry in _entries(source)] + duplicates,
            key=lambda e: (e["path"], e.get("first_step", 0)),
        ),
        "skipped": sorted(skipped, key=lambda e: e["path"]),
    }
    finish(manifest, building)
    _move(out, building, manifest)
    return manifest


def bytes_needed(sources: list[Source], settings: dict[str, Any]) -> int:
    """Bytes the final arrays will take."""
    mel = settings["mel"]
    levels = MelLevels.from_settings(settings)
    row_bytes = levels.row_bytes(mel["n_mels"]) if levels else 2 * mel["n_mels"]
    frame_bytes = row_bytes * mel["frames_per_step"] * len(settings["mel_sources"])
    step_bytes = int(2 * settings["codec"]["n_codebooks"] + frame_bytes)
    return sum(source.n_steps for source in sources) * step_bytes


def _write_split(
    building: Path,
    split: str,
    sources: list[Source],
    settings: dict[str, Any],
    moments: dict[str, Moments],
) -> dict[str, Any]:
    """Write tokens.npy, offsets.npy and mel/*.npy, number the clips, and return the totals."""
    parts = [(s, part) for s in sources for part in s.parts if part.split == split]
    n_steps = sum(part.last - part.first for _, part in parts)
    mel, n_codebooks = settings["mel"], settings["codec"]["n_codebooks"]
    r, folder = mel["frames_per_step"], building / split
    files = {"tokens": ArrayFile(folder / "tokens.npy", np.uint16, (n_steps, n_codebooks))}
    levels = MelLevels.from_settings(settings)
    width = levels.row_bytes(mel["n_mels"]) if levels else mel["n_mels"]
    for name in settings["mel_sources"]:
        files[f"mel.{name}"] = ArrayFile(
            folder / "mel" / f"{name}.npy",
            np.uint8 if levels else np.float16,
            (n_steps * r, width),
        )
    offsets, counts = [0], np.zeros(1 << 16, np.int64)
    for source, part in parts:
        arrays, facts = read_partial(source.partial)
        for name, file in files.items():
            scale = 1 if name == "tokens" else r
            file.append(arrays[name][part.first * scale : part.last * scale])
        counts += np.bincount(arrays["tokens"][part.first : part.last, 0], minlength=1 << 16)
        if split == "train":
            for name, moment in moments.items():
                frames = arrays[f"mel.{name}"][part.first * r : part.last * r]
                moment.add(levels.decode(frames) if levels else frames)
        ends = np.clip(np.cumsum(facts["steps"]), part.first, part.last) - part.first
        for steps in np.diff(ends, prepend=0):
            if steps:
                part.clips.append(len(offsets) - 1)
                offsets.append(offsets[-1] + int(steps))
    table = ArrayFile(folder / "offsets.npy", np.int64, (len(offsets),))
    table.append(np.array(offsets, dtype=np.int64))
    for file in (*files.values(), table):
        file.close()
    hop_s = mel["hop_samples"] / mel["sample_rate_hz"]
    return {
        "files": len({source.sha256 for source, _ in parts}),
        "clips": len(offsets) - 1,
        "groups": len({source.group for source, _ in parts}),
        "steps": n_steps,
        "seconds": round(n_steps * hop_s, 6),
        "most_frequent_token": {
            "token": int(counts.argmax()),
            "share": round(float(counts.max()) / max(n_steps, 1), 6),
        },
    }


def _entries(source: Source) -> list[dict[str, Any]]:
    """Manifest entries of a file: one for each split it has part in."""
    entries: list[dict[str, Any]] = []
    for part in source.parts:
        share = (part.last - part.first) / source.n_steps
        entry = {
            "path": source.path,
            "sha256": source.sha256,
            "seconds": round(source.facts["seconds"] * share, 6),
            "steps": part.last - part.first,
            "split": part.split,
            "clips": part.clips,
            "group": source.group,
        }
        notes = list(source.facts["notes"])
        if len(source.facts["steps"]) > 1:
            notes.append(
                f"cut into {len(source.facts['steps'])} clips, each encoded as if it began in "
                "silence"
            )
        if len(source.parts) > 1:
            entry["first_step"] = part.first
        if not entries:  # once, with the first part
            entry["facts"] = source.facts
        entries.append(entry | ({"notes": notes} if notes else {}))
    return entries


def _move(out: Path, building: Path, manifest: dict[str, Any]) -> None:
    # Written in here: a temporary that a kill leaves beside the real one would stay for good.
    write_sealed(building / "manifest.json", manifest)
    (out / "manifest.json").unlink(missing_ok=True)
    sync_folder(out)
    for page in building.glob("*.html"):
        os.replace(page, out / page.name)
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        for folder in (building / split / "mel", building / split):
            sync_folder(folder)
        os.replace(building / split, out / split)
    sync_folder(out)
    os.replace(building / "manifest.json", out / "manifest.json")
    sync_folder(out)
    building.rmdir()
