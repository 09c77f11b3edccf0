"""One audio file to tokens and mel slices, kept as one finished file under DATA/.partial.

A finished file is named by the sha256 of the audio's content and appears by rename only, so after
a kill whatever is there is whole and need not be made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from wgpt import audio
from wgpt.audio.mel import MelFrontend
from wgpt.audio.recording import logger as audio_logger
from wgpt.config import MelConfig
from wgpt.errors import AudioError, ConfigError, DataError
from wgpt.files import sha256_of, write_atomically

# Longer files are cut into clips of this many seconds, each encoded as if it began in silence:
# the codec's memory grows with the clip (5 minutes took 2.2 GB with an 8-filter codec).
PIECE_SECONDS = 300


class CodecProtocol(Protocol):
    """What `wgpt.codec.load` returns, as far as preparing data needs it."""

    identity: dict[str, Any]
    n_codebooks: int
    sample_rate_hz: int
    hop_samples: int

    def encode(self, wave: Tensor) -> Tensor:
        """float32 (L,) -> int64 (K, T)."""

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (k, T), k <= K -> float32 (T * hop,)."""


@dataclass(frozen=True)
class Job:
    """A file to encode: where it lies, what its content hashes to, and when that was true."""

    path: str
    sha256: str
    changed_ns: int
    size_bytes: int
    partial: str


@dataclass(frozen=True)
class Outcome:
    """How a file ended: `reason` is empty if it is finished under .partial."""

    sha256: str
    reason: str = ""


def mel_configs(mel: MelConfig, sources: tuple[str, ...]) -> dict[str, tuple[MelConfig, int]]:
    """What each mel source is computed with: its settings and from how many decoded codebooks.

    0 codebooks stands for the true audio. ConfigError for a name that is none of ours.
    """
    found: dict[str, tuple[MelConfig, int]] = {}
    for name in sources:
        match = re.fullmatch(r"(wave)|decoded-([1-9]\d?)|leaky-([1-9]\d{1,4})", name)
        if match is None or name in found:
            raise ConfigError(
                "mel_sources: each must be wave, decoded-K (1 to 99 codebooks) or leaky-W "
                f"(a centred window of W samples), and named once, got {name!r}"
            )
        codebooks, window = match[2], match[3]
        config = mel
        if window:
            config = dataclasses.replace(mel, window_samples=int(window), centered=True, leaky=True)
        found[name] = (config, int(codebooks or 0))
    return found


class Encoder:
    """Encodes one file after another with one codec; every worker process holds one."""

    def __init__(
        self,
        codec: CodecProtocol,
        mel: MelConfig,
        mel_sources: tuple[str, ...],
        max_seconds: float,
    ) -> None:
        self.codec, self.mel, self.max_seconds = codec, mel, max_seconds
        for name in ("sample_rate_hz", "hop_samples"):
            if getattr(codec, name) != getattr(mel, name):
                raise ConfigError(
                    f"mel: {name} must equal the codec's {getattr(codec, name)}, "
                    f"got {getattr(mel, name)}"
                )
        self.frontends = {
            name: (MelFrontend(config), codebooks)
            for name, (config, codebooks) in mel_configs(mel, mel_sources).items()
        }
        for name, (_, codebooks) in self.frontends.items():
            if codebooks > codec.n_codebooks:
                raise ConfigError(
                    f"mel_sources: {name} must use at most the codec's {codec.n_codebooks} "
                    f"codebooks, got {codebooks}"
                )

    def encode_file(self, job: Job) -> Outcome:
        """Encode a file into job.partial. A bad file is an answer (`reason`), not an exception.

        Raises:
            OSError: the partial could not be written (disk full and the like).
        """
        path = Path(job.path)
        try:
            with _notes(job.path) as notes:
                wave = audio.read(path, self.mel.sample_rate_hz, max_seconds=self.max_seconds)
                # The name of the result is the hash of the content, so it must be that content.
                now = os.stat(path)
                if (now.st_mtime_ns, now.st_size) != (job.changed_ns, job.size_bytes):
                    raise AudioError(f"{path}: must not change while it is read")
                arrays, n_steps = self.encode_wave(torch.from_numpy(wave))
        except (ValueError, RuntimeError, MemoryError, ArithmeticError, OSError) as error:
            reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
            return Outcome(job.sha256, reason=" ".join(reason.split()))
        facts = {"seconds": wave.size / self.mel.sample_rate_hz, "steps": n_steps, "notes": notes}
        blob = safetensors.numpy.save(arrays, {"facts": json.dumps(facts)})
        write_atomically(Path(job.partial), blob)
        return Outcome(job.sha256)

    def encode_wave(self, wave: Tensor) -> tuple[dict[str, np.ndarray], list[int]]:
        """A wave float32 (L,) to stacked arrays and the steps of each of its clips.

        Returns:
            {"tokens": uint16 (T, K), "mel.<source>": float16 (T * r, M)} and the clips' lengths,
            which sum to T. Only whole steps count: a remainder of under one hop is dropped.
        """
        hop = self.mel.hop_samples
        piece_steps = PIECE_SECONDS * self.mel.sample_rate_hz // hop
        n_steps = wave.shape[0] // hop
        if n_steps == 0:
            raise AudioError(f"must last at least one step of {hop} samples, got {wave.shape[0]}")
        lengths, parts = [], []
        for start in range(0, n_steps, piece_steps):
            stop = min(start + piece_steps, n_steps)
            parts.append(self._encode_clip(wave[start * hop : stop * hop], stop - start))
            lengths.append(stop - start)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, lengths

    def _encode_clip(self, wave: Tensor, n_steps: int) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            codes = self.codec.encode(wave)
            expected = (self.codec.n_codebooks, n_steps)
            if tuple(codes.shape) != expected:
                raise DataError(f"the codec must give codes {expected}, got {tuple(codes.shape)}")
            if int(codes.min()) < 0 or int(codes.max()) > np.iinfo(np.uint16).max:
                raise DataError(
                    f"the codec's codes must fit 16 bits, got {codes.min()} to {codes.max()}"
                )
            arrays = {"tokens": codes.T.contiguous().numpy().astype(np.uint16)}
            for name, (frontend, codebooks) in self.frontends.items():
                heard = self.codec.decode(codes[:codebooks]) if codebooks else wave
                frames = frontend(heard.float())
                if not bool(torch.isfinite(frames).all()):
                    raise DataError(f"mel slices of {name} must be finite")
                arrays[f"mel.{name}"] = frames.numpy().astype(np.float16)
        return arrays


def read_partial(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A finished file's arrays and facts; DataError if it is not whole."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: must be a whole safetensors file, got: {error}") from error


def read_facts(path: Path) -> dict[str, Any] | None:
    """A finished file's facts (seconds, steps, notes), or None if it must be made again."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return dict(json.loads(file.metadata()["facts"]))
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def hash_file(path: Path) -> tuple[str, os.stat_result]:
    """sha256 of the content and the file's status before reading; OSError if unreadable."""
    if not path.is_file():
        raise OSError("must be a regular file that exists")
    status = os.stat(path)
    return sha256_of(path), status


@contextlib.contextmanager
def _notes(path: str) -> Iterator[list[str]]:
    """Collect what reading logs about a file, for the manifest, without the path."""
    notes: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == threading.get_ident():
                notes.append(record.getMessage().removeprefix(f"{path}: "))

    handler = Collect(level=logging.WARNING)
    audio_logger.addHandler(handler)
    try:
        yield notes
    finally:
        audio_logger.removeHandler(handler)
