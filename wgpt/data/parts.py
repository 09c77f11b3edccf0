"""Parts of a preparation, made by several machines; merged they are what one run makes, bit by bit.

    PART/part.json                settings, and every file of the part; sealed
    PART/.partial/SHA256.safetensors    finished files, as an interrupted preparation has them

`prepare(..., shard=(i, n))` makes part i of n: the files whose name hashes to it. Merging reads the
finished files where they are and writes the arrays once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wgpt.config import MelConfig
from wgpt.data.encode import Encoder, Job, read_facts
from wgpt.data.folder import PART, PARTIAL
from wgpt.data.inputs import SPLIT_ORDER, Entry, Inputs
from wgpt.data.scan import Found
from wgpt.data.splits import SplitRule
from wgpt.data.treatment import Treatment
from wgpt.data.workers import load_codec
from wgpt.errors import ConfigError, DataError
from wgpt.files import read_json, sha256_of, write_sealed

_FORMAT = "wgpt-part-1"
_LIMIT_BYTES = 1 << 30
MAX_SHARDS = 100_000


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`. Raises ConfigError."""
    first, slash, second = text.partition("/")
    is_pair = slash and first.isdecimal() and second.isdecimal() and len(text) < 16
    shard = (int(first), int(second)) if is_pair else (0, 0)
    check_shard(shard, text)
    return shard


def check_shard(shard: tuple[int, int], given: object) -> None:
    """Raises ConfigError unless it is (i, n) with 1 <= i <= n."""
    if not 1 <= shard[0] <= shard[1] <= MAX_SHARDS:
        raise ConfigError(
            f"--shard must be I/N, part I of N with 1 <= I <= N <= {MAX_SHARDS}, got {given!r}"
        )


