"""The command line that stands for the settings of a prepared folder, for messages to name."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wgpt.config import MelConfig
from wgpt.data.places import Place
from wgpt.data.treatment import TARGET_LUFS, Treatment


def prepare_command(
    train: Sequence[Place],
    valid: Sequence[Place],
    test: Sequence[Place],
    out: Path,
    settings: dict[str, Any],
    asked: dict[str, Any],
) -> str | None:
    """`wgpt prepare` of these recordings with the settings of a folder.

    Args:
        train, valid, test: inputs of the command that was asked for.
        out: the folder.
        settings: of its manifest.
        asked: of the command that was asked for; its mel sources, which can be added, are kept.

    Returns:
        None where no flags say these settings: another version's treatment, weights that the
        codec's name no longer stands for.
    """
    if not all(name in settings for name in asked if name != "mel_levels"):
        return None
    before, now = settings["codec"], asked["codec"]
    if before["source"] == now["source"] and before != now:
        return None
    words = ["wgpt", "prepare", *map(str, train)]
    for flag, paths in (("--valid", valid), ("--test", test)):
        words += [flag, *map(str, paths)] if paths else []
    words += ["--out", str(out), "--codec", str(before["source"])]
    treatment = settings["treatment"]
    for flag, field, default in (
        ("--keep-silence", "trim_silence", True),
        ("--keep-loudness", "target_lufs", TARGET_LUFS),
    ):
        if treatment[field] not in (default, False, None):
            return None
        words += [flag] if treatment[field] != default else []
    if treatment["piece_seconds"] != Treatment.piece_seconds:
        return None
    for name in ("split_by", "valid_fraction", "test_fraction", "max_seconds"):
        if settings[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    for field_ in dataclasses.fields(MelConfig):
        value = settings["mel"][field_.name]
        if value != field_.default:
            flag = f"--mel-{field_.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    if levels := settings.get("mel_levels"):
        words += ["--mel-bits", str(levels["bits"])]
    sources = asked["mel_sources"]
    return shlex.join([*words, "--mel-sources", *sources])
