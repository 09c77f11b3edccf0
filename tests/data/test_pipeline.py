"""prepare: what it writes, what it skips, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake_codec import FakeCodec, make_audio

from wgpt.audio.mel import MelFrontend
from wgpt.cli import main
from wgpt.config import MelConfig
from wgpt.data import dataset as dataset_module
from wgpt.data import pipeline, prepare
from wgpt.errors import ConfigError, DataError

AS_IS: dict[str, Any] = {"keep_silence": True, "keep_loudness": True}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Audio, the data folder made of it without interruption, and its manifest."""
    root = tmp_path_factory.mktemp("prepared")
    make_audio(root / "audio")
    sources = ("wave", "decoded-1", "leaky-1024")
    manifest = prepare(
        root / "audio", root / "data", codec=FakeCodec(), mel_sources=sources, **AS_IS
    )
    return root / "audio", root / "data", manifest


def test_prepared_arrays_hold_what_the_codec_and_the_front_end_give(prepared) -> None:
    audio_dir, data, manifest = prepared
    dataset = dataset_module.Dataset(data)
    dataset.verify()
    assert dataset.codec_identity == FakeCodec().identity
    assert dataset.mel_config == MelConfig()
    from wgpt import audio

    leaky = MelFrontend(MelConfig(window_samples=1024, centered=True, leaky=True))
    n_seen = 0
    for entry in manifest["sources"]:
        wave = torch.from_numpy(audio.read(audio_dir / entry["path"]))
        wave = wave[: len(wave) // 320 * 320]
        split, (clip,) = dataset.split(entry["split"]), entry["clips"]
        codes = FakeCodec().encode(wave)
        tokens, frames = split.clip(clip, "wave")
        assert tokens.dtype == torch.int64 and torch.equal(tokens, codes)
        assert torch.equal(frames, MelFrontend(MelConfig())(wave).half().float())
        decoded = MelFrontend(MelConfig())(FakeCodec().decode(codes[:1]))
        assert torch.equal(split.clip(clip, "decoded-1")[1], decoded.half().float())
        assert torch.equal(split.clip(clip, "leaky-1024")[1], leaky(wave).half().float())
        assert split.clip(clip)[1] is None
        assert split.groups[clip] == entry["group"] == entry["path"].split("/")[0]
        assert entry["steps"] == codes.shape[1] == split.clip_steps(clip)
        n_seen += 1
    assert n_seen == 10 == dataset.split("train").n_clips + dataset.split("valid").n_clips
    assert dataset.split("valid").n_clips == 1


def test_normalisation_whitens_the_training_split(prepared) -> None:
    _, data, _ = prepared
    dataset = dataset_module.Dataset(data)
    mean, inv_std = dataset.normalisation("wave")
    frames = torch.from_numpy(dataset.split("train").mel["wave"].astype(np.float64))
    white = (frames - mean) * inv_std
    zeros, ones = torch.zeros(64).double(), torch.ones(64).double()
    torch.testing.assert_close(white.mean(0), zeros, atol=1e-6, rtol=0)
    torch.testing.assert_close(white.std(0, correction=0), ones, atol=1e-6, rtol=0)


def test_normalisation_floors_the_deviation(tmp_path: Path) -> None:
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(3200 + 320 * i), 24_000)
    manifest = prepare(tmp_path, tmp_path / "data", codec=FakeCodec(), keep_silence=True)
    constants = manifest["normalisation"]["wave"]
    assert constants["inv_std"] == [10.0] * 64
    assert constants["mean"] == pytest.approx([math.log(1e-5)] * 64, abs=5e-3)


def test_the_manifest_holds_no_path_of_this_machine(prepared) -> None:
    audio_dir, data, _ = prepared
    assert str(audio_dir.parent) not in (data / "manifest.json").read_text()
    assert sorted(path.name for path in data.iterdir()) == [
        "manifest.json",
        "report.html",
        "test",
        "train",
        "valid",
    ]


def test_bad_files_are_skipped_with_reasons_and_duplicates_stored_once(tmp_path: Path) -> None:
    audio_dir = make_audio(tmp_path / "audio", n_files=6)
    shutil.copy(audio_dir / "speech" / "01.flac", audio_dir / "a_copy.flac")
    (audio_dir / "text.wav").write_text("no sound")
    shutil.copy(audio_dir / "text.wav", audio_dir / "text2.wav")
    (audio_dir / "broken.wav").symlink_to(tmp_path / "nowhere.wav")
    (audio_dir / "notes.txt").write_text("1089-134686-0000 HE HOPED")
    soundfile.write(audio_dir / "short.wav", np.zeros(319), 24_000)
    soundfile.write(audio_dir / "nan.wav", np.array([math.nan] * 400), 24_000, subtype="FLOAT")
    soundfile.write(audio_dir / "long.flac", np.zeros(24_000 * 5), 24_000)
    manifest = prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), max_seconds=3, **AS_IS)
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert sorted(reasons) == [
        "broken.wav", "long.flac", "nan.wav", "short.wav", "text.wav", "text2.wav",
    ]  # fmt: skip
    assert "at least one step of 320 samples, got 319" in reasons["short.wav"]
    assert "finite, got nan at frame 0" in reasons["nan.wav"]
    assert "at most 3 s" in reasons["long.flac"]
    assert "must be audio" in reasons["text.wav"] and "regular file" in reasons["broken.wav"]
    entries = {entry["path"]: entry for entry in manifest["sources"]}
    assert entries["speech/01.flac"]["duplicate_of"] == "a_copy.flac"
    assert "clips" not in entries["speech/01.flac"] and entries["a_copy.flac"]["group"] == "."
    assert sum(total["clips"] for total in manifest["totals"].values()) == 6


