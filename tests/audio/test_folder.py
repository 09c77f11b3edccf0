"""audio.walk: every entry of a folder, each once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wgpt import audio


def test_find_lists_audio_sorted_without_hidden_files_or_loops(tmp_path: Path) -> None:
    for name in ("b.wav", "a.FLAC", "sub/z.mp3", "sub/.hidden.wav", ".git/x.wav", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.wav").symlink_to(tmp_path / "nowhere.wav")
    found = [path.relative_to(tmp_path).as_posix() for path in audio.find(tmp_path)]
    assert found == ["a.FLAC", "b.wav", "broken.wav", "sub/z.mp3"]
    with pytest.raises(audio.AudioError, match="must be a folder"):
        audio.find(tmp_path / "b.wav")


def test_walk_counts_every_entry_once(tmp_path: Path) -> None:
    for name in ("a.wav", "b.m4a", "notes.txt", "sub/c.ogg", "sub/pic.jpg", ".DS_Store"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "no_suffix").write_bytes(b"fLaC and more of it")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens.wav").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    seen = audio.walk(tmp_path, leave_out=tmp_path / "out")

    def names(paths):
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert names(seen.sound) in (
        ["a.wav", "b.m4a", "link/c.ogg", "no_suffix"],
        ["a.wav", "b.m4a", "no_suffix", "sub/c.ogg"],
    )
    assert {path.name for path in seen.other} == {"notes.txt", "pic.jpg"}
    assert names(seen.hidden) == [".DS_Store"] and seen.unreadable == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_walk_reports_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "a.wav").write_bytes(b"x")
    closed.chmod(0)
    root = os.geteuid() == 0  # who may look into everything
    try:
        if root:
            os.chown(tmp_path, 65534, -1)
            for folder in tmp_path.parents[:3]:
                folder.chmod(folder.stat().st_mode | 0o055)
            os.seteuid(65534)
        seen = audio.walk(tmp_path)
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o700)
    assert seen.unreadable == [(closed, "Permission denied")] and seen.sound == []
