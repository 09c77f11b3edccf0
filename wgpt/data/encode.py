"""One audio file to tokens and mel slices, kept as one finished file under DATA/.partial.

A finished file is named by the sha256 of the audio's content and appears by rename only, so after
a kill whatever is there is whole and need not be made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
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
from wgpt.config import MelConfig
from wgpt.data.levels import MelLevels
from wgpt.data.pieces import opened
from wgpt.data.places import Place, is_address
from wgpt.data.treatment import Plan, Treatment, measure
from wgpt.errors import AudioError, ConfigError, DataError, is_out_of_memory
from wgpt.files import is_bad_day, parse_json, sha256_of, write_atomically


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
    """A file to encode: where it lies, what its content hashes to, and when that was true.

    path: a path or an address, see `places`; changed_ns: of a path.
    """

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
        treatment: Treatment,
        max_seconds: float,
        levels: MelLevels | None = None,
    ) -> None:
        self.codec, self.mel, self.max_seconds = codec, mel, max_seconds
        self.treatment, self.levels = treatment, levels
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
        """Encode a file into job.partial, or add to it what it lacks.

        A bad file is an answer (`reason`), not an exception: a bad day is an exception.

        Raises:
            DataError: memory ran out or the disk failed; the file is to be tried again.
            OSError: the partial could not be written (disk full and the like).
        """
        try:
            arrays, facts = self._encode(job)
        except (ValueError, RuntimeError, MemoryError, ArithmeticError, OSError) as error:
            if is_bad_day(error) or is_out_of_memory(error):
                raise DataError(
                    f"{job.path}: could not be encoded for want of memory or by an I/O error "
                    f"({error or type(error).__name__}); free the cause, or use fewer --jobs, and "
                    "run again: finished files are kept"
                ) from error
            reason = str(error).removeprefix(f"{job.path}: ") or type(error).__name__
            return Outcome(job.sha256, reason=" ".join(reason.split()))
        write_partial(Path(job.partial), arrays, facts)
        return Outcome(job.sha256)

    def _encode(self, job: Job) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        have, facts = _read_if_whole(Path(job.partial))
        missing = [name for name in self.frontends if f"mel.{name}" not in have]
        if have and not missing:
            return have, facts
        if have and all(self.frontends[name][1] for name in missing):  # of decoded audio alone
            ends = np.cumsum(facts["steps"])
            clips = np.split(have["tokens"], ends[:-1])
            parts = [self._encode_clip(None, _codes(tokens), missing) for tokens in clips]
        else:
            with opened(job.path) as file:
                try:
                    parts, facts = self._encode_recording(job, file, have, missing)
                except AudioError as error:
                    sha256_of(file)  # libsndfile calls it damage where the disk failed: who is it?
                    raise AudioError(str(error).removeprefix(f"{file}: ")) from error
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return have | joined, facts

    def _encode_recording(
        self, job: Job, file: Path, have: dict[str, np.ndarray], missing: list[str]
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        """The arrays of each clip that a recording is cut into, and the facts about it all."""
        # The name of the result is the hash of the content, so it must be that content.
        if is_address(job.path) and sha256_of(file) != job.sha256:
            raise AudioError("must not change while it is read")
        recording = audio.Recording(file, self.mel.sample_rate_hz, max_seconds=self.max_seconds)
        plan = Plan(
            measure(recording), self.treatment, self.mel.hop_samples,
            self.treatment.piece_seconds * self.mel.sample_rate_hz,
        )  # fmt: skip
        parts: list[dict[str, np.ndarray]] = []
        first = 0
        for steps, wave in zip(plan.piece_steps, plan.pieces(recording), strict=True):
            known = _codes(have["tokens"][first : first + steps]) if have else None
            parts.append(self._encode_clip(torch.from_numpy(wave), known, missing))
            first += steps
        now = os.stat(file).st_mtime_ns, os.stat(file).st_size
        if not is_address(job.path) and now != (job.changed_ns, job.size_bytes):
            raise AudioError("must not change while it is read")
        return parts, plan.facts(recording) | {"steps": plan.piece_steps, "notes": recording.notes}

    def _encode_clip(
        self, wave: Tensor | None, codes: Tensor | None, sources: list[str]
    ) -> dict[str, np.ndarray]:
        """Tokens uint16 (T, K), unless the codes are known, and the mel slices asked for, float16
        or their codes."""
        arrays = {}
        with torch.inference_mode():
            if codes is None:
                assert wave is not None
                codes = self.codec.encode(wave)
                expected = (self.codec.n_codebooks, wave.shape[0] // self.mel.hop_samples)
                if tuple(codes.shape) != expected:
                    raise DataError(
                        f"the codec must give codes {expected}, got {tuple(codes.shape)}"
                    )
                if int(codes.min()) < 0 or int(codes.max()) > np.iinfo(np.uint16).max:
                    raise DataError(
                        f"the codec's codes must fit 16 bits, got {codes.min()} to {codes.max()}"
                    )
                arrays["tokens"] = codes.T.contiguous().numpy().astype(np.uint16)
            for name in sources:
                frontend, codebooks = self.frontends[name]
                sound = self.codec.decode(codes[:codebooks]) if codebooks else wave
                assert sound is not None
                frames = frontend(sound.float())
                if not bool(torch.isfinite(frames).all()):
                    raise DataError(f"mel slices of {name} must be finite")
                values = frames.numpy()
                arrays[f"mel.{name}"] = (
                    self.levels.encode(values) if self.levels else values.astype(np.float16)
                )
        return arrays


def _codes(tokens: np.ndarray) -> Tensor:
    """Stored tokens uint16 (T, K) as the codec's codes int64 (K, T)."""
    return torch.from_numpy(tokens.T.astype(np.int64))


def _read_if_whole(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        return read_partial(path)
    except DataError:
        return {}, {}


def write_partial(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write a finished file, whole or not at all.

    Not flushed: that would take longer than encoding a short clip, and what a power cut tears is
    found by its length and made again.
    """
    ordered = {name: arrays[name] for name in sorted(arrays)}
    about = json.dumps(facts)
    blob = safetensors.numpy.save(ordered, {"facts": about, "sha256": _digest(about, ordered)})
    write_atomically(path, blob, durable=False)


def read_partial(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A finished file's arrays and facts; DataError if it is not whole."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            about = file.metadata()
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if about["sha256"] != _digest(about["facts"], arrays):
            raise ValueError("another sha256")
        return arrays, parse_json(about["facts"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        if is_bad_day(error):
            raise
        raise DataError(
            f"{path}: must be a whole file of prepare, got: {error}; delete it and run again"
        ) from error


def _digest(about: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def read_facts(path: Path, sources: tuple[str, ...]) -> dict[str, Any] | None:
    """A finished file's facts (seconds, steps, notes, ...), None if it lacks one of `sources`."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            if not {f"mel.{name}" for name in sources} <= set(file.keys()):
                return None
            return parse_json(file.metadata()["facts"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def hash_file(place: Place) -> tuple[str, os.stat_result]:
    """sha256 of the content and the file's status before reading; OSError if unreadable."""
    with opened(place) as path:
        if not path.is_file():
            raise OSError("must be a regular file that exists")
        status = os.stat(path)
        return sha256_of(path), status