def keep_shard(inputs: Inputs, shard: tuple[int, int]) -> str:
    """Leaves the entries of a shard: those whose name hashes to it, wherever the others are.

    Returns the sha256 of all inputs' names, groups and splits: that of every part must be the same.
    """
    check_shard(shard, shard)
    seen = [[(entry.name, entry.split, entry.group) for entry in inputs.entries],
            inputs.other, inputs.unreadable]  # fmt: skip
    inputs_sha256 = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    i, n = shard

    def number(entry: Entry) -> int:
        digest = hashlib.sha256(entry.name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % n + 1

    inputs.entries = [entry for entry in inputs.entries if number(entry) == i]
    return inputs_sha256


def check_part(out: Path, shard: tuple[int, int], settings: dict[str, Any]) -> None:
    """Raises DataError where `out` holds another part, or one with other settings."""
    if not (out / PART).exists():
        return
    record = read_json(out / PART, DataError, _LIMIT_BYTES)
    if record.get("shard") != list(shard) or record.get("settings") != settings:
        i, n = record.get("shard", ("?", "?"))
        raise DataError(
            f"{out}: holds part {i} of {n}, perhaps with other settings; name another --out for "
            f"part {shard[0]} of {shard[1]}, or --overwrite to replace it"
        )


def write_part(
    out: Path,
    shard: tuple[int, int],
    settings: dict[str, Any],
    inputs: Inputs,
    inputs_sha256: str,
    found: Found,
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Writes PART/part.json, when all files of the part are finished; returns what it says."""
    digests = {entry.name: digest for digest, entry in found.entries.items()}
    digests |= {entry["path"]: entry["sha256"] for entry in found.duplicates}
    entries = [
        {
            "name": entry.name,
            "path": str(entry.path.absolute()),
            "group": entry.group,
            "split": entry.split,
            "sha256": digests[entry.name],
            "bytes": found.jobs[digests[entry.name]].size_bytes,
        }
        for entry in inputs.entries
        if entry.name in digests
    ]
    part = {
        "format": _FORMAT,
        "shard": list(shard),
        "settings": settings,
        "inputs_sha256": inputs_sha256,
        "entries": entries,
        "reasons": reasons,
        "unreadable_files": found.unreadable[len(inputs.unreadable) :],
        "unreadable_folders": inputs.unreadable,
        "other": inputs.other,
        "n_hidden": inputs.n_hidden,
        "finished": {
            digest: sha256_of(job.partial)
            for digest, job in found.jobs.items()
            if digest not in reasons
        },
    }
    write_sealed(out / PART, part)
    return part


@dataclasses.dataclass
class Merged:
    """All parts together, as one run would have found and encoded them."""

    settings: dict[str, Any]
    inputs: Inputs
    found: Found
    facts: dict[str, dict[str, Any]]
    reasons: dict[str, str]

    @property
    def rule(self) -> SplitRule:
        """How to split."""
        settings = self.settings
        return SplitRule(
            settings["split_by"], settings["valid_fraction"], settings["test_fraction"]
        )

    def encoder(self, codec: Any) -> Encoder:
        """What encoded the files. codec: a name, a path or a codec; None for what the settings
        name.

        Raises DataError where that is another codec, CodecError where there is none.
        """
        settings, expected = self.settings, self.settings["codec"]["identity"]
        named = codec or settings["codec"]["source"]
        loaded = load_codec(named, False)
        if loaded.identity != expected:
            raise DataError(
                f"merge: the parts were encoded by the codec {expected}, "
                f"{getattr(named, 'identity', named)} is {loaded.identity}; name theirs by --codec"
            )
        limit = settings["max_seconds"]
        return Encoder(
            loaded,
            MelConfig(**settings["mel"]),
            tuple(settings["mel_sources"]),
            Treatment(**settings["treatment"]),
            math.inf if limit is None else limit,
        )


def read_parts(parts: Sequence[Path]) -> Merged:
    """Opens parts and compares them with each other and with their hashes.

    Raises DataError that names the part which is missing, doubled, damaged, or of another
    preparation.
    """
    records = [_read(part) for part in parts]
    if not records:
        raise DataError("merge: at least one part is needed; make them with wgpt prepare --shard")
    n = records[0]["shard"][1]
    by_number: dict[int, Path] = {}
    for part, record in zip(parts, records, strict=True):
        i, of = record["shard"]
        if of != n:
            raise DataError(f"{part}: is part {i} of {of}, {parts[0]} is one of {n}")
        if i in by_number:
            raise DataError(f"{part}: is part {i} of {n}, and so is {by_number[i]}; name one")
        settings, expected = (_shaping(r["settings"]) for r in (record, records[0]))
        changed = [name for name, value in settings.items() if expected.get(name) != value]
        if changed:
            raise DataError(
                f"{part}: was prepared with other settings than {parts[0]}: {', '.join(changed)}"
            )
        if record["inputs_sha256"] != records[0]["inputs_sha256"]:
            raise DataError(
                f"{part}: was made of other recordings than {parts[0]}: files came or went, or a "
                "folder could not be read on one machine; give all parts the same inputs and "
                "prepare the one that is wrong again, with --overwrite"
            )
        by_number[i] = part
    missing = [str(i) for i in range(1, n + 1) if i not in by_number]
    if missing:
        raise DataError(
            f"merge: part {', '.join(missing[:20])} of {n} is missing; make it with "
            f"wgpt prepare ... --shard {missing[0]}/{n}"
        )
    return _joined(parts, records)


def _shaping(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that must be equal; where the codec lies is none of them."""
    return {**settings, "codec": {**settings["codec"], "source": ""}}


def _joined(parts: Sequence[Path], records: list[dict[str, Any]]) -> Merged:
    """Files in the order in which one run meets them: the first of two copies is kept."""
    first = records[0]
    inputs = Inputs(other=first["other"], n_hidden=first["n_hidden"],
                    unreadable=first["unreadable_folders"])  # fmt: skip
    found = Found({}, {}, [], list(inputs.unreadable))
    listed = [(row, part, record) for part, record in zip(parts, records, strict=True)
              for row in record["entries"]]  # fmt: skip
    listed.sort(key=lambda item: (SPLIT_ORDER.get(item[0]["split"] or "", 2), item[0]["name"]))
    facts: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for row, part, record in listed:
        entry = Entry(Path(row["path"]), row["name"], row["group"], row["split"])
        inputs.entries.append(entry)
        digest = row["sha256"]
        if digest in found.jobs:
            found.duplicates.append(
                {"path": entry.name, "sha256": digest, "group": entry.group,
                 "duplicate_of": found.entries[digest].name}
            )  # fmt: skip
            continue
        partial = part / PARTIAL / f"{digest}.safetensors"
        found.entries[digest] = entry
        found.jobs[digest] = Job(row["path"], digest, 0, row["bytes"], str(partial))
        if digest in record["reasons"]:
            reasons[digest] = record["reasons"][digest]
            continue
        known = read_facts(partial, tuple(record["settings"]["mel_sources"]))
        if known is None or sha256_of(partial) != record["finished"][digest]:
            raise DataError(
                f"{part}: is damaged: its finished file of {entry.name} is missing or changed; "
                f"delete {partial} and {part / PART}, and prepare the part again"
            )
        facts[digest] = known
    for record in records:
        found.unreadable += record["unreadable_files"]
        inputs.entries += [Entry(Path(row["path"]), row["path"], ".")
                           for row in record["unreadable_files"]]  # fmt: skip
    return Merged(first["settings"], inputs, found, facts, reasons)


def _read(part: Path) -> dict[str, Any]:
    """PART/part.json."""
    path = part / PART
    try:
        record = read_json(path, DataError, _LIMIT_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{part}: is no finished part, it holds no {PART}; the command that began it "
            "(wgpt prepare ... --shard) resumes it"
        ) from None
    if record.get("format") != _FORMAT:
        raise DataError(f"{path}: expected the format {_FORMAT!r}, got {record.get('format')!r}")
    return record
