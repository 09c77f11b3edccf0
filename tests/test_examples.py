"""Every script in examples/ runs as its docstring says."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wgpt import audio
from wgpt.config import HOP_SAMPLES

EXAMPLES = Path(__file__).parents[1] / "examples"
TENTH_S = 8 * HOP_SAMPLES  # 0.1 s in whole steps


@pytest.fixture
def run_example(monkeypatch, tmp_path, capfdbinary):
    """Runs examples/NAME as a script would, in this process; returns what it writes to stdout."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfdbinary.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfdbinary.readouterr().out

    return run


@pytest.fixture
def prompts(recordings):
    return sorted(recordings.rglob("*.wav"))


def test_continue_file_writes_a_file(run_example, prompts, tmp_path):
    out = run_example("continue_file.py", prompts[0], "y.wav", 0.1)
    assert out == b"y.wav: 0.11 s\n"
    wave = audio.read(tmp_path / "y.wav")
    assert wave.shape == (TENTH_S,)
    assert np.isfinite(wave).all() and np.abs(wave).max() > 0


def test_stream_to_pipe_writes_the_samples_of_continue_file(run_example, prompts):
    raw = run_example("stream_to_pipe.py", prompts[0], 0.1)
    assert np.frombuffer(raw, "<i2").shape == (TENTH_S,)
    assert np.frombuffer(raw, "<i2").any()


def test_stream_to_pipe_ends_quietly_when_the_player_leaves(prompts, tmp_path):
    done = subprocess.run(
        f"{sys.executable} {EXAMPLES / 'stream_to_pipe.py'} {prompts[0]} | head -c 100",
        shell=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert len(done.stdout) == 100
    assert b"Error" not in done.stderr


def test_batch_gives_each_what_it_gets_alone(run_example, prompts, tmp_path):
    run_example("batch.py", "all", 0.1, *prompts[:2])
    run_example("batch.py", "one", 0.1, prompts[0])
    assert len(list((tmp_path / "all").iterdir())) == 2
    name = f"{prompts[0].stem}.wav"
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_attention_in_torch_agrees_with_torch(run_example):
    out = run_example("attention_in_torch.py").decode()
    assert float(out.split()[0]) < 1e-5


def test_train_on_folder_prints_the_figures(run_example, recordings):
    out = run_example("train_on_folder.py", recordings, "out", 2).decode()
    rows = [line for line in out.splitlines() if line.endswith(" nats")]
    assert any(row.startswith("bigram") for row in rows)
    assert any(row.startswith("hybrid-xs (teacher-forced)") for row in rows)
    assert any(row.startswith("hybrid-xs (closed loop)") for row in rows)


def test_every_example_is_run_and_listed():
    listed, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f'"{script.name}"' in here
        assert f"]({script.name})" in listed


BENCHMARKS = EXAMPLES.parent / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_starts(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out
