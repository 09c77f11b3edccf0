"""What is collected: folders, files, lists, groups, given splits; the account adds up."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec, make_audio

from wgpt.audio import AudioError
from wgpt.cli import main
from wgpt.data import prepare
from wgpt.data.account import account_lines
from wgpt.data.inputs import collect
from wgpt.errors import DataError

NOWHERE = Path("/nonexistent-output")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def named(inputs) -> dict[str, tuple[str, str | None]]:
    return {entry.name: (entry.group, entry.split) for entry in inputs.entries}


def test_folders_files_and_both(tmp_path: Path) -> None:
    touch(tmp_path, "a/x/1.wav", "a/2.ogg", "b/1.wav", "c.flac", "a/notes.txt")
    inputs = collect([tmp_path / "a", tmp_path / "b", tmp_path / "c.flac"], [], [], NOWHERE)
    assert named(inputs) == {
        "a/2.ogg": ("a", None), "a/x/1.wav": ("x", None), "b/1.wav": ("b", None),
        "c.flac": (".", None),
    }  # fmt: skip
    assert inputs.other_suffixes() == {".txt": 1}
    (only,) = collect([tmp_path / "c.flac"], [], [], NOWHERE).entries
    assert only.name == "c.flac" and only.path == tmp_path / "c.flac"


def test_equal_names_of_several_inputs_get_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.wav", "b/1.wav", "x/voices/1.wav", "y/voices/1.wav")
    files = collect([tmp_path / "a" / "1.wav", tmp_path / "b" / "1.wav"], [], [], NOWHERE)
    assert list(named(files)) == ["1-2.wav", "1.wav"]
    folders = collect([tmp_path / "x" / "voices", tmp_path / "y" / "voices"], [], [], NOWHERE)
    assert list(named(folders)) == ["voices-2/1.wav", "voices/1.wav"]


@pytest.mark.parametrize("name", ["a\\u0000.wav", "\\ud800.wav"])
def test_a_name_that_no_file_bears_is_refused_by_line(name, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"path": "b.wav"}}\n{{"path": "{name}"}}\n')
    with pytest.raises(DataError, match=r"list\.jsonl: line 2: path must be a file's name, got"):
        collect([tmp_path / "list.jsonl"], [], [], NOWHERE)


def test_a_plain_list_is_read_from_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, "sound/a.wav", "sound/b.wav")
    (tmp_path / "list.txt").write_text("# mine\nsound/a.wav\n\nsound/missing.wav\n")
    inputs = collect([tmp_path / "list.txt"], [], [], NOWHERE)
    assert list(named(inputs)) == ["sound/a.wav", "sound/missing.wav"]
    assert inputs.entries[0].path == tmp_path / "sound" / "a.wav"


def test_a_list_of_files_elsewhere_names_no_path_of_this_machine(tmp_path: Path) -> None:
    touch(tmp_path, "x/sound/a.wav", "x/sound/deep/b.wav")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.txt").write_text(f"{tmp_path}/x/sound/a.wav\n../x/sound/deep/b.wav\n")
    inputs = collect([tmp_path / "lists" / "l.txt"], [], [], NOWHERE)
    assert list(named(inputs)) == ["a.wav", "deep/b.wav"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_gives_groups_and_splits(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"path": "s/a.wav", "group": "ann", "split": "train", "licence": "CC0"},
        {"path": 's/b, "b".wav', "group": "bob", "split": "dev", "licence": ""},
        {"path": "s/c.wav", "group": "", "split": "", "licence": ""},
        {"path": "s/d.wav", "group": "cy", "split": "held-out", "licence": ""},
    ]
    table = tmp_path / f"recordings{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(table, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    assert named(collect([table], [], [], NOWHERE)) == {
        "s/d.wav": ("cy", "test"), 's/b, "b".wav': ("bob", "valid"),
        "s/a.wav": ("ann", "train"), "s/c.wav": ("s", None),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "file,group\na.wav,x\n", "must name the columns, path among them"),
        ("l.csv", "path,split\na.wav,train\nb.wav,later\n", "line 3: split must be train"),
        ("l.csv", "path\na.wav\na.wav\n", "line 3: every path must be listed once"),
        ("l.txt", "# nothing\n", "must list at least one file"),
        ("l.csv", "", "must name the columns"),
        ("l.jsonl", '{"path": "a.wav"}\n{', "line 2: must be JSON"),
        ("l.jsonl", '{"group": "a"}\n', "line 1: must have a path"),
        ("l.jsonl", "[1]\n", "line 1: must have a path"),
    ],
)
def test_a_malformed_list_is_refused_by_line(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        collect([tmp_path / name], [], [], NOWHERE)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="got nothing there"):
        collect([tmp_path / "none"], [], [], NOWHERE)
    touch(tmp_path, "notes.txt.bak", "pic.jpg")
    with pytest.raises(DataError, match=r"must hold audio files .*found 1 \.bak, 1 \.jpg"):
        collect([tmp_path], [], [], NOWHERE)


def test_librispeech_gives_speakers_and_official_splits(tmp_path: Path) -> None:
    names = ["train-clean-100/19/198/19-198-0001.flac", "train-clean-100/26/495/26-495-0000.flac",
             "dev-clean/84/121123/84-121123-0000.flac",
             "test-other/61/70968/61-70968-0000.flac"]  # fmt: skip
    touch(tmp_path / "LibriSpeech", *names, "train-clean-100/19/198/19-198.trans.txt")
    expected = {
        names[0]: ("19", "train"), names[1]: ("26", "train"), names[2]: ("84", "valid"),
        names[3]: ("61", "test"),
    }  # fmt: skip
    assert named(collect([tmp_path / "LibriSpeech"], [], [], NOWHERE)) == expected
    parent = named(collect([tmp_path], [], [], NOWHERE))
    assert parent == {f"LibriSpeech/{name}": value for name, value in expected.items()}
    # Without a training folder among them, nothing is given: someone tries dev-clean alone.
    alone = named(collect([tmp_path / "LibriSpeech" / "dev-clean"], [], [], NOWHERE))
    assert alone == {"84/121123/84-121123-0000.flac": ("84", None)}
    pair = [tmp_path / "LibriSpeech" / name for name in ("train-clean-100", "dev-clean")]
    assert {split for _, split in named(collect(pair, [], [], NOWHERE)).values()} == {
        "train", "valid",
    }  # fmt: skip


def test_the_account_adds_up(tmp_path: Path) -> None:
    audio_dir = make_audio(tmp_path / "audio", n_files=4)
    touch(audio_dir, "notes.txt", "pic.jpg", "broken.wav", "deep/broken.mp3", ".hidden.wav")
    (audio_dir / "empty.flac").write_bytes(b"")
    (audio_dir / "copy.wav").write_bytes((audio_dir / "music" / "00.wav").read_bytes())
    soundfile.write(audio_dir / "silent.wav", np.zeros(9600), 24_000)
    wave, rate_hz = soundfile.read(audio_dir / "speech" / "01.flac", dtype="int16")
    soundfile.write(audio_dir / "same_sound.wav", wave, rate_hz)
    manifest = prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    counts = manifest["account"]
    n_files = sum(path.is_file() for path in audio_dir.rglob("*"))
    assert counts["found"] + counts["hidden"] == n_files == 13
    assert counts["found"] == sum(
        counts[name] for name in ("used", "duplicates", "skipped", "not_sound")
    )
    assert (counts["used"], counts["duplicates"], counts["skipped"]) == (4, 2, 4)
    assert counts["not_sound_suffixes"] == {".jpg": 1, ".txt": 1}
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert reasons["silent.wav"] == "must hold sound, got silence throughout"
    text = "\n".join(account_lines(manifest))
    assert "found 12 files: 4 used + 2 duplicates + 4 skipped + 2 not sound" in text
    assert "skipped silent.wav: must hold sound" in text


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_an_unreadable_folder_and_missing_list_entries_are_in_the_account(tmp_path) -> None:
    audio_dir = make_audio(tmp_path / "audio", n_files=2)
    closed = audio_dir / "closed"
    closed.mkdir()
    closed.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            for folder in tmp_path.parents[:3]:
                folder.chmod(folder.stat().st_mode | 0o055)
            os.chown(tmp_path, 65534, -1)
            os.seteuid(65534)
        manifest = prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o700)
    (entry,) = manifest["skipped"]
    assert entry == {
        "path": "closed", "reason": "a folder that cannot be opened: Permission denied",
    }  # fmt: skip
    counts = manifest["account"]
    assert (counts["found"], counts["used"], counts["skipped"]) == (3, 2, 1)
    (tmp_path / "l.txt").write_text("audio/music/00.wav\naudio/speech/01.flac\nnone.wav\n")
    manifest = prepare(tmp_path / "l.txt", tmp_path / "data2", codec=FakeCodec())
    assert manifest["skipped"] == [
        {"path": "none.wav", "reason": "must be a regular file that exists"}
    ]
    assert manifest["account"]["found"] == 3 and manifest["account"]["used"] == 2


def test_all_silent_data_are_refused(tmp_path: Path) -> None:
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(9600 + i), 24_000)
    with pytest.raises(DataError, match=r"all 3 were skipped: 0.wav: must hold sound"):
        prepare(tmp_path, tmp_path / "data", codec=FakeCodec())


def test_the_command_wants_an_input(tmp_path: Path, capsys) -> None:
    assert main(["prepare", "--out", str(tmp_path / "data")]) == 2
    assert "name at least one folder, audio file or list" in capsys.readouterr().err
