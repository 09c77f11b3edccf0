"""The model in the package: whole, usable by its name, small, and packed from a run."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from wgpt import audio, codec, starter
from wgpt.cli import main
from wgpt.codec.training import synth
from wgpt.config import ConfigError
from wgpt.model import HybridModel
from wgpt.runs import read_metrics
from wgpt.speaker import Speaker
from wgpt.train import train
from wgpt.warm_start import WarmStart


def test_starter_speaks_with_all_codebooks_of_mini(tmp_path, capsys):
    prompt, out = tmp_path / "x.wav", tmp_path / "y.wav"
    audio.write(prompt, synth.render_music(1.0, seed=9))
    arguments = ["--prompt", str(prompt), "--seconds", "0.4", "--out", str(out)]
    assert main(["generate", "starter", *arguments]) == 0
    assert len(audio.read(out)) == 30 * 320
    speaker = Speaker.open("starter")
    assert speaker.n_codebooks == 8 == speaker.n_heard
    entries = speaker.codec.codebooks()
    entries = entries - entries.mean(1, keepdim=True)
    entries = entries / entries.square().mean((1, 2)).sum().sqrt()
    read = speaker.model.latent.codebooks[:, :-1]  # kept in float8
    torch.testing.assert_close(read, entries, rtol=0.07, atol=2e-3)
    assert main(["generate", "starte", *arguments]) == 2
    assert "'starter', the model in the package" in capsys.readouterr().err


def test_starter_folder_is_whole_and_small():
    facts = json.loads((starter.FOLDER / "config.json").read_text())
    weights = starter.FOLDER / "model.safetensors"
    assert weights.stat().st_size < 4.3e6
    assert facts["codec"]["identity"] == codec.load("mini").identity
    assert "/" not in json.dumps(facts)  # no path of the machine that trained it
    assert {"README.md", "config.json", "model.safetensors"} == {
        path.name for path in starter.FOLDER.iterdir() if path.suffix != ".png"
    }


@torch.inference_mode()
def test_starter_knows_how_music_goes_on():
    """Teacher-forced NLL of pieces that nothing heard: far below chance in every codebook."""
    speaker = Speaker.open("starter")
    sums = np.zeros(8)
    for seed in (81, 82):
        codes = speaker.codec.encode(torch.from_numpy(synth.render_music(4.0, seed=seed)))[None]
        frames = speaker.frontend(speaker.codec.decode(codes[0]))[None, :-1]
        hidden = speaker.model.hidden(codes[:, :, :-1].transpose(1, 2), frames)
        losses = torch.nn.functional.cross_entropy(
            speaker.model.head(hidden)[0], codes[0, 0, 1:], reduction="mean"
        )
        fine, _ = speaker.model.fine.nll(hidden, codes[:, :, 1:])
        sums += np.array([losses.item(), *fine.mean((0, 2)).tolist()]) / 2
    assert sums[0] < 4 and sums[1] < 6 and sums.max() < 6.9, sums


def test_init_starter_begins_where_the_starter_is(tmp_path):
    """On data with its mel source; small types in the file, float32 in training."""
    from wgpt.data.prepare import prepare

    (tmp_path / "audio").mkdir()
    for seed in range(4):
        audio.write(tmp_path / "audio" / f"{seed}.wav", synth.render_music(2.0, seed=seed))
    prepare(tmp_path / "audio", tmp_path / "data", mel_sources=("wave", "decoded-8"),
            valid_fraction=0.3, progress=False)  # fmt: skip
    settings = {"max_steps": 1, "batch_size": 2, "context_s": 1.0, "warmup_steps": 1,
                "sample_s": 0.0, "device": "cpu", "mel_source": "decoded-8"}  # fmt: skip
    train(tmp_path / "data", tmp_path / "run", init="starter", **settings)
    first = read_metrics(tmp_path / "run" / "metrics.csv")[0]
    assert float(first["nll_nats"]) < 4.5 and float(first["fine_nll_nats"]) < 6.9
    stored = safetensors.torch.load_file(starter.FOLDER / "model.safetensors")
    types = {value.dtype for value in stored.values() if value.dim() > 1}
    assert types == set(starter.STORED.values())
    trained = HybridModel.from_pretrained(tmp_path / "run" / "model")
    assert {value.dtype for value in trained.parameters()} == {torch.float32}
    assert WarmStart("starter").preset == "hybrid-xs"


def test_pack_shrinks_a_run_and_keeps_its_model(tiny_run, tmp_path):
    command = [sys.executable, "-m", "wgpt.starter", str(tiny_run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "MB" in done.stdout
    whole = HybridModel.from_pretrained(tiny_run / "model")
    packed = HybridModel.from_pretrained(tmp_path / "out")
    for name, value in whole.state_dict().items():
        expected = value.half().float() if value.dim() > 1 else value
        assert torch.equal(packed.state_dict()[name], expected), name
    sizes = [(folder / "model.safetensors").stat().st_size
             for folder in (tmp_path / "out", tiny_run / "model")]  # fmt: skip
    assert sizes[0] < 0.53 * sizes[1]
    assert len(Speaker.open(tmp_path / "out").continue_wave(None, 0.1)) == 8 * 320
    assert starter.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "no")]) == 1


def test_model_folder_of_a_name_a_run_and_a_model(tiny_run, tmp_path):
    assert starter.model_folder("starter") == starter.FOLDER
    assert starter.model_folder(tiny_run) == tiny_run / "model"
    assert starter.model_folder(str(tiny_run / "model")) == tiny_run / "model"
    with pytest.raises(ConfigError, match=r"config\.json: no such file; RUN is a folder"):
        starter.model_folder(tmp_path / "nothing")
