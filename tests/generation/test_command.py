"""`wgpt generate`: files, streams to a pipe, and what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from wgpt import audio
from wgpt.cli import main
from wgpt.generation import AudioGenerator, Sampling
from wgpt.model import HybridModel


def test_generate_command_writes_a_wav(tiny_run, recordings, tmp_path, capsys):
    prompt = sorted(recordings.rglob("*.wav"))[0]
    out = tmp_path / "y.wav"
    arguments = ["generate", str(tiny_run), "--prompt", str(prompt), "--seconds", "0.2"]
    assert main([*arguments, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["tokens"]) == 15
    assert len(audio.read(out)) == 15 * 320
    assert main([*arguments, "--out", str(out), "--with-prompt"]) == 0
    assert len(audio.read(out)) == len(audio.read(prompt)) + 15 * 320
    assert main([*arguments[:2], "--seconds", "0", "--out", str(out)]) == 2
    capsys.readouterr()
    assert main([*arguments, "--out", str(out), "--json", "--weight-dtype", "int8"]) == 0
    in_int8 = json.loads(capsys.readouterr().out)
    assert len(in_int8["tokens"]) == 15 and in_int8["entropy_nats"] != facts["entropy_nats"]


def command(*arguments):
    return [sys.executable, "-m", "wgpt.generate", *map(str, arguments)]


def test_generate_command_streams_what_it_writes(tiny_run, recordings, tmp_path):
    prompt, out = sorted(recordings.rglob("*.wav"))[0], tmp_path / "y.wav"
    common = [tiny_run, "--prompt", prompt, "--seconds", "0.2", "--seed", "4"]
    assert main(["generate", *map(str, common), "--out", str(out)]) == 0
    raw = {}
    for kind in ("s16le", "f32le"):
        done = subprocess.run(
            command(*common, "--stream", "--format", kind), capture_output=True, check=True, cwd="/"
        )
        raw[kind] = done.stdout
    floats = np.frombuffer(raw["f32le"], "<f4")
    assert floats.shape == (15 * 320,)
    assert np.array_equal(floats, AudioGenerator.load(tiny_run).generate(
        audio.read(prompt), 0.2, Sampling(top_k=100), 4))  # fmt: skip
    whole = np.rint(np.clip(floats, -1, 1) * 32767)
    assert np.array_equal(np.frombuffer(raw["s16le"], "<i2"), whole)
    np.testing.assert_allclose(audio.read(out), floats, atol=2 / 32768)


def test_generate_command_ends_quietly_when_the_listener_leaves(tiny_run):
    process = subprocess.Popen(
        command(tiny_run, "--stream", "--end-when-stuck", 0),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    assert len(process.stdout.read(4000)) == 4000
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0
    assert "Error" not in said and "Broken" not in said


def test_generate_command_writes_numbered_files(tiny_run, tmp_path, capsys):
    base = ["generate", str(tiny_run), "--seconds", "0.1"]
    assert main([*base, "--n", "3", "--out", str(tmp_path / "y.wav"), "--seed", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"y-{i}.wav") for i in (1, 2, 3)]
    assert main([*base, "--out", str(tmp_path / "alone.wav"), "--seed", "6"]) == 0
    assert (tmp_path / "alone.wav").read_bytes() == (tmp_path / "y-2.wav").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seconds", "1"], "one of --out AUDIO and --stream"),
        (["--out", "x.wav", "--stream"], "one of --out AUDIO and --stream"),
        (["--out", "x.wav"], "--out needs --seconds"),
        (["--stream", "--n", "2"], "--n and --json need --out"),
        (["--out", "x.wav", "--seconds", "1", "--n", "0"], "--n must be in [1, 1024], got 0"),
        (
            ["--out", "x.wav", "--seconds", "1", "--fine-temperature", "-1"],
            "fine_temperature must be finite and at least 0, got -1",
        ),
        (
            ["--out", "x.wav", "--seconds", "1", "--fine-top-k", "-1"],
            "fine_top_k must be at least 0, got -1",
        ),
        (["--out", "x.m4a", "--seconds", "1"], "suffix must be one of .wav, .flac"),
        (["--out", "x", "--seconds", "1"], "suffix must be one of .wav, .flac"),
        (["--out", "no/x.wav", "--seconds", "1"], "--out: there is no folder no; make it first"),
        (["--out", "folder.wav", "--seconds", "1"], "--out: folder.wav cannot be written"),
        (["--out", "x.wav", "--seconds", "inf"], "--seconds must be at least one step"),
        (["--out", "x.wav", "--seconds", "1", "--seed", "-1"], "seed must be in"),
        (
            ["--out", "x.wav", "--seconds", "1", "--end-when-stuck", "-2"],
            "end_when_stuck_s must be at least one step",
        ),
        (
            ["--out", "x.wav", "--seconds", "1", "--device", "tpu"],
            "device must be auto or, on this machine, one of cpu",
        ),
        (["--out", "x.wav", "--seconds", "1", "--prompt", "no.wav"], "--prompt: no.wav: must be"),
        (["--out", "x.wav", "--seconds", "1", "--prompt", "text.wav"], "--prompt: text.wav: must"),
    ],
)
def test_generate_command_refuses_before_a_model_is_loaded(
    flags, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "folder.wav").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AudioGenerator, "load", lambda *_: pytest.fail("a model was loaded"))
    assert main(["generate", "starter", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.wav", "text.wav"]


def test_generate_command_suggests_the_model_that_was_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, meant in (("startr", True), ("my-own-run", False)):
        assert main(["generate", name, "--seconds", "1", "--out", "x.wav"]) == 2
        assert ("did you mean starter?" in capsys.readouterr().err) == meant


def stuck_run(tiny_run, folder):
    """The model of a run, made to say token 0 for ever at temperature 0."""
    model = HybridModel.from_pretrained(tiny_run / "model")
    with torch.no_grad():
        model.head.weight.zero_()
    facts = json.loads((tiny_run / "model" / "config.json").read_text())
    kept = {name: facts[name] for name in ("preset", "step", "mel", "mel_source", "codec")}
    model.save_pretrained(folder, extra=kept)
    return folder


def test_generate_command_says_what_is_wrong_with_the_sound(
    tiny_run, recordings, tmp_path, capsys, caplog
):
    run, out = stuck_run(tiny_run, tmp_path / "model"), tmp_path / "y.wav"
    prompt = sorted(recordings.rglob("*.wav"))[0]
    common = ["generate", str(run), "--out", str(out), "--json", "--temperature", "0"]
    assert main([*common, "--seconds", "2.2", "--prompt", str(prompt)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["tokens"]) == {0} and facts["ended"] == ""
    assert any("one token repeats for" in warning for warning in facts["warnings"])
    for warning in facts["warnings"]:
        assert f"{out}: {warning}" in caplog.text
    assert main([*common, "--seconds", "0.5"]) == 0
    assert not any("repeats" in w for w in json.loads(capsys.readouterr().out)["warnings"])


def test_generate_command_ends_a_file_that_is_stuck(tiny_run, tmp_path, capsys):
    run, out = stuck_run(tiny_run, tmp_path / "model"), tmp_path / "y.wav"
    common = ["generate", str(run), "--out", str(out), "--json", "--temperature", "0"]
    assert main([*common, "--seconds", "1", "--end-when-stuck", "0.2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "repeated for 0.2 s" in facts["ended"]
    assert 0.2 <= facts["seconds"] < 0.4 and len(audio.read(out)) == facts["seconds"] * 24_000


def test_generate_command_does_not_write_sound_to_a_terminal(tiny_run):
    master, slave = os.openpty()
    done = subprocess.run(
        command(tiny_run, "--stream", "--seconds", "1"),
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    os.close(slave)
    os.close(master)
    assert done.returncode == 2 and "aplay" in done.stderr


def test_generate_command_gives_the_threads_back(tiny_run, tmp_path):
    # A training in the same process would otherwise go on with one, and round otherwise.
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        command = ["generate", str(tiny_run), "--seconds", "0.1", "--out", str(tmp_path / "y.wav")]
        assert main(command) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
