"""A folder of audio to a folder of tokens and mel slices, restartable.

Files are hashed, decoded, resampled, encoded whole and written one by one to OUT/.partial; when
all are done the arrays and the manifest are built beside the old ones and moved into place, the
manifest last. A run killed at any point goes on where it stopped when started again, and the
result has the same bytes. See dataset.py for the format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from wgpt import audio
from wgpt.config import CODEBOOK_SIZE, MelConfig
from wgpt.data.assemble import assemble, bytes_needed
from wgpt.data.encode import (
    PIECE_SECONDS,
    CodecProtocol,
    Encoder,
    Job,
    Outcome,
    read_facts,
)
from wgpt.data.folder import (
    PARTIAL,
    check_ours,
    check_space,
    finished_before,
    locked,
    open_partial,
)
from wgpt.data.scan import Found, hash_all, list_sources, listed
from wgpt.data.workers import EncoderSpec, encode_here, encode_in_processes
from wgpt.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def prepare(
    audio_dir: str | Path,
    out: str | Path,
    *,
    codec: str | Path | CodecProtocol = "mini",
    mel: MelConfig | None = None,
    mel_sources: tuple[str, ...] = ("wave",),
    valid_fraction: float = 0.1,
    jobs: int = 1,
    max_seconds: float = audio.MAX_SECONDS,
    download: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode every audio file below `audio_dir` into the data folder `out`.

    Args:
        audio_dir: walked recursively; a plain folder or LibriSpeech's layout. The first folder of
            a file's path below it is the file's group.
        out: new, empty, or a folder an earlier run wrote.
        codec: a name or path for `codec.load`, or a codec object (picklable if jobs > 1).
        mel: mel settings; MelConfig() by default.
        mel_sources: see dataset.py: wave, decoded-K, leaky-W.
        valid_fraction: share of distinct files for validation, in [0, 1); at least one file of
            two unless 0. Chosen by content hash: a duplicate never lies in the other split.
        jobs: worker processes; the result does not depend on it.
        max_seconds: longer files are skipped.
        download: let the codec be downloaded.
        overwrite: replace a data folder that was made with other settings or from other files.
        progress: bars on stderr if it is a terminal.

    Returns:
        The manifest, as written to out/manifest.json.

    Raises:
        ConfigError: a setting is out of range or does not fit the codec.
        DataError: out is not ours to write, nothing could be used, or the disk is full.
        AudioError: audio_dir is no folder.
    """
    audio_dir, out, mel = Path(audio_dir), Path(out), mel or MelConfig()
    _check_settings(valid_fraction, jobs, max_seconds)
    files = _find_some(audio_dir)
    check_ours(out)
    spec = EncoderSpec(codec, mel, tuple(mel_sources), max_seconds, download)
    encoder = spec.build()
    settings = {
        "codec": _codec_facts(encoder.codec),
        "mel": dataclasses.asdict(mel),
        "mel_sources": list(mel_sources),
        "piece_seconds": PIECE_SECONDS,
        "max_seconds": float(max_seconds),
        "valid_fraction": float(valid_fraction),
    }
    found = hash_all(audio_dir, files, out / PARTIAL, progress)
    finished = finished_before(out, settings, found, overwrite)
    if finished is not None:
        return finished
    try:
        with locked(out):
            open_partial(out / PARTIAL, settings)
            facts, reasons = _encode(found, spec, encoder, jobs, progress)
            manifest = _build(audio_dir, out, settings, found, facts, reasons)
    except OSError as error:
        raise DataError(
            f"{out}: could not be written: {error}; free the cause and run again, "
            "finished files are kept"
        ) from error
    if manifest["totals"]["valid"]["clips"] == 0 and valid_fraction > 0:
        logger.warning("only one distinct file: the validation split is empty")
    return manifest


def _check_settings(valid_fraction: float, jobs: int, max_seconds: float) -> None:
    rules = [
        ("valid_fraction", "in [0, 1)", valid_fraction, 0 <= valid_fraction < 1),
        ("jobs", "at least 1", jobs, jobs >= 1),
        ("max_seconds", "positive", max_seconds, max_seconds > 0),
    ]
    for name, rule, got, holds in rules:
        if not holds:
            raise ConfigError(f"prepare: {name} must be {rule}, got {got}")


def _find_some(audio_dir: Path) -> list[Path]:
    files = audio.find(audio_dir)
    if not files:
        raise DataError(
            f"{audio_dir}: must hold audio files, found none with a known suffix "
            f"({', '.join(sorted(audio.SUFFIXES)[:6])}, ...)"
        )
    return files


def _build(
    audio_dir: Path,
    out: Path,
    settings: dict[str, Any],
    found: Found,
    facts: dict[str, dict[str, Any]],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """The last step: from finished files to the final folder, without .partial."""
    sources = list_sources(found, facts)
    if not sources:
        _raise_all_skipped(audio_dir, reasons, found)
    check_space(out, bytes_needed(sources, settings))
    duplicates, skipped = listed(found, facts, reasons)
    manifest = assemble(out, sources, settings, duplicates=duplicates, skipped=skipped)
    shutil.rmtree(out / PARTIAL)
    return manifest


def _codec_facts(codec: CodecProtocol) -> dict[str, Any]:
    """What the manifest keeps about the codec, made of plain JSON values."""
    facts = {
        "source": getattr(codec, "source", codec.identity["name"]),
        "identity": codec.identity,
        "n_codebooks": codec.n_codebooks,
        "codebook_size": getattr(codec, "codebook_size", CODEBOOK_SIZE),
        "sample_rate_hz": codec.sample_rate_hz,
        "hop_samples": codec.hop_samples,
    }
    return dict(json.loads(json.dumps(facts)))


def _encode(
    found: Found, spec: EncoderSpec, encoder: Encoder, jobs: int, progress: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Encode what is not finished. Returns facts and reasons for skipping, by sha256."""
    facts: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for digest, job in found.jobs.items():
        known = read_facts(Path(job.partial))
        if known is not None:
            facts[digest] = known
    todo = [job for digest, job in found.jobs.items() if digest not in facts]
    if facts:
        logger.info("going on: %d files finished before, %d to do", len(facts), len(todo))
    else:
        logger.info("encoding %d files, %d at a time", len(todo), min(jobs, max(len(todo), 1)))
    bar = tqdm(
        total=len(found.jobs), initial=len(facts), desc="encoding", unit="file",
        disable=None if progress else True,
    )  # fmt: skip

    def finished(job: Job, done: Outcome) -> None:
        bar.update()
        known = None if done.reason else read_facts(Path(job.partial))
        if known is None:
            reasons[job.sha256] = done.reason or "its finished file could not be read back"
            logger.warning("skipped %s: %s", found.paths[job.sha256], reasons[job.sha256])
        else:
            facts[job.sha256] = known

    with contextlib.closing(bar):
        if jobs == 1 or len(todo) <= 1:
            encode_here(encoder, todo, finished)
        else:
            encode_in_processes(spec, todo, min(jobs, len(todo)), finished)
    return facts, reasons


def _raise_all_skipped(audio_dir: Path, reasons: dict[str, str], found: Found) -> NoReturn:
    why = [f"{found.paths[digest]}: {reason}" for digest, reason in reasons.items()]
    why += [f"{entry['path']}: {entry['reason']}" for entry in found.unreadable]
    raise DataError(
        f"{audio_dir}: must hold at least one usable audio file, all {len(why)} were skipped:\n  "
        + "\n  ".join(why[:3])
    )
