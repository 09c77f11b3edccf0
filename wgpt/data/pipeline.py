"""Recordings to a folder of tokens and mel slices, restartable, and to be added to.

Files are hashed, measured, encoded and written one by one to OUT/.partial; when all are done the
arrays and the manifest are built beside the old ones and moved into place, the manifest last. A
run killed at any point continues where it stopped when started again, and the result has the same
bytes. A finished folder is opened again for what is new. See dataset.py for the format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from wgpt.config import CODEBOOK_SIZE, MelConfig
from wgpt.data.account import account
from wgpt.data.assemble import assemble, bytes_needed
from wgpt.data.ceiling import codec_ceiling, listen
from wgpt.data.command import prepare_command
from wgpt.data.encode import CodecProtocol, Encoder, Job, Outcome, read_facts
from wgpt.data.folder import (
    PART,
    PARTIAL,
    check_ours,
    check_space,
    is_done,
    keep_splits,
    locked,
    open_partial,
    read_before,
    reopen,
)
from wgpt.data.inputs import Inputs, collect
from wgpt.data.page import page
from wgpt.data.parts import check_part, keep_shard, read_parts, write_part
from wgpt.data.progress import Progress
from wgpt.data.report import report
from wgpt.data.scan import Found, hash_all, list_sources
from wgpt.data.splits import SPLIT_BY, SplitRule, assign
from wgpt.data.treatment import PIECE_SECONDS, TARGET_LUFS, Treatment
from wgpt.data.workers import EncoderSpec, encode_here, encode_in_processes, load_codec
from wgpt.errors import ConfigError, DataError
from wgpt.files import write_atomically

logger = logging.getLogger(__name__)

MAX_JOBS = 1024
MANY_FILES, MANY_BYTES = 24, 8 << 20  # from here on worker processes pay for their start


def prepare(
    recordings: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    valid: str | Path | Sequence[str | Path] = (),
    test: str | Path | Sequence[str | Path] = (),
    codec: str | Path | CodecProtocol = "mini",
    mel: MelConfig | None = None,
    mel_sources: tuple[str, ...] | None = None,
    split_by: str | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.0,
    keep_silence: bool = False,
    keep_loudness: bool = False,
    jobs: int | None = None,
    max_seconds: float | None = None,
    download: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    shard: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Encode recordings into the data folder `out`.

    Args:
        recordings: folders (walked recursively), audio files, and list files (one path a line, or
            CSV, TSV, JSON lines with path and, if wanted, group and split). May be empty where
            `valid` or `test` is given: such data can be evaluated, not trained on.
        out: new, empty, or a folder an earlier run wrote: then what is new is added.
        valid, test: the same, for given splits. LibriSpeech's dev-* and test-* folders are
            such splits wherever a train-* folder is among the recordings.
        codec: a name or path for `codec.load`, or a codec object (picklable if jobs > 1).
        mel: mel settings; MelConfig() by default.
        mel_sources: see dataset.py: wave, decoded-K, leaky-W. By default wave, decoded-1 (the
            study's control) and decoded-K for all codebooks up to 8 (what `starter` reads).
        split_by: group, file or time; by default the first that fits, see splits.py. A group is a
            list's column, LibriSpeech's speaker, or the first folder of a file's path.
        valid_fraction, test_fraction: shares of the sound, each in [0, 1), together below 1.
        keep_silence: do not cut silence, see `audio.silence`.
        keep_loudness: do not bring the level to `treatment.TARGET_LUFS`.
        jobs: worker processes, one per core by default; the result does not depend on it.
        max_seconds: longer files are skipped; None for no limit.
        download: let the codec be downloaded.
        overwrite: replace a data folder made with other settings or from files that are gone.
        progress: bars on stderr if it is a terminal, else a log line every half minute.
        shard: (i, n): encode part i of n into `out`, for `merge`; give each the same inputs.

    Returns:
        The manifest, as written to out/manifest.json; for a shard what out/part.json says.

    Raises:
        ConfigError: a setting is out of range or does not fit the codec.
        DataError: out is not ours to write, nothing could be used, a split is empty, a list is
            malformed, or memory or disk failed (run again then: finished files are kept).
        AudioError: an input is not there.
    """
    out, mel = Path(out), mel or MelConfig()
    max_seconds = math.inf if max_seconds is None else max_seconds
    rule = SplitRule(split_by, valid_fraction, test_fraction)
    _check_settings(rule, jobs, max_seconds, mel)
    if shard is None or not (out / PART).exists():
        check_ours(out)
    inputs = collect(_paths(recordings), _paths(valid), _paths(test), out)
    if shard is not None:
        inputs_sha256 = keep_shard(inputs, shard)
    before = read_before(out)
    if shard is not None and before is not None:
        raise DataError(f"{out}: holds prepared data; name another --out for part {shard[0]}")
    target_lufs = None if keep_loudness else TARGET_LUFS
    treatment = Treatment(not keep_silence, target_lufs, PIECE_SECONDS)
    loaded = load_codec(codec, download)
    sources = mel_sources if mel_sources is not None else default_mel_sources(loaded)
    if before is not None and not overwrite:  # adding never takes away
        sources = (*sources, *(name for name in before["mel_sources"] if name not in sources))
    spec = EncoderSpec(codec, mel, tuple(sources), treatment, max_seconds, download)
    encoder = Encoder(loaded, mel, spec.mel_sources, treatment, max_seconds)
    settings = {
        "codec": _codec_facts(loaded),
        "mel": dataclasses.asdict(mel),
        "mel_sources": sorted(spec.mel_sources, key=_source_order),
        "treatment": dataclasses.asdict(treatment),
        "max_seconds": max_seconds if math.isfinite(max_seconds) else None,
        "split_by": split_by,
        "valid_fraction": float(valid_fraction),
        "test_fraction": float(test_fraction),
    }
    try:
        found = hash_all(inputs.entries, inputs.unreadable, out / PARTIAL, progress)
        if before is not None and not overwrite:
            old = before.get("settings", {})
            paths = _paths(recordings), _paths(valid), _paths(test)
            command = prepare_command(*paths, out, old, settings)
            if is_done(out, before, settings, found, command):
                return before
        with locked(out):
            if shard is not None and overwrite:
                (out / PART).unlink(missing_ok=True)
            elif shard is not None:
                check_part(out, shard, settings)
            open_partial(out / PARTIAL, settings)
            kept = keep_splits(out / PARTIAL, before, overwrite)
            if before is not None:
                logger.info("%d files are kept", reopen(out, before, settings, found))
            facts, reasons = _encode(found, spec, encoder, jobs, progress)
            if shard is not None:
                return write_part(out, shard, settings, inputs, inputs_sha256, found, reasons)
            return _build(out, inputs, encoder, settings, found, facts, reasons, rule, kept)
    except OSError as error:
        raise DataError(
            f"{out}: reading or writing failed: {error}; free the cause and run again, "
            "finished files are kept"
        ) from error