def test_a_truncated_file_is_kept_with_a_note(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 24_000)
    blob = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(blob[:-2000])
    soundfile.write(tmp_path / "b.wav", np.ones(4000) * 0.1, 24_000)
    manifest = prepare(tmp_path, tmp_path / "data", codec=FakeCodec(), **AS_IS)
    (entry,) = (e for e in manifest["sources"] if e["path"] == "a.wav")
    assert entry["steps"] == 9 and entry["notes"][0].startswith("truncated")


def test_nothing_usable_is_an_error_with_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(DataError, match=r"all 1 were skipped: a.wav: must be audio"):
        prepare(tmp_path, tmp_path / "data", codec=FakeCodec())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"must hold audio files .*found no file"):
        prepare(empty, tmp_path / "data2", codec=FakeCodec())


def test_librispeech_layout_groups_by_speaker(tmp_path: Path) -> None:
    for i, name in enumerate(["dev-clean/1272/128104", "dev-clean/84/121123", "test-clean/61/1"]):
        folder = tmp_path / "LibriSpeech" / name
        folder.mkdir(parents=True)
        stem = "-".join(name.split("/")[1:])
        soundfile.write(folder / f"{stem}-0000.flac", np.full(16_000, 0.1 * i + 0.1), 16_000)
        (folder / f"{stem}.trans.txt").write_text(f"{stem}-0000 MISTER QUILTER\n")
    manifest = prepare(tmp_path / "LibriSpeech", tmp_path / "data", codec=FakeCodec())
    assert [entry["group"] for entry in manifest["sources"]] == ["1272", "84", "61"]
    assert {entry["steps"] for entry in manifest["sources"]} == {75}


def test_a_long_file_becomes_several_clips(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "PIECE_SECONDS", 1)
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.full(24_000 * 2 + 3300, 0.1 + i / 10), 24_000)
    manifest = prepare(tmp_path, tmp_path / "data", codec=FakeCodec())
    entry = manifest["sources"][0]
    assert entry["steps"] == 160 and entry["clips"] == [0, 1, 2]
    assert entry["facts"]["steps"] == [56, 56, 48]  # at the quietest frame of the last quarter
    assert "cut into 3 clips" in entry["notes"][0]
    split = dataset_module.Dataset(tmp_path / "data").split(entry["split"])
    assert [split.clip_steps(i) for i in range(3)] == entry["facts"]["steps"]
    # The second clip's first slice starts from silence, not from the first clip's sound.
    assert not torch.equal(split.clip(1, "wave")[1][0], split.clip(0, "wave")[1][-1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mel_sources": ("waves",)}, "wave, decoded-K"),
        ({"mel_sources": ("wave", "wave")}, "named once"),
        ({"mel_sources": ("decoded-5",)}, "at most the codec's 4"),
        ({"valid_fraction": 1.0}, r"valid_fraction must be in \[0, 1\)"),
        ({"jobs": 0}, r"jobs must be in \[1, 1024\], got 0"),
        ({"jobs": 10**12}, "jobs must be in"),
        ({"valid_fraction": math.nan}, "valid_fraction must be"),
        ({"test_fraction": math.inf}, "test_fraction must be"),
        ({"test_fraction": 0.95}, "test_fraction must be below 1"),
        ({"max_seconds": math.nan}, "max_seconds must be positive"),
        ({"split_by": "speaker"}, "split_by must be one of"),
        ({"mel": MelConfig(window_samples=10**12)}, "window_samples must be at most"),
        ({"mel": MelConfig(n_mels=10**12)}, "n_mels must be at most"),
        ({"mel": MelConfig(floor=math.inf)}, "floor must be finite"),
        ({"mel": MelConfig(hop_samples=160)}, "hop_samples must equal the codec's 320"),
    ],
)
def test_settings_are_checked_first(prepared, tmp_path: Path, kwargs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(prepared[0], tmp_path / "data", codec=FakeCodec(), **kwargs)
    assert not (tmp_path / "data").exists()


def test_command_line(prepared, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("wgpt.data.pipeline.load_codec", lambda codec, download: FakeCodec())
    out = str(tmp_path / "data")
    assert main(["prepare", str(prepared[0]), "--out", out, "--quiet", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["totals"]["train"]["clips"] == 9 and line["skipped"] == 0
    assert main(["prepare", str(prepared[0]), "--out", out, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("found 10 files: 10 used\ntrain: 9 files, 9 clips, ")
    assert main(["prepare", str(prepared[0]), "--out", out, "--mel-floor", "0.1", "--quiet"]) == 1
    assert main(["prepare", str(prepared[0]), "--out", out, "--mel-n-mels", "0", "--quiet"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(prepared[0])])
    assert capsys.readouterr().out == ""


def test_clips_of_a_group_stand_together_whatever_their_paths(tmp_path) -> None:
    """So that neighbours can be joined: names alone would mix the groups of a list."""
    audio_dir = make_audio(tmp_path / "audio")
    paths = sorted(path for path in audio_dir.rglob("*") if path.is_file())[:6]
    rows = [f"{path},{'ab'[i % 2]},train" for i, path in enumerate(paths)]
    (tmp_path / "list.csv").write_text("\n".join(["path,group,split", *rows]) + "\n")
    prepare(tmp_path / "list.csv", tmp_path / "data", codec=FakeCodec(), **AS_IS)
    split = dataset_module.Dataset(tmp_path / "data").split("train")
    assert split.groups == ["a"] * 3 + ["b"] * 3
    assert split.joined(10**6).groups == ["a", "b"]
