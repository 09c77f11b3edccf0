"""The account of the inputs: found = used + duplicates + skipped + not sound."""

from __future__ import annotations

from collections import Counter
from typing import Any

from wgpt.data.inputs import Inputs


def account(inputs: Inputs, manifest: dict[str, Any]) -> dict[str, Any]:
    """Count every file that was found, and every folder that could not be looked into.

    Returns:
        {"found", "used", "duplicates", "skipped", "not_sound": counts, found being their sum;
        "not_sound_suffixes": {suffix: count}, "hidden": entries that were not looked at}.
    """
    sources, skipped = manifest["sources"], manifest["skipped"]
    return {
        "found": len(inputs.entries) + len(inputs.other) + len(inputs.unreadable),
        "used": len({entry["sha256"] for entry in sources if "clips" in entry}),
        "duplicates": sum(1 for entry in sources if "duplicate_of" in entry),
        "skipped": len(skipped),
        "not_sound": len(inputs.other),
        "not_sound_suffixes": inputs.other_suffixes(),
        "hidden": inputs.n_hidden,
    }


def account_lines(manifest: dict[str, Any], n_reasons: int = 10) -> list[str]:
    """The account in words; files skipped for one reason share a line."""
    counts = manifest["account"]
    parts = [f"{counts['used']} used"]
    for name, word in (("duplicates", "duplicates"), ("skipped", "skipped"),
                       ("not_sound", "not sound")):  # fmt: skip
        if counts[name]:
            parts.append(f"{counts[name]} {word}")
    lines = [f"found {counts['found']} files: {' + '.join(parts)}"]
    if counts["not_sound"]:
        suffixes = sorted(counts["not_sound_suffixes"].items(), key=lambda item: -item[1])
        lines.append("  not sound: " + ", ".join(f"{n} {suffix}" for suffix, n in suffixes[:8]))
    for reason, paths in group_reasons(manifest["skipped"])[:n_reasons]:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"  skipped {paths[0]}{more}: {reason}")
    return lines


def group_reasons(skipped: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Reasons for skipping with their files, the commonest first."""
    found: dict[str, list[str]] = {}
    for entry in skipped:
        found.setdefault(entry["reason"], []).append(entry["path"])
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def note_counts(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """How many files carry a note of one kind, the commonest first."""
    kinds = {
        "truncated": "truncated: read as far as they go",
        "holds": "joined end to end: all parts read",
        "its channels cancel": "channels that cancel: one taken alone",
        "cut into": "cut into clips",
    }
    counts: Counter[str] = Counter()
    for entry in manifest["sources"]:
        for note in entry.get("notes", ()):
            kind = next((text for start, text in kinds.items() if note.startswith(start)), note)
            counts[kind] += 1
    return counts.most_common()
