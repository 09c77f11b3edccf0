"""The sound a codec learns from: recordings decoded once, and random crops of them.

A corpus folder holds ``sound.i16`` (mono, 24 kHz) and ``corpus.json``: one entry a clip with its
bounds, its group (what belongs together: a speaker, a scene, a track) and its sha256; the sha256 of
what was listed and of the sound; sealed, and written last.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgpt import audio
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import AudioError, DataError
from wgpt.files import check_sha256, read_json, replacing, sha256_of, write_sealed

logger = logging.getLogger(__name__)

LEAST_RATE_HZ = 16_000  # what a telephone leaves of a voice teaches a 24 kHz codec little
LEAST_LEVEL = 3e-3  # root mean square below which a crop is drawn again
MUSIC_SHARE = 0.3  # of the crops, where there is music
MIXED_SHARE = 0.08  # of the crops are a sum of two


@dataclass(frozen=True)
class Recording:
    """A file to train on."""

    path: Path
    sha256: str
    kind: str  # "music", or "speech" for everything else
    group: str


def list_recordings(source: Path) -> list[Recording]:
    """What to train on: the `train` rows of a recordings table, or every sound in a folder.

    A table has the columns path (relative to it), sha256, kind, group, split and rate_hz, as
    benchmarks/recordings.py writes them. No file whose bytes are among the held-out rows is ever
    returned, and every file is hashed when it is decoded (`collect`).

    Raises:
        DataError: no such table or folder, a table without these columns, nothing to train on.
    """
    if source.is_dir():
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in audio.SUFFIXES)
        found = [Recording(p, sha256_of(p), "speech", p.parent.name) for p in paths]
    elif source.is_file():
        try:
            with open(source, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"codec-train: {source} must be a table in UTF-8, {error}") from None
        needed = {"path", "sha256", "kind", "group", "split", "rate_hz"}
        missing = needed - set(rows[0] if rows else ())
        if missing:
            raise DataError(
                f"codec-train: {source} must have the columns {', '.join(sorted(needed))}; "
                f"missing {', '.join(sorted(missing))}; see benchmarks/recordings.py"
            )
        held_out = {row["sha256"] for row in rows if row["split"] != "train"}
        found = [
            Recording(source.parent / row["path"], row["sha256"], row["kind"], row["group"])
            for row in rows
            if row["sha256"] not in held_out and _rate_hz(source, row) >= LEAST_RATE_HZ
        ]
    else:
        raise DataError(f"codec-train: {source} is neither a folder nor a table of recordings")
    if not found:
        raise DataError(f"codec-train: {source} holds nothing to train on")
    return found


def _rate_hz(source: Path, row: Mapping[str, Any]) -> int:
    try:
        return int(row["rate_hz"])
    except (TypeError, ValueError):
        raise DataError(
            f"codec-train: {source}: rate_hz must be a whole number of Hz, got {row['rate_hz']!r} "
            f"for {row['path']}"
        ) from None


def listed(recordings: Iterable[Recording]) -> list[str]:
    """What a corpus is made of: the sha256 of its recordings, sorted."""
    return sorted({recording.sha256 for recording in recordings})


def collect(recordings: Sequence[Recording], folder: Path) -> None:
    """Decode recordings into a corpus folder.

    Files that cannot be decoded are left out with a warning.

    Raises:
        DataError: a file is not the one that was listed, or none could be decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.json").unlink(missing_ok=True)
    clips: list[dict[str, Any]] = []
    start = 0
    with replacing(folder / "sound.i16") as temporary, open(temporary, "wb") as file:
        for recording in recordings:
            if not recording.path.is_file():
                raise DataError(f"codec-train: {recording.path}, of the table, is no file")
            if sha256_of(recording.path) != recording.sha256:
                raise DataError(
                    f"codec-train: {recording.path} is not the file of the table (its sha256 "
                    "differs); make the table anew"
                )
            try:
                wave = audio.read(recording.path, SAMPLE_RATE_HZ)
            except AudioError as error:
                logger.warning("left out: %s", error)
                continue
            file.write((np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())
            clips.append(
                {
                    "start": start,
                    "end": start + wave.size,
                    "kind": "music" if recording.kind == "music" else "speech",
                    "group": recording.group,
                    "sha256": recording.sha256,
                }
            )
            start += wave.size
        if not clips:
            raise DataError("codec-train: none of the recordings could be decoded")
    facts = {"listed": listed(recordings), "sound": sha256_of(folder / "sound.i16")}
    write_sealed(folder / "corpus.json", {**facts, "clips": clips})


class Corpus:
    """Reads a corpus folder.

    Attributes:
        minutes: minutes of audio by kind.
        listed: see `listed`.
        sha256: of corpus.json, which names every recording and the sound by their own.

    Raises DataError where a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        way_out = f"delete {folder}, and --resume makes it again"
        try:
            facts = read_json(folder / "corpus.json", DataError)
            clips, self.listed, sound = (facts[name] for name in ("clips", "listed", "sound"))
        except (DataError, KeyError) as error:
            raise DataError(f"{error}; {way_out}") from None
        check_sha256(folder, {"sound.i16": sound}, DataError, way_out)
        self.sha256 = sha256_of(folder / "corpus.json")
        self._sound = np.memmap(folder / "sound.i16", "<i2", mode="r")
        self.minutes: dict[str, float] = {}
        # By kind: bounds of the groups' clips, and cumulative shares of groups and of clips.
        self._groups: dict[str, tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]] = {}
        for kind in sorted({clip["kind"] for clip in clips}):
            self._groups[kind] = self._shares([c for c in clips if c["kind"] == kind])
            samples = sum(c["end"] - c["start"] for c in clips if c["kind"] == kind)
            self.minutes[kind] = samples / SAMPLE_RATE_HZ / 60

    @staticmethod
    def _shares(
        clips: list[Mapping[str, Any]],
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Groups weigh as the root of their length, so that one long voice does not rule."""
        by_group: dict[str, list[tuple[int, int]]] = {}
        for clip in clips:
            by_group.setdefault(clip["group"], []).append((clip["start"], clip["end"]))
        groups = []
        for _, bounds in sorted(by_group.items()):
            array = np.array(bounds)
            groups.append((array, (array[:, 1] - array[:, 0]).cumsum()))
        weights = np.array([float(ends[-1]) ** 0.5 for _, ends in groups]).cumsum()
        return weights / weights[-1], groups

    def crops(self, rng: np.random.Generator, n_crops: int, n_samples: int) -> Tensor:
        """Random audible crops at random levels, some of them sums of two; float32 (n, L)."""
        crops = [self._draw(rng, n_samples) for _ in range(n_crops)]
        return torch.from_numpy(np.stack(crops))

    def _draw(self, rng: np.random.Generator, n_samples: int) -> np.ndarray:
        crop = self._draw_one(rng, n_samples)
        if rng.random() < MIXED_SHARE:
            crop = crop + self._draw_one(rng, n_samples) * 10 ** (rng.uniform(-12, 0) / 20)
        gain = 10 ** (rng.uniform(-8, 2) / 20)
        return np.clip(crop * gain, -1, 1).astype(np.float32)

    def _draw_one(self, rng: np.random.Generator, n_samples: int) -> np.ndarray:
        kinds = list(self._groups)
        music = "music" in kinds and (len(kinds) == 1 or rng.random() < MUSIC_SHARE)
        weights, groups = self._groups["music" if music else "speech"]
        for _ in range(20):
            bounds, ends = groups[int(np.searchsorted(weights, rng.random()))]
            clip = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
            start, end = bounds[min(clip, len(bounds) - 1)]
            at = int(rng.integers(start, max(start + 1, end - n_samples)))
            crop = self._sound[at : min(end, at + n_samples)].astype(np.float32) / 32767
            if np.square(crop).sum() > LEAST_LEVEL**2 * n_samples:
                break
        return np.pad(crop, (0, n_samples - crop.size))
