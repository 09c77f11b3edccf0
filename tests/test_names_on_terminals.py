"""Names of files reach a terminal escaped, whatever the command: no bytes that it would obey."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from wgpt import audio, cli
from wgpt.codec.training.synth import render_music

ODD = "a\x1b[31m\nFORGED: a line\x9b"  # escape sequences of 7 and 8 bits, and a new line
PROGRAM = """
import sys
from wgpt.cli import main
for line in sys.stdin.buffer.read().split(b"\\0"):
    words = [word.decode() for word in line.split(b"\\1")]
    sys.stderr.write(f"== {ascii(words[0])}\\n")
    try:
        main(words)
    except SystemExit:
        pass
"""


def on_a_terminal(commands: list[list[str]]) -> str:
    """What commands write to a terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        cwd="/",
    )
    os.close(theirs)
    said = bytearray()

    def read():
        while True:
            try:
                said.extend(os.read(ours, 65536))
            except OSError:  # closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    process.communicate("\0".join("\1".join(words) for words in commands).encode(), timeout=300)
    reader.join()
    os.close(ours)
    return said.decode()


def test_odd_names_are_escaped_by_every_command(tmp_path: Path, tiny_run: Path) -> None:
    recordings = tmp_path / f"recordings {ODD}"
    recordings.mkdir()
    for name in ("one", "two"):
        audio.write(recordings / f"{name} {ODD}.wav", render_music(1.0, seed=len(name)))
    (recordings / f"broken {ODD}.wav").write_bytes(b"no sound")
    (recordings / f"copy {ODD}.wav").write_bytes((recordings / f"one {ODD}.wav").read_bytes())
    there, missing = str(recordings), str(tmp_path / f"missing {ODD}")
    prompt, out = f"{there}/one {ODD}.wav", str(tmp_path / f"out {ODD}")
    commands = [
        ["prepare", there, "--out", f"{out}.data", "--valid-fraction", "0.5", "--jobs", "1"],
        ["prepare", missing, "--out", out],
        ["merge", missing, "--out", out],
        ["train", "--data", missing, "--out", out],
        ["train", "--out", missing, "--resume"],
        ["codec-train", "--data", missing, "--work", f"{out}.work", "--out", out],
        ["eval", missing],
        ["generate", missing, "--seconds", "1", "--out", f"{out}.wav"],
        ["generate", str(tiny_run), "--prompt", f"{there}/broken {ODD}.wav",
         "--seconds", "1", "--out", f"{out}.wav"],
        ["serve", missing],
        ["study", missing, "--out", out],
        ["demo", "--out", prompt],
        ["presets", ODD],
        ["verify", f"{out}.data"],
        ["verify", missing],
        ["doctor", ODD],
        [f"verb {ODD}"],
    ]  # fmt: skip
    assert {words[0] for words in commands} >= set(cli.COMMANDS)
    said = on_a_terminal(commands)
    assert said.count("FORGED") >= len(commands) - 2, said
    for line in said.replace("\r\n", "\n").split("\n"):
        # tqdm's own movements of the cursor aside, on lines of progress.
        assert "\x1b[31m" not in line and "\x9b" not in line, line
        assert not line.startswith("FORGED"), said
    assert "Traceback" not in said
