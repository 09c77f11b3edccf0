"""The tutorials run from top to bottom, as their reader would: fewer recordings, fewer steps."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from wgpt.cli import main

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
SPEECH = Path(__file__).parents[1] / "wgpt" / "assets" / "speech"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BRIEF = {  # what a test adds to a command, so that it takes seconds
    "train": "--max-steps 2 --batch-size 2 --sample-s 0.2",
    "study": "--max-steps 2 --batch-size 2",
    "generate": "--seconds 0.2",
}


def commands_of(page):
    """The shell lines of a tutorial, as words after `wgpt`."""
    for language, text in BLOCK.findall((TUTORIALS / page).read_text()):
        if language == "sh":
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "wgpt"
                yield words + shlex.split(BRIEF.get(words[0], ""))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with RECORDINGS of ten groups and x.wav, which is the current one."""
    monkeypatch.chdir(tmp_path)
    clips = sorted(SPEECH.glob("*.ogg"))[:11]
    for i, clip in enumerate(clips[:-1]):
        group = tmp_path / "RECORDINGS" / f"reader-{i % 10}"
        group.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip, group / clip.name)
    shutil.copyfile(clips[-1], tmp_path / "x.wav")
    return tmp_path


def test_my_voice(reader):
    for words in commands_of("my-voice.md"):
        assert main(words) == 0, words
    assert (reader / "y.wav").stat().st_size == 44 + 2 * 15 * 320
    assert (reader / "DATA" / "report.html").is_file()


def test_the_paper(reader):
    for words in commands_of("paper.md"):
        assert main(words) == 0, words
    page = (reader / "STUDY" / "study.html").read_text()
    assert "hybrid" in page and "decoded-1" in page


def test_kernels():
    names: dict = {}
    blocks = BLOCK.findall((TUTORIALS / "kernels.md").read_text())
    assert len(blocks) == 4
    for language, text in blocks:
        assert language == "python"
        exec(text, names)
    assert names["fused"].shape == (2, 512, 256)


def test_every_tutorial_is_run_here():
    assert {path.name for path in TUTORIALS.iterdir()} == {"my-voice.md", "paper.md", "kernels.md"}
