"""benchmarks/recordings.py: what is held out, the table, and a machine without apt."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from wgpt import audio
from wgpt.codec.training.corpus import list_recordings
from wgpt.codec.training.music import render_music
from wgpt.files import sha256_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recordings.py"


@pytest.fixture(scope="module")
def recordings():
    spec = importlib.util.spec_from_file_location("recordings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recordings"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recordings"]


@pytest.fixture
def unpacked(recordings, tmp_path):
    """A folder as `fetch` leaves it: six tracks, one of them twice, words in two languages."""
    music = tmp_path / "wesnoth-1.16-music" / "sound"
    words = tmp_path / "ktuberling-data" / "sound"
    for folder in (music, words / "da", words / "fr"):
        folder.mkdir(parents=True)
    for i in range(6):
        audio.write(music / f"track{i}.wav", render_music(0.5, seed=min(i, 3)), 24_000)
    for i, language in enumerate(("da", "fr")):
        audio.write(words / language / "word.wav", render_music(0.5, seed=10 + i), 24_000)
    (music / "broken.ogg").write_bytes(b"not a sound")
    packages = [
        p for p in recordings.PACKAGES if p.name in ("wesnoth-1.16-music", "ktuberling-data")
    ]
    rows = recordings.table(packages, tmp_path)
    recordings.write_table(tmp_path / "recordings.csv", rows)
    return tmp_path


def test_every_fourth_track_its_copies_and_the_held_out_languages_are_held_out(unpacked, capsys):
    with open(unpacked / "recordings.csv", newline="") as file:
        split = {Path(row["path"]).parts[-2:]: row["split"] for row in csv.DictReader(file)}
    held_out = {name for name, value in split.items() if value == "held-out"}
    # broken.ogg has rank 0, so track2 has rank 3; tracks 3, 4 and 5 are one sound, none of them
    # of rank 3 or 7.
    assert held_out == {("da", "word.wav"), ("sound", "track2.wav")}
    assert len(split) == 8
    trained = [r.path.name for r in list_recordings(unpacked / "recordings.csv")]
    assert sorted(trained) == ["track0.wav", "track1.wav", *(f"track{i}.wav" for i in (3, 4, 5)),
                               "word.wav"]  # fmt: skip


def test_a_copy_of_a_held_out_file_is_held_out(recordings, unpacked):
    copy = unpacked / "ktuberling-data" / "sound" / "fr" / "copy.wav"
    copy.write_bytes((unpacked / "ktuberling-data" / "sound" / "da" / "word.wav").read_bytes())
    packages = [p for p in recordings.PACKAGES if p.name == "ktuberling-data"]
    rows = {Path(row["path"]).name: row for row in recordings.table(packages, unpacked)
            if "fr" in row["path"]}  # fmt: skip
    assert rows["copy.wav"]["split"] == "held-out" and rows["word.wav"]["split"] == "train"
    assert rows["copy.wav"]["sha256"] == sha256_of(copy)


def test_without_apt_it_says_so(recordings, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recordings.main(["--out", str(tmp_path / "out"), "--sets", "music"]) == 1
    error = capsys.readouterr().err
    assert "apt-get is not on PATH; this needs Debian or Ubuntu" in error


def test_fillets_nl_is_held_out_whole(recordings):
    package = next(p for p in recordings.PACKAGES if p.name == "fillets-ng-data-nl")
    assert all(package.held_out(Path("scene/nl/x.ogg"), rank) for rank in range(8))
