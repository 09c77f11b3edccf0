"""Which recordings are trained on, validated on and tested on: whole groups, files, or by time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wgpt.config import STEP_RATE_HZ
from wgpt.errors import DataError

SPLIT_BY = ("group", "file", "time")
ENOUGH_GROUPS = 10  # from here on a split by group leaves a tenth without luck
LONG_STEPS = round(30 * STEP_RATE_HZ)  # one or two recordings of this length are split by time
SHORTEST_PART_STEPS = round(1 * STEP_RATE_HZ)


@dataclass
class Part:
    """Steps [first, last) of a source, in one split, as clips of that split."""

    split: str
    first: int
    last: int
    clips: list[int] = field(default_factory=list)


@dataclass
class Source:
    """One distinct file: where its result lies and what it becomes.

    Attributes:
        path: its name in the manifest.
        given: the split it was given to, None if the rule decides.
        parts: one, or several where it is split by time.
    """

    path: str
    sha256: str
    group: str
    partial: Path
    facts: dict[str, Any]
    given: str | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def n_steps(self) -> int:
        return sum(self.facts["steps"])


@dataclass(frozen=True)
class SplitRule:
    """How to split what nobody assigned.

    Attributes:
        by: group, file or time; None for the first that fits (`choose_by`).
        valid_fraction, test_fraction: shares of the steps.
    """

    by: str | None = None
    valid_fraction: float = 0.1
    test_fraction: float = 0.0


def choose_by(sources: list[Source]) -> str:
    """By group where there are at least 10, else by file, but one or two long ones by time."""
    if len({source.group for source in sources}) >= ENOUGH_GROUPS:
        return "group"
    if len(sources) <= 2 and any(source.n_steps >= LONG_STEPS for source in sources):
        return "time"
    return "file"


def assign(
    sources: list[Source], rule: SplitRule, kept: dict[str, str], kept_by: str | None = None
) -> str:
    """Fill every source's `parts`. Deterministic; the order of the sources does not matter.

    Groups (or files) are taken in the order of their hashes until a split has its share; one that
    would overshoot is passed over. A split that was given (a folder, a column, LibriSpeech's own)
    is not filled further.

    Args:
        sources: of any order.
        rule: how.
        kept: splits of an earlier preparation by group or sha256: what was trained on then is
            never validated on now.
        kept_by: how it was split then; this time too, unless the rule says otherwise.

    Returns:
        How it was split: given, group, file or time.

    Raises:
        DataError: the rule leaves a wanted split empty.
    """
    given = {source.given for source in sources if source.given}
    free = [source for source in sources if not source.given]
    for source in sources:
        if source.given:
            source.parts = [Part(source.given, 0, source.n_steps)]
    shares = {
        "test": 0.0 if "test" in given else rule.test_fraction,
        "valid": 0.0 if "valid" in given else rule.valid_fraction,
    }
    if not free or not any(shares.values()):
        for source in free:
            source.parts = [Part("train", 0, source.n_steps)]
        return "given"
    by = rule.by or (kept_by if kept_by in SPLIT_BY else None) or choose_by(free)
    if by == "time":
        for source in free:
            source.parts = _parts_by_time(source.n_steps, shares)
    else:
        units: dict[str, list[Source]] = {}
        for source in free:
            units.setdefault(source.group if by == "group" else source.sha256, []).append(source)
        steps = {key: sum(s.n_steps for s in members) for key, members in units.items()}
        chosen = choose(steps, shares, {key: kept[key] for key in units if key in kept})
        for key, members in units.items():
            for source in members:
                source.parts = [Part(chosen.get(key, "train"), 0, source.n_steps)]
    if rule.by is not None:
        _require_filled(sources, shares, rule.by)
    return by


def choose(steps: dict[str, int], shares: dict[str, float], kept: dict[str, str]) -> dict[str, str]:
    """Units for test and valid, by key; what is not named is for training.

    At least one unit for each wanted split and one for training where there are units enough.
    """
    total = sum(steps.values())
    chosen = dict(kept)
    order = sorted(
        (key for key in steps if key not in kept),
        key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest(),
    )
    n_train = sum(1 for split in kept.values() if split == "train")
    for split, share in shares.items():
        if share <= 0:
            continue
        taken = sum(steps[key] for key, name in kept.items() if name == split)
        target, mine = share * total, [key for key in order if key not in chosen]
        for key in mine:
            if n_train == 0 and sum(k not in chosen for k in order) <= 1:
                break
            if taken + steps[key] / 2 <= target:
                chosen[key] = split
                taken += steps[key]
        left = [key for key in order if key not in chosen]
        if taken == 0 and len(left) + n_train >= 2 and left:
            chosen[min(left, key=lambda key: (steps[key], key))] = split
    return {key: split for key, split in chosen.items() if split != "train"}


def _parts_by_time(n_steps: int, shares: dict[str, float]) -> list[Part]:
    """The first steps train, the next validate, the last test: the order of time."""
    lengths = {split: round(share * n_steps) for split, share in shares.items()}
    lengths = {k: n if n >= SHORTEST_PART_STEPS else 0 for k, n in lengths.items()}
    n_train = n_steps - sum(lengths.values())
    parts, first = [], 0
    for split, n in (("train", n_train), ("valid", lengths["valid"]), ("test", lengths["test"])):
        if n:
            parts.append(Part(split, first, first + n))
            first += n
    return parts


def _require_filled(sources: list[Source], shares: dict[str, float], by: str) -> None:
    filled = {part.split for source in sources for part in source.parts}
    for split, share in shares.items():
        if share > 0 and split not in filled:
            units = {"group": "groups", "file": "distinct files", "time": "seconds"}[by]
            raise DataError(
                f"prepare: a split by {by} leaves {split} empty: too few {units} in "
                f"{len(sources)} recordings; split by another rule, give {split} by itself "
                f"(--{split} DIR), or set its fraction to 0"
            )
