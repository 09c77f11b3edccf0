"""A prepared data folder, opened: memory-mapped tokens and mel slices behind a checked manifest.

    DATA/manifest.json                 what is in here and how it was made (format below)
    DATA/<split>/tokens.npy            uint16 (N, K), all clips end to end
    DATA/<split>/offsets.npy           int64 (n_clips + 1,), first step of each clip, then N
    DATA/<split>/mel/<source>.npy      float16 (N * r, M), natural-log mel, not normalised; or its
                                       codes uint8 (N * r, M * bits / 8), see levels.py

A mel source says which audio the slices were computed from: `wave` (the true audio), `decoded-k`
(audio decoded from the first k codebooks), `leaky-W` (the true audio under a centred window of W
samples, which sees the future: for experiments on leakage only).
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgpt.config import STEP_RATE_HZ, MelConfig
from wgpt.data.levels import CodedFrames, MelLevels
from wgpt.data.mapped import open_array, read_rows
from wgpt.errors import DataError
from wgpt.files import check_sha256, read_json

FORMAT = "wgpt-data"
FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
SHUFFLED = "shuffled"  # a mel source of any data that have `wave`: slices of other audio
MANIFEST_LIMIT_BYTES = 1 << 30


@dataclass(eq=False)
class Split:
    """One split: clips laid end to end in memory-mapped arrays.

    tokens uint16 (N, K); offsets int64 (n_clips + 1,); mel maps a source to float16 (N * r, M),
    or to what reads so; groups names each clip's group (the first folder of its path, "." at the
    top).
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    mel: dict[str, np.ndarray | CodedFrames]
    groups: list[str]
    frames_per_step: int
    codebook_size: int
    silence: float

    @property
    def n_clips(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_steps(self) -> int:
        return int(self.offsets[-1])

    @property
    def n_codebooks(self) -> int:
        return int(self.tokens.shape[1])

    def clip_steps(self, i: int) -> int:
        """Steps of clip i."""
        self._check_clip(i)
        return int(self.offsets[i + 1] - self.offsets[i])

    def clip(self, i: int, mel_source: str | None = None) -> tuple[Tensor, Tensor | None]:
        """A whole clip: tokens int64 (K, T) and, for a source, frames float32 (T * r, M)."""
        return self.slice(i, 0, self.clip_steps(i), mel_source)

    def slice(
        self, i: int, start: int, stop: int, mel_source: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Steps [start, stop) of clip i: tokens int64 (K, n) and frames float32 (n * r, M)."""
        n_steps = self.clip_steps(i)
        if not 0 <= start <= stop <= n_steps:
            raise DataError(
                f"{self.name}: steps must lie in [0, {n_steps}] of clip {i}, got {start} to {stop}"
            )
        first = int(self.offsets[i]) + start
        last = first + stop - start
        tokens = torch.from_numpy(read_rows(self.tokens, first, last).T.astype(np.int64))
        if mel_source is None:
            return tokens, None
        r = self.frames_per_step
        array = self.mel_array(mel_source)
        frames = (
            read_rows(array, first * r, last * r)
            if isinstance(array, np.ndarray)
            else array[first * r : last * r]
        )
        return tokens, torch.from_numpy(np.array(frames)).float()

    def joined(self, n_steps: int) -> Split:
        """The same steps in fewer clips: neighbours of one group, in order, are one clip until it
        has n_steps; 0: as they are."""
        starts = [0] if self.n_clips else []
        for i in range(1, self.n_clips):
            is_full = self.offsets[i] - self.offsets[starts[-1]] >= n_steps
            if is_full or self.groups[i] != self.groups[i - 1]:
                starts.append(i)
        return replace(
            self,
            offsets=np.append(self.offsets[starts], self.offsets[-1]),
            groups=[self.groups[i] for i in starts],
        )

    def mel_array(self, source: str) -> np.ndarray | CodedFrames | _Rolled:
        """The float16 (N * r, M) array of a source. `shuffled` is that of `wave`, half the split
        further on: real slices that tell nothing of their token."""
        stored = "wave" if source == SHUFFLED else source
        if stored not in self.mel:
            raise DataError(
                f"{self.name}: mel source must be one of {', '.join(self.mel) or '(none)'}, "
                f"got {source!r}; prepare the data with --mel-sources {stored}"
            )
        array = self.mel[stored]
        if source == SHUFFLED:
            return _Rolled(array, self.n_steps // 2 * self.frames_per_step)
        return array

    def _check_clip(self, i: int) -> None:
        if not 0 <= i < self.n_clips:
            raise DataError(f"{self.name}: clip must lie in [0, {self.n_clips}), got {i}")


class Dataset:
    """A prepared folder. Opening it checks every shape, type and size against the manifest."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        manifest, where = self.manifest, self.path / "manifest.json"
        try:
            self.codec_identity: dict[str, Any] = dict(manifest["codec"]["identity"])
            self.n_codebooks = int(manifest["codec"]["n_codebooks"])
            self.codebook_size = int(manifest["codec"]["codebook_size"])
            self.mel_sources: tuple[str, ...] = tuple(manifest["mel_sources"])
            known = {field.name for field in fields(MelConfig)}
            self.mel_config = MelConfig(**{k: manifest["mel"][k] for k in known})
            self.mel_levels = MelLevels.from_settings(manifest.get("settings", {}))
            self._normalisation = {
                source: tuple(
                    torch.tensor(manifest["normalisation"][source][key], dtype=torch.float32)
                    for key in ("mean", "inv_std")
                )
                for source in self.mel_sources
                if source in manifest["normalisation"]
            }
            groups = _groups(manifest)
            # Earlier versions knew no test split.
            given = {name: manifest["totals"][name] for name in SPLITS[:2]}
            given["test"] = manifest["totals"].get("test")
            totals = {
                name: (int(total["steps"]), int(total["clips"])) if total else (0, 0)
                for name, total in given.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: must follow the format, got a bad entry: {error}") from error
        for source in self.mel_sources:  # it becomes part of a path
            if not re.fullmatch(r"[a-z]+(-\d+)?", source):
                raise DataError(f"{where}: mel_sources must be plain names, got {source!r}")
        for source, pair in self._normalisation.items():
            for values in pair:
                _require(where, f"normalisation of {source}", (self.mel_config.n_mels,),
                         tuple(values.shape))  # fmt: skip
        self._splits = {
            name: self._open(name, *total, groups[name]) if given[name] else self._empty(name)
            for name, total in totals.items()
        }

    @property
    def treatment(self) -> dict[str, Any]:
        """What was done to the recordings (treatment.Treatment); empty in data of version 0.1."""
        return dict(self.manifest.get("settings", {}).get("treatment", {}))

    def split(self, name: str) -> Split:
        """`train`, `valid` or `test`; each may be empty (n_steps 0)."""
        if name not in self._splits:
            raise DataError(f"{self.path}: split must be one of {SPLITS}, got {name!r}")
        return self._splits[name]

    def joined(self, seconds: float) -> Dataset:
        """These data with short clips joined to this length or more, see Split.joined."""
        other = copy.copy(self)
        n_steps = round(seconds * STEP_RATE_HZ)
        other._splits = {name: split.joined(n_steps) for name, split in self._splits.items()}
        return other

    def normalisation(self, source: str) -> tuple[Tensor, Tensor]:
        """Per-bin (mean, inv_std) of the training split, float32 (M,) each.

        Data without a training split have none: a model that is evaluated on them brings its own.
        """
        source = "wave" if source == SHUFFLED else source
        if source in self.mel_sources and source not in self._normalisation:
            raise DataError(
                f"{self.path}: has no training split, so no normalisation to train with; prepare "
                "recordings for training too (wgpt prepare AUDIO --valid DIR), or evaluate a run "
                "on it (wgpt eval RUN --data)"
            )
        if source not in self._normalisation:
            raise DataError(
                f"{self.path}: mel source must be one of {', '.join(self.mel_sources)}, "
                f"got {source!r}; prepare the data with --mel-sources {source}"
            )
        mean, inv_std = self._normalisation[source]
        return mean, inv_std

    def verify(self) -> None:
        """Read every array and compare it with the manifest's sha256; DataError on a difference."""
        files = self.manifest["files"]
        names = [
            f"{split}/{name}"
            for split in SPLITS
            if self.split(split).n_clips
            for name in ("tokens.npy", "offsets.npy", *(f"mel/{s}.npy" for s in self.mel_sources))
        ]
        missing = sorted(set(names) - set(files))
        if missing:
            raise DataError(f"{self.path / 'manifest.json'}: has no sha256 of {missing[0]}")
        try:
            sums = {name: files[name]["sha256"] for name in names}
        except (KeyError, TypeError) as error:
            where = self.path / "manifest.json"
            raise DataError(f"{where}: must follow the format, got a bad entry: {error}") from error
        check_sha256(self.path, sums, DataError, "prepare the data again")

    def _empty(self, name: str) -> Split:
        config = self.mel_config
        mel: dict[str, np.ndarray | CodedFrames] = {
            s: np.zeros((0, config.n_mels), np.float16) for s in self.mel_sources
        }
        tokens = np.zeros((0, self.n_codebooks), np.uint16)
        return Split(name, tokens, np.zeros(1, np.int64), mel, [], config.frames_per_step,
                     self.codebook_size, float(torch.tensor(config.floor).log()))  # fmt: skip

    def _open(self, name: str, n_steps: int, n_clips: int, groups: list[str]) -> Split:
        folder, config = self.path / name, self.mel_config
        n_frames = n_steps * config.frames_per_step
        offsets_path = folder / "offsets.npy"
        offsets = np.asarray(_load(offsets_path, np.int64, (n_clips + 1,)))
        if offsets[0] != 0 or offsets[-1] != n_steps or (np.diff(offsets) <= 0).any():
            raise DataError(f"{offsets_path}: offsets must rise from 0 to {n_steps}")
        _require(self.path / "manifest.json", f"clips of {name}", n_clips, len(groups))
        mel: dict[str, np.ndarray | CodedFrames] = {}
        for source in self.mel_sources:
            path, levels = folder / "mel" / f"{source}.npy", self.mel_levels
            if levels is None:
                mel[source] = _load(path, np.float16, (n_frames, config.n_mels))
            else:
                shape = (n_frames, levels.row_bytes(config.n_mels))
                mel[source] = CodedFrames(_load(path, np.uint8, shape), levels)
        return Split(
            name=name,
            tokens=_load(folder / "tokens.npy", np.uint16, (n_steps, self.n_codebooks)),
            offsets=offsets,
            mel=mel,
            groups=groups,
            frames_per_step=config.frames_per_step,
            codebook_size=self.codebook_size,
            silence=float(torch.tensor(config.floor).log()),
        )


class _Rolled:
    """Rows of a memory-mapped array, those of row `by` first; read by slices."""

    def __init__(self, array: np.ndarray | CodedFrames, by: int) -> None:
        self.array, self.by, self.shape = array, by, array.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        at = (np.arange(rows.start, rows.stop) + self.by) % len(self.array)
        return self.array[at]


def read_manifest(path: Path) -> dict[str, Any]:
    """Read DATA/manifest.json and check that it is one of ours."""
    where = path / "manifest.json"
    try:
        manifest = read_json(where, DataError, MANIFEST_LIMIT_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{path}: must be a folder that `wgpt prepare RECORDINGS --out DATA` wrote, got "
            + ("one without manifest.json" if path.is_dir() else "no folder")
            + "; if prepare was interrupted, run it again"
        ) from None
    version = manifest.get("format"), manifest.get("version")
    _require(where, "(format, version)", (FORMAT, FORMAT_VERSION), version)
    return manifest


def _groups(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Group of every clip, by split, in clip order."""
    clips: dict[str, dict[int, str]] = {name: {} for name in SPLITS}
    for source in manifest["sources"]:
        for index in source.get("clips", ()):
            clips[source["split"]][index] = source["group"]
    return {name: [found[i] for i in range(len(found))] for name, found in clips.items()}


def _load(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        # An array without elements cannot be mapped on every platform.
        array = np.load(path, allow_pickle=False) if 0 in shape else open_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: must be a whole .npy array, got: {error}") from error
    _require(path, "dtype", np.dtype(dtype).name, array.dtype.name)
    _require(path, "shape", shape, array.shape)
    return array


def _require(path: Path, what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise DataError(f"{path}: {what} must be {expected}, got {got}")
