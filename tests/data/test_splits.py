"""Splits: whole groups, files, time; given ones; copies on one side; data without training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec, make_audio

from wgpt.data import Dataset, prepare
from wgpt.data.splits import Part, Source, SplitRule, assign, choose, choose_by
from wgpt.errors import DataError


def sources_of(*groups: str, steps: int = 100) -> list[Source]:
    return [
        Source(f"{g}/{i}", f"{i:064x}", g, Path("."), {"steps": [steps]})
        for i, g in enumerate(groups)
    ]


def splits(sources: list[Source]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for source in sources:
        for part in source.parts:
            found.setdefault(source.group, set()).add(part.split)
    return found


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(2, 0.1, 1), (10, 0.1, 1), (30, 0.1, 3), (2, 0.9, 1), (1, 0.5, 0), (9, 0.0, 0), (3, 0.99, 2)],
)
def test_the_share_is_met_and_training_is_never_empty(n: int, fraction: float, expected: int):
    steps = {f"{i * 7919 % 97:02x}": 100 for i in range(n)}
    chosen = choose(steps, {"valid": fraction}, {})
    assert len(chosen) == expected
    assert chosen == choose(dict(reversed(steps.items())), {"valid": fraction}, {})


def test_a_unit_that_would_overshoot_is_passed_over():
    steps = {"big": 10_000} | {f"small{i}": 100 for i in range(20)}
    for share in (0.05, 0.1):
        chosen = choose(steps, {"valid": share}, {})
        assert "big" not in chosen
        assert sum(steps[key] for key in chosen) == pytest.approx(share * 12_000, abs=100)


@pytest.mark.parametrize("seed", range(3))
def test_no_group_lies_on_two_sides(seed: int):
    rng = np.random.default_rng(seed)
    sources = sources_of(*(f"g{rng.integers(15)}" for _ in range(200)))
    assert assign(sources, SplitRule(None, 0.1, 0.1), {}) == "group"
    found = splits(sources)
    assert all(len(sides) == 1 for sides in found.values())
    assert set.union(*found.values()) == {"train", "valid", "test"}
    again = sources_of(*(source.group for source in reversed(sources)))
    assign(again, SplitRule(None, 0.1, 0.1), {})
    assert splits(again) == found  # the order of the files does not matter


def test_the_default_rule():
    assert choose_by(sources_of(*(f"g{i}" for i in range(10)))) == "group"
    assert choose_by(sources_of(*(f"g{i}" for i in range(9)))) == "file"
    assert choose_by(sources_of("a", "a", "b")) == "file"
    assert choose_by(sources_of("a", "a", steps=3000)) == "time"
    assert choose_by(sources_of("a", steps=3000)) == "time"
    assert choose_by(sources_of("a", "a")) == "file"


def test_time_splits_by_hand():
    (source,) = sources_of("a", steps=10_000)
    assert assign([source], SplitRule("time", 0.1, 0.05), {}) == "time"
    assert source.parts == [Part("train", 0, 8500), Part("valid", 8500, 9500),
                            Part("test", 9500, 10_000)]  # fmt: skip


@pytest.mark.parametrize(
    ("by", "sources"),
    [("group", sources_of("a", "a", "a")), ("file", sources_of("a")), ("time", sources_of("a"))],
)
def test_a_split_that_leaves_nothing_is_refused(by: str, sources: list[Source]):
    with pytest.raises(DataError, match=f"split by {by} leaves valid empty"):
        assign(sources, SplitRule(by, 0.1), {})


def test_what_was_trained_on_is_never_validated_on_after_an_addition():
    sources = sources_of(*(f"g{i}" for i in range(12)))
    assign(sources, SplitRule(), {})
    before = {s.group: s.parts[0].split for s in sources}
    more = sources_of(*(f"g{i}" for i in range(60)))
    assign(more, SplitRule(), before, "group")
    after = {s.group: s.parts[0].split for s in more}
    assert {group: after[group] for group in before} == before
    assert sum(split == "valid" for split in after.values()) == 6


def test_given_splits_stand_and_copies_stay_held_out(tmp_path: Path):
    train = make_audio(tmp_path / "mine", n_files=6)
    held = tmp_path / "held"
    held.mkdir()
    shutil.copy(train / "music" / "00.wav", held / "copy.wav")
    soundfile.write(held / "new.wav", np.random.default_rng(9).standard_normal(9600) / 9, 24_000)
    manifest = prepare(train, tmp_path / "data", valid=held, codec=FakeCodec())
    entries = {entry["path"]: entry for entry in manifest["sources"]}
    assert entries["mine/music/00.wav"]["duplicate_of"] == "held/copy.wav"
    assert {p for p, e in entries.items() if e.get("split") == "valid"} == {
        "held/copy.wav", "held/new.wav",
    }  # fmt: skip
    assert manifest["totals"]["train"]["files"] == 5 and manifest["split_by"] == "given"


def test_groups_of_a_folder_are_kept_whole_on_disk(tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "audio" / f"voice{i % 12}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{i}.wav", rng.standard_normal(4800 + 320 * i) / 9, 24_000)
    manifest = prepare(tmp_path / "audio", tmp_path / "data", codec=FakeCodec(), test_fraction=0.2)
    assert manifest["split_by"] == "group"
    data = Dataset(tmp_path / "data")
    data.verify()
    sides = [set(data.split(name).groups) for name in ("train", "valid", "test")]
    assert all(sides) and not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_one_recording_is_split_by_time_and_holds_every_step_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("wgpt.data.pipeline.PIECE_SECONDS", 7)
    wave = np.random.default_rng(0).standard_normal(24_000 * 40) * 0.1
    soundfile.write(tmp_path / "talk.flac", wave, 24_000)
    manifest = prepare(tmp_path / "talk.flac", tmp_path / "data", codec=FakeCodec())
    data = Dataset(tmp_path / "data")
    n_steps = {name: data.split(name).n_steps for name in ("train", "valid", "test")}
    assert n_steps == {"train": 2700, "valid": 300, "test": 0}
    first, second = manifest["sources"]
    assert (first["split"], second["split"]) == ("train", "valid")
    assert second["first_step"] == 2700 and first["path"] == second["path"] == "talk.flac"
    assert manifest["account"]["used"] == 1
    codes = np.concatenate([data.split(name).tokens for name in ("train", "valid")])
    whole = prepare(tmp_path / "talk.flac", tmp_path / "whole", codec=FakeCodec(),
                    valid_fraction=0)  # fmt: skip
    assert whole["totals"]["train"]["steps"] == 3000
    np.testing.assert_array_equal(codes, Dataset(tmp_path / "whole").split("train").tokens)


def test_data_without_training_can_be_opened(tmp_path: Path):
    audio_dir = make_audio(tmp_path / "audio", n_files=3)
    prepare([], tmp_path / "data", test=audio_dir, codec=FakeCodec())
    data = Dataset(tmp_path / "data")
    data.verify()
    assert data.split("test").n_clips == 3 and data.split("train").n_steps == 0
    with pytest.raises(DataError, match="no training split, so no normalisation"):
        data.normalisation("wave")


def test_two_identical_recordings_are_one(tmp_path: Path):
    wave = np.random.default_rng(0).standard_normal(24_000) * 0.1
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, wave, 24_000)
    manifest = prepare(tmp_path, tmp_path / "data", codec=FakeCodec())
    totals: dict[str, Any] = manifest["totals"]
    assert totals["train"]["files"] == 1 and totals["valid"]["files"] == 0
    assert manifest["account"]["duplicates"] == 1
