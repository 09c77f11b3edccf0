"""Recordings to a folder of tokens and mel slices, restartable, and to be added to.

Files are hashed, measured, encoded and written one by one to OUT/.partial; when all are done the
arrays and the manifest are built beside the old ones and moved into place, the manifest last. A
run killed at any point continues where it stopped when started again, and the result has the same
bytes. A finished folder is opened again for what is new. See dataset.py for the format.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from wgpt.config import CODEBOOK_SIZE, MelConfig
from wgpt.data.account import account
from wgpt.data.assemble import assemble, bytes_needed
from wgpt.data.ceiling import codec_ceiling, listen
from wgpt.data.cluster import make_parts
from wgpt.data.command import prepare_command
from wgpt.data.encode import CodecProtocol, Encoder
from wgpt.data.folder import (
    PARTIAL,
    PARTS,
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
from wgpt.data.levels import MelLevels
from wgpt.data.merged import Merged, fetch_parts, read_parts
from wgpt.data.page import page
from wgpt.data.parts import check_shard, hash_inputs, make_part, part_number
from wgpt.data.places import Place, is_address, places
from wgpt.data.report import report
from wgpt.data.scan import Found, hash_all, list_sources
from wgpt.data.splits import SPLIT_BY, SplitRule, assign
from wgpt.data.treatment import PIECE_SECONDS, TARGET_LUFS, Treatment
from wgpt.data.workers import EncoderSpec, encode_all, load_codec
from wgpt.errors import ConfigError, DataError
from wgpt.files import write_atomically

logger = logging.getLogger(__name__)

MAX_JOBS = 1024


def prepare(
    recordings: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    valid: str | Path | Sequence[str | Path] = (),
    test: str | Path | Sequence[str | Path] = (),
    codec: str | Path | CodecProtocol = "mini",
    mel: MelConfig | None = None,
    mel_sources: tuple[str, ...] | None = None,
    mel_bits: int = 16,
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
    engine: str | None = None,
    parts: str | Path | None = None,
) -> dict[str, Any]:
    """Encode recordings into the data folder `out`.

    Args:
        recordings: folders (walked recursively), audio files, and list files (one path a line, or
            CSV, TSV, JSON lines with path and, if wanted, group and split), and what `containers`
            knows (tars, data sets, manifests of lhotse); each a path or an address that fsspec
            opens (s3://bucket/folder). May be empty where `valid` or `test` is given: such data
            can be evaluated, not trained on.
        out: new, empty, or a folder an earlier run wrote: then what is new is added. For a shard
            it may be an address.
        valid, test: the same, for given splits. LibriSpeech's dev-* and test-* folders are
            such splits wherever a train-* folder is among the recordings.
        codec: a name or path for `codec.load`, or a codec object (picklable if jobs > 1).
        mel: mel settings; MelConfig() by default.
        mel_sources: see dataset.py: wave, decoded-K, leaky-W. By default wave, decoded-1 (the
            study's control) and decoded-K for all codebooks up to 8 (what `starter` reads).
        mel_bits: of a mel bin: 16 is float16; 8 and 5 store the nearest of 256 and of 32 levels
            (levels.py).
        split_by: group, file or time; by default the first that fits, see splits.py. A group is a
            list's column, LibriSpeech's speaker, or the first folder of a file's path.
        valid_fraction, test_fraction: shares of the sound, each in [0, 1), together below 1.
        keep_silence: do not cut silence, see `audio.silence`.
        keep_loudness: do not bring the level to `treatment.TARGET_LUFS`.
        jobs: worker processes, one per core by default; the result does not depend on it.
        max_seconds: longer files are skipped; None for no limit.
        download: let the codec be downloaded, and recordings from the Hub (hf://).
        overwrite: replace a data folder made with other settings or from files that are gone.
        progress: bars on stderr if it is a terminal, else a log line every half minute.
        shard: (i, n): encode part i of n into `out`, for `merge`; give each the same inputs.
        engine: "ray" makes all parts on a Ray cluster and merges them: the same bytes.
        parts: folder or address of those parts, which all nodes see; out/.parts by default, which
            is deleted in the end.

    Returns:
        The manifest, as written to out/manifest.json; for a shard what out/part.json says.

    Raises:
        ConfigError: a setting is out of range or does not fit the codec; a package is missing.
        DataError: out is not ours to write, nothing could be used, a split is empty, a list is
            malformed, or memory or disk failed (run again then: finished files are kept).
        AudioError: an input is not there.
    """
    (place,), mel = places(out), mel or MelConfig()
    levels = MelLevels.of(mel, mel_bits)
    max_seconds = math.inf if max_seconds is None else max_seconds
    rule = SplitRule(split_by, valid_fraction, test_fraction)
    _check_settings(rule, jobs, max_seconds, mel)
    _check_engine(engine, parts, shard)
    _check_out(place, shard)
    given = places(recordings), places(valid), places(test)
    inputs = collect(*given, place, download)
    before = None if shard is not None else read_before(Path(place))
    treatment = Treatment(not keep_silence, None if keep_loudness else TARGET_LUFS, PIECE_SECONDS)
    loaded = load_codec(codec, download)
    sources = mel_sources if mel_sources is not None else default_mel_sources(loaded)
    if before is not None and not overwrite:  # adding never takes away
        sources = (*sources, *(name for name in before["mel_sources"] if name not in sources))
    spec = EncoderSpec(codec, mel, tuple(sources), treatment, max_seconds, download, levels)
    encoder = Encoder(loaded, mel, spec.mel_sources, treatment, max_seconds, levels)
    settings = _settings(spec, loaded, rule)
    try:
        if shard is not None:
            inputs_sha256 = hash_inputs(inputs)
            inputs.entries = [e for e in inputs.entries if part_number(e, shard[1]) == shard[0]]
            return make_part(
                place, shard, inputs, inputs_sha256, spec, settings,
                jobs=jobs, overwrite=overwrite, progress=progress,
            )  # fmt: skip
        out = Path(place)
        if engine is not None:
            _check_unprepared(out, overwrite)
            with locked(out):
                folder = places(parts)[0] if parts is not None else out / PARTS
                made = make_parts(folder, inputs, spec, settings, jobs=jobs, progress=progress)
                return _build_merged(out, read_parts(fetch_parts(made, out / PARTS)), encoder)
        found = hash_all(inputs.entries, inputs.unreadable, out / PARTIAL, progress)
        if before is not None and not overwrite:
            old = before.get("settings", {})
            if is_done(out, before, settings, found, prepare_command(*given, out, old, settings)):
                return before
        with locked(out):
            open_partial(out / PARTIAL, settings)
            kept = keep_splits(out / PARTIAL, before, overwrite)
            if before is not None:
                logger.info("%d files are kept", reopen(out, before, settings, found))
            facts, reasons = encode_all(found, spec, encoder, jobs, progress)
            return _build(out, inputs, encoder, settings, found, facts, reasons, rule, kept)
    except OSError as error:
        raise DataError(
            f"{place}: reading or writing failed: {error}; free the cause and run again, "
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
        parts: all n, in any order: folders, or addresses, which are copied below `out` for the
            time of merging; an address may be a pattern: `s3://bucket/part-*`.
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
    _check_unprepared(out, overwrite)
    try:
        merged = read_parts(fetch_parts(places(parts), out / PARTS))
        encoder = merged.encoder(codec)
        with locked(out):
            return _build_merged(out, merged, encoder)
    except OSError as error:
        raise DataError(
            f"{out}: reading or writing failed: {error}; free the cause and run again, the parts "
            "are as they were"
        ) from error


def _check_unprepared(out: Path, overwrite: bool) -> None:
    """Raises DataError where a merge would replace what is there."""
    if read_before(out) is not None and not overwrite:
        raise DataError(f"{out}: holds prepared data; use another --out, or --overwrite")
    if any((out / PARTIAL).glob("*.safetensors")):
        raise DataError(
            f"{out}: holds an interrupted preparation, whose finished files a merge would delete; "
            "use another --out"
        )


def _build_merged(out: Path, merged: Merged, encoder: Encoder) -> dict[str, Any]:
    """The last step of parts, in a folder that is locked."""
    open_partial(out / PARTIAL, merged.settings)  # which says that it is ours, if this ends
    return _build(
        out, merged.inputs, encoder, merged.settings, merged.found, merged.facts, merged.reasons,
        merged.rule, {},
    )  # fmt: skip


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


def _check_out(place: Place, shard: tuple[int, int] | None) -> None:
    """Raises ConfigError or DataError unless it may become prepared data, or a part."""
    if shard is not None:
        check_shard(shard, shard)
    elif is_address(place):
        raise ConfigError(
            f"prepare: out must be a folder of this machine, from which training maps its arrays, "
            f"got {place}; parts may be written there: --shard I/N, --parts"
        )
    else:
        check_ours(Path(place))


def _check_engine(
    engine: str | None, parts: str | Path | None, shard: tuple[int, int] | None
) -> None:
    if engine not in (None, "ray"):
        raise ConfigError(f"prepare: engine must be ray or none, got {engine!r}")
    if engine is not None and shard is not None:
        raise ConfigError("prepare: --engine makes all parts and --shard one; give one of them")
    if engine is None and parts is not None:
        raise ConfigError("prepare: --parts is for --engine ray; a part of --shard has its --out")


def _settings(spec: EncoderSpec, codec: CodecProtocol, rule: SplitRule) -> dict[str, Any]:
    """What the manifest keeps of how the data were made; that of every part is the same."""
    settings = {
        "codec": _codec_facts(codec),
        "mel": dataclasses.asdict(spec.mel),
        "mel_sources": sorted(spec.mel_sources, key=_source_order),
        "treatment": dataclasses.asdict(spec.treatment),
        "max_seconds": spec.max_seconds if math.isfinite(spec.max_seconds) else None,
        "split_by": rule.by,
        "valid_fraction": float(rule.valid_fraction),
        "test_fraction": float(rule.test_fraction),
    }
    if spec.levels is not None:
        settings["mel_levels"] = spec.levels.as_settings()
    return settings


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
    for folder in (PARTIAL, PARTS):
        shutil.rmtree(out / folder, ignore_errors=True)
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


def _raise_all_skipped(skipped: list[dict[str, Any]]) -> NoReturn:
    why = [f"{entry['path']}: {entry['reason']}" for entry in skipped]
    raise DataError(
        f"prepare: at least one usable audio file is needed, all {len(why)} were skipped: "
        + "; ".join(why[:3])
    )
