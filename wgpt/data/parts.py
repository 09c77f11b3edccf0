"""Parts of a preparation, made by several machines; `merged` joins them.

    PART/part.json                settings, and every file of the part; sealed
    PART/.partial/SHA256.safetensors    finished files, as an interrupted preparation has them

`prepare(..., shard=(i, n))` makes part i of n: the files whose name hashes to it. A part may lie at
an address (s3://...).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from wgpt.data.folder import PART, PARTIAL, check_ours, locked, open_partial, read_before
from wgpt.data.inputs import Entry, Inputs
from wgpt.data.mirror import working_copy
from wgpt.data.places import Place, absolute
from wgpt.data.scan import Found, hash_all
from wgpt.data.workers import EncoderSpec, encode_all
from wgpt.errors import ConfigError, DataError
from wgpt.files import read_json, sha256_of, write_sealed

FORMAT = "wgpt-part-1"
LIMIT_BYTES = 1 << 30
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


def part_number(entry: Entry, n: int) -> int:
    """In which of n parts, from 1 on, an entry is: by its name alone, wherever the others are."""
    digest = hashlib.sha256(entry.name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % n + 1


def hash_inputs(inputs: Inputs) -> str:
    """sha256 of all inputs' names, groups and splits: that of every part must be the same."""
    seen = [[(entry.name, entry.split, entry.group) for entry in inputs.entries],
            inputs.other, inputs.unreadable]  # fmt: skip
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def make_part(
    out: Place,
    shard: tuple[int, int],
    inputs: Inputs,
    inputs_sha256: str,
    spec: EncoderSpec,
    settings: dict[str, Any],
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    apart: bool = False,
) -> dict[str, Any]:
    """Encodes part i of n into `out`, or what an earlier run left of it.

    Args:
        out: a folder, or an address that is given every finished file at once.
        shard: (i, n).
        inputs: with the entries of this part alone.
        inputs_sha256: of all inputs, by `hash_inputs`.
        spec, settings: what to encode with, and how the manifest tells it.
        jobs, progress, apart: of `workers.encode_all`.
        overwrite: replace a part that is there and differs.

    Returns:
        What part.json says.

    Raises:
        DataError: `out` holds something else; memory failed.
        OSError: reading or writing failed.
    """
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(working_copy(out)) if isinstance(out, str) else None
        folder = mirror.folder if mirror else Path(out)
        if not (folder / PART).exists():
            check_ours(folder)
        if read_before(folder) is not None:
            raise DataError(f"{out}: holds prepared data; name another --out for part {shard[0]}")
        found = hash_all(inputs.entries, inputs.unreadable, folder / PARTIAL, progress)
        stack.enter_context(locked(folder))
        if overwrite:
            (folder / PART).unlink(missing_ok=True)
        else:
            check_part(folder, out, shard, settings)
        open_partial(folder / PARTIAL, settings)
        if mirror:
            mirror.begin()
        _, reasons = encode_all(
            found,
            spec,
            spec.build(),
            jobs,
            progress,
            keep=mirror.keep if mirror else None,
            apart=apart,
        )
        part = write_part(folder, shard, settings, inputs, inputs_sha256, found, reasons)
        if mirror:
            mirror.keep(folder / PART)
        return part


def check_part(folder: Path, out: Place, shard: tuple[int, int], settings: dict[str, Any]) -> None:
    """Raises DataError where a folder, known as `out`, holds another part or other settings."""
    if not (folder / PART).exists():
        return
    record = read_json(folder / PART, DataError, LIMIT_BYTES)
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
            "path": absolute(entry.path),
            "group": entry.group,
            "split": entry.split,
            "sha256": digests[entry.name],
            "bytes": found.jobs[digests[entry.name]].size_bytes,
        }
        for entry in inputs.entries
        if entry.name in digests
    ]
    part = {
        "format": FORMAT,
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
