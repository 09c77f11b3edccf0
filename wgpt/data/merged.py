"""Parts of a preparation joined: they become what one run makes, bit by bit.

Merging compares the parts with each other and with their hashes, reads the finished files where
they are, and writes the arrays once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wgpt.config import MelConfig
from wgpt.data.encode import Encoder, Job, read_facts
from wgpt.data.folder import PART, PARTIAL
from wgpt.data.inputs import SPLIT_ORDER, Entry, Inputs
from wgpt.data.levels import MelLevels
from wgpt.data.mirror import Mirror
from wgpt.data.parts import FORMAT, LIMIT_BYTES
from wgpt.data.places import Place, expand, places
from wgpt.data.scan import Found
from wgpt.data.splits import SplitRule
from wgpt.data.treatment import Treatment
from wgpt.data.workers import load_codec
from wgpt.errors import DataError
from wgpt.files import read_json, sha256_of


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
            MelLevels.from_settings(settings),
        )


@dataclasses.dataclass(frozen=True)
class PartFolder:
    """A part as it lies on this machine; `str` of it is what the person called it."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return self.name


def fetch_parts(parts: Sequence[Place], copies: Path) -> list[PartFolder]:
    """Parts as folders: those at an address are copied below `copies`.

    Raises ConfigError where no package serves an address, DataError where no part is there,
    OSError where the network failed.
    """
    found = []
    for i, part in enumerate(expand(parts)):
        folder = Path(part)
        if isinstance(part, str):
            folder = copies / str(i)
            folder.mkdir(parents=True, exist_ok=True)
            Mirror(part, folder).fetch()
        found.append(PartFolder(folder, str(part)))
    return found


def read_parts(parts: Sequence[PartFolder]) -> Merged:
    """Opens parts and compares them with each other and with their hashes.

    Raises DataError that names the part which is missing, doubled, damaged, or of another
    preparation.
    """
    records = [_read(part) for part in parts]
    if not records:
        raise DataError("merge: at least one part is needed; make them with wgpt prepare --shard")
    n = records[0]["shard"][1]
    by_number: dict[int, PartFolder] = {}
    for part, record in zip(parts, records, strict=True):
        i, of = record["shard"]
        if of != n:
            raise DataError(f"{part}: is part {i} of {of}, {parts[0]} is one of {n}")
        if i in by_number:
            raise DataError(f"{part}: is part {i} of {n}, and so is {by_number[i]}; name one")
        settings, expected = (_shaping(r["settings"]) for r in (record, records[0]))
        changed = sorted(k for k in settings | expected if settings.get(k) != expected.get(k))
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


def _joined(parts: Sequence[PartFolder], records: list[dict[str, Any]]) -> Merged:
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
        entry = Entry(places(row["path"])[0], row["name"], row["group"], row["split"])
        inputs.entries.append(entry)
        digest = row["sha256"]
        if not found.add(digest, entry):
            continue
        partial = part.folder / PARTIAL / f"{digest}.safetensors"
        found.jobs[digest] = Job(row["path"], digest, 0, row["bytes"], str(partial))
        if digest in record["reasons"]:
            reasons[digest] = record["reasons"][digest]
            continue
        known = read_facts(partial, tuple(record["settings"]["mel_sources"]))
        if known is None or sha256_of(partial) != record["finished"][digest]:
            raise DataError(
                f"{part}: is damaged: its finished file of {entry.name} is missing or changed; "
                f"delete {part}/{PARTIAL}/{partial.name} and {part}/{PART}, and prepare the part "
                "again"
            )
        facts[digest] = known
    for record in records:
        found.unreadable += record["unreadable_files"]
        inputs.entries += [Entry(Path(row["path"]), row["path"], ".")
                           for row in record["unreadable_files"]]  # fmt: skip
    return Merged(first["settings"], inputs, found, facts, reasons)


def _read(part: PartFolder) -> dict[str, Any]:
    """PART/part.json."""
    path = part.folder / PART
    try:
        record = read_json(path, DataError, LIMIT_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{part}: is no finished part, it holds no {PART}; the command that began it "
            "(wgpt prepare ... --shard) resumes it"
        ) from None
    if record.get("format") != FORMAT:
        raise DataError(f"{path}: expected the format {FORMAT!r}, got {record.get('format')!r}")
    return record