def merge(
    parts: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    codec: str | Path | CodecProtocol | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Join the parts that `prepare(..., shard=(i, n))` made into the data folder `out`.

    The result has the bytes that one run over all recordings gives. The parts are left as they
    are; the recordings must be where the parts found them, since the report listens to some.

    Args:
        parts: all n, in any order.
        out: new, empty, the folder that holds the parts, or with overwrite one with old data.
        codec: that of the parts, a name, a path or a codec; by default what their settings name.

    Returns:
        The manifest, as written to out/manifest.json.

    Raises:
        DataError: a part is missing, doubled, damaged or of another preparation; out is not ours to
            write; the disk failed.
        AudioError: a recording of the report is gone.
    """
    out = Path(out)
    check_ours(out)
    if read_before(out) is not None and not overwrite:
        raise DataError(f"{out}: holds prepared data; use another --out, or --overwrite")
    if any((out / PARTIAL).glob("*.safetensors")):
        raise DataError(
            f"{out}: holds an interrupted preparation, whose finished files a merge would delete; "
            "use another --out"
        )
    try:
        merged = read_parts(_paths(parts))
        encoder = merged.encoder(codec)
        with locked(out):
            open_partial(out / PARTIAL, merged.settings)  # which says that it is ours, if this ends
            return _build(
                out, merged.inputs, encoder, merged.settings, merged.found, merged.facts,
                merged.reasons, merged.rule, {},
            )  # fmt: skip
    except OSError as error:
        raise DataError(
            f"{out}: reading or writing failed: {error}; free the cause and run again, the parts "
            "are as they were"
        ) from error


def _paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(given)] if isinstance(given, (str, Path)) else [Path(path) for path in given]


def default_mel_sources(codec: CodecProtocol) -> tuple[str, ...]:
    """wave, the study's control decoded-1, and what `starter` reads: up to 8 codebooks."""
    names = ["wave", "decoded-1", f"decoded-{min(codec.n_codebooks, 8)}"]
    return tuple(dict.fromkeys(names))


def _source_order(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("-")
    return {"wave": "0", "decoded": "1"}.get(kind, kind), int(number or 0)


def _check_settings(rule: SplitRule, jobs: int | None, max_seconds: float, mel: MelConfig) -> None:
    valid, test = rule.valid_fraction, rule.test_fraction
    rules = [
        ("valid_fraction", "in [0, 1)", valid, 0 <= valid < 1),
        ("test_fraction", "in [0, 1)", test, 0 <= test < 1),
        ("valid_fraction + test_fraction", "below 1", valid + test, valid + test < 1),
        ("split_by", f"one of {', '.join(SPLIT_BY)}", rule.by, rule.by in (None, *SPLIT_BY)),
        ("jobs", f"in [1, {MAX_JOBS}]", jobs, jobs is None or 1 <= jobs <= MAX_JOBS),
        ("max_seconds", "positive", max_seconds, max_seconds > 0),
        ("mel window_samples", "at most 65536", mel.window_samples, mel.window_samples <= 1 << 16),
        ("mel n_mels", "at most 1024", mel.n_mels, mel.n_mels <= 1024),
        ("mel floor", "finite", mel.floor, math.isfinite(mel.floor)),
    ]
    for name, text, got, holds in rules:
        if not holds:
            raise ConfigError(f"prepare: {name} must be {text}, got {got}")


def _build(
    out: Path,
    inputs: Inputs,
    encoder: Encoder,
    settings: dict[str, Any],
    found: Found,
    facts: dict[str, dict[str, Any]],
    reasons: dict[str, str],
    rule: SplitRule,
    kept: dict[str, Any],
) -> dict[str, Any]:
    """The last step: from finished files to the final folder, without .partial."""
    sources, duplicates, skipped = list_sources(found, facts, reasons)
    if not sources:
        _raise_all_skipped(skipped)
    by = assign(sources, rule, kept.get("splits", {}), kept.get("by"))
    check_space(out, bytes_needed(sources, settings))

    logger.info("listening to what the codec makes of some clips")
    heard = listen(encoder, sources, found.jobs)
    rate_hz = encoder.mel.sample_rate_hz

    def finish(manifest: dict[str, Any], building: Path) -> None:
        manifest["split_by"] = by
        manifest["account"] = account(inputs, manifest)
        manifest["report"] = report(manifest, codec_ceiling(heard, rate_hz))
        write_atomically(building / "report.html", page(manifest, heard, rate_hz))

    manifest = assemble(
        out, sources, settings, duplicates=duplicates, skipped=skipped, finish=finish
    )
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    if rule.valid_fraction > 0 and not manifest["totals"]["valid"]["clips"]:
        logger.warning("%s: too little sound for a validation split: it is empty", out)
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
    found: Found, spec: EncoderSpec, encoder: Encoder, jobs: int | None, progress: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Encode what is not finished. Returns facts and reasons for skipping, by sha256."""
    facts: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for digest, job in found.jobs.items():
        known = read_facts(Path(job.partial), spec.mel_sources)
        if known is not None:
            facts[digest] = known
    todo = [job for digest, job in found.jobs.items() if digest not in facts]
    n_jobs = choose_jobs(todo) if jobs is None else min(jobs, max(len(todo), 1))
    if facts:
        logger.info("continuing: %d files finished before, %d to do", len(facts), len(todo))
    else:
        logger.info("encoding %d files, %d at a time", len(todo), n_jobs)
    meter = Progress("encoding", sum(job.size_bytes for job in todo), len(todo), progress)

    def finished(job: Job, done: Outcome) -> None:
        meter.advance(job.size_bytes)
        known = None if done.reason else read_facts(Path(job.partial), spec.mel_sources)
        if known is None:
            reasons[job.sha256] = done.reason or "its finished file could not be read back"
            logger.warning("skipped %s: %s", found.entries[job.sha256].name, reasons[job.sha256])
        else:
            facts[job.sha256] = known

    with contextlib.closing(meter):
        if n_jobs == 1:
            encode_here(encoder, todo, finished)
        else:
            encode_in_processes(spec, todo, n_jobs, finished)
    return facts, reasons


def choose_jobs(todo: list[Job]) -> int:
    """A process per core where the work is worth their start of some seconds each."""
    n_bytes = sum(job.size_bytes for job in todo)
    if len(todo) < MANY_FILES and n_bytes < MANY_BYTES:
        return 1
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(min(n_cores or 1, len(todo)), 1)


def _raise_all_skipped(skipped: list[dict[str, Any]]) -> NoReturn:
    why = [f"{entry['path']}: {entry['reason']}" for entry in skipped]
    raise DataError(
        f"prepare: at least one usable audio file is needed, all {len(why)} were skipped: "
        + "; ".join(why[:3])
    )
