"""The model in the package: whole, usable by its name, small, and packed from a run."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from wgpt import audio, codec
from wgpt.cli import main
from wgpt.codec.training import synth
from wgpt.errors import ConfigError
from wgpt.generation import AudioGenerator
from wgpt.model import HybridModel, presets
from wgpt.runs import pretrained
from wgpt.runs.metrics import read_metrics
from wgpt.runs.model_record import ModelRecord
from wgpt.training import train
from wgpt.training.initial_weights import InitialWeights


def test_starter_speaks_with_all_codebooks_of_mini(tmp_path, capsys):
    prompt, out = tmp_path / "x.wav", tmp_path / "y.wav"
    audio.write(prompt, synth.render_music(1.0, seed=9))
    arguments = ["--prompt", str(prompt), "--seconds", "0.4", "--out", str(out)]
    assert main(["generate", "starter", *arguments]) == 0
    assert len(audio.read(out)) == 30 * 320
    generator = AudioGenerator.load("starter")
    assert generator.n_codebooks == 8 == generator.n_mel_codebooks
    entries = generator.codec.codebooks()
    entries = entries - entries.mean(1, keepdim=True)
    entries = entries / entries.square().mean((1, 2)).sum().sqrt()
    read = generator.model.latent.codebooks[:, :-1]  # kept in float8
    torch.testing.assert_close(read, entries, rtol=0.07, atol=2e-3)
    assert main(["generate", "starte", *arguments]) == 2
    assert "'starter', the model in the package" in capsys.readouterr().err


def test_starter_folder_is_whole_and_small():
    facts = json.loads((pretrained.FOLDER / "config.json").read_text())
    weights = pretrained.FOLDER / "model.safetensors"
    assert weights.stat().st_size < 4.5e6
    of_its_codec = codec.load(facts["codec"]["source"]).identity
    assert codec.same_tokens(facts["codec"]["identity"], of_its_codec)
    assert "/" not in json.dumps(facts)  # no path of the machine that trained it
    assert {"README.md", "config.json", "model.safetensors", "sources.json"} == {
        path.name for path in pretrained.FOLDER.iterdir() if path.suffix != ".png"
    }


@torch.inference_mode()
def test_starter_knows_how_sound_goes_on():
    """Teacher-forced NLL of a sentence and a guitar it never heard: below chance throughout."""
    generator = AudioGenerator.load("starter")
    sums = np.zeros(8)
    assets = pretrained.FOLDER.parent
    for name in ("speech/ru-0012.ogg", "mini/sounds/guitar.ogg"):
        wave = torch.from_numpy(audio.read(assets / name)[: 4 * 24_000])
        codes = generator.codec.encode(wave)[None]
        frames = generator.frontend(generator.codec.decode(codes[0]))[None, :-1]
        hidden = generator.model.hidden(codes[:, :, :-1].transpose(1, 2), frames)
        losses = torch.nn.functional.cross_entropy(
            generator.model.head(hidden)[0], codes[0, 0, 1:], reduction="mean"
        )
        fine, _ = generator.model.fine.nll(hidden, codes[:, :, 1:])
        sums += np.array([losses.item(), *fine.mean((0, 2)).tolist()]) / 2
    assert sums[0] < 4 and sums[1] < 6 and sums.max() < 6.9, sums


def test_init_starter_begins_where_the_starter_is(tmp_path):
    """On data with its mel source; small types in the file, float32 in training."""
    from wgpt.data.pipeline import prepare

    (tmp_path / "audio").mkdir()
    for seed in range(4):
        audio.write(tmp_path / "audio" / f"{seed}.wav", synth.render_music(2.0, seed=seed))
    prepare(tmp_path / "audio", tmp_path / "data", valid_fraction=0.3,
            mel_sources=("wave", "decoded-8"), progress=False)  # fmt: skip
    settings = {"max_steps": 1, "batch_size": 2, "context_s": 1.0, "warmup_steps": 1,
                "sample_s": 0.0, "device": "cpu", "mel_source": "decoded-8"}  # fmt: skip
    train(tmp_path / "data", tmp_path / "run", init="starter", **settings)
    first = read_metrics(tmp_path / "run" / "metrics.csv")[0]
    assert float(first["nll_nats"]) < 4.5 and float(first["fine_nll_nats"]) < 6.9
    stored = safetensors.torch.load_file(pretrained.FOLDER / "model.safetensors")
    types = {value.dtype for value in stored.values() if value.dim() > 1}
    assert types == set(pretrained.STORED.values())
    trained = HybridModel.from_pretrained(tmp_path / "run" / "model")
    assert {value.dtype for value in trained.parameters()} == {torch.float32}
    assert InitialWeights("starter").preset == "voice-xs"


def test_pack_shrinks_a_run_and_keeps_its_model(tiny_run, tmp_path):
    assert pretrained.pack(tiny_run, tmp_path / "out") == tmp_path / "out" / "model.safetensors"
    whole = HybridModel.from_pretrained(tiny_run / "model")
    packed = HybridModel.from_pretrained(tmp_path / "out")
    for name, value in whole.state_dict().items():
        expected = value.half().float() if value.dim() > 1 else value
        assert torch.equal(packed.state_dict()[name], expected), name
    sizes = [(folder / "model.safetensors").stat().st_size
             for folder in (tmp_path / "out", tiny_run / "model")]  # fmt: skip
    assert sizes[0] < 0.53 * sizes[1]
    records = [ModelRecord.read(folder) for folder in (tmp_path / "out", tiny_run / "model")]
    assert [record.context_steps for record in records] == [38, 38]  # 0.5 s
    assert records[0].run is None and records[1].run.folder == tiny_run
    assert records[0].codec == records[1].codec and records[0].mel == records[1].mel
    assert len(AudioGenerator.load(tmp_path / "out").generate(None, 0.1)) == 8 * 320
    with pytest.raises(ConfigError, match="no such file"):
        pretrained.pack(tmp_path / "nothing", tmp_path / "no")


def test_model_folder_of_a_name_a_run_and_a_model(tiny_run, tmp_path):
    assert pretrained.model_folder("starter") == pretrained.FOLDER
    assert pretrained.model_folder(tiny_run) == tiny_run / "model"
    assert pretrained.model_folder(str(tiny_run / "model")) == tiny_run / "model"
    with pytest.raises(ConfigError, match=r"config\.json: no such file; RUN is a folder"):
        pretrained.model_folder(tmp_path / "nothing")


def test_a_model_is_opened_by_its_run_too(tiny_run):
    by_folder = HybridModel.from_pretrained(tiny_run / "model").state_dict()
    by_run = HybridModel.from_pretrained(tiny_run).state_dict()
    assert all(torch.equal(by_run[name], value) for name, value in by_folder.items())
    for name in ("starter", f"{tiny_run}@best"):  # of the commands, and of wgpt.load
        with pytest.raises(ConfigError, match=r"wgpt\.load\(\.\.\.\)\.model takes starter"):
            HybridModel.from_pretrained(name)


def test_model_record_says_what_the_starter_was_trained_on(tmp_path):
    record = ModelRecord.read(pretrained.FOLDER)
    assert (record.preset, record.mel_source, record.context_steps) == (
        "voice-xs", "decoded-8", 512,
    )  # fmt: skip
    HybridModel(presets.preset("gpt-xs")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: was not written by .* no 'mel'"):
        ModelRecord.read(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a model folder holds"):
        ModelRecord.read(tmp_path)
