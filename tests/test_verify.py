"""Flipped bytes and hostile files: named, never a traceback, never silently another model."""

import json
import random
import shutil
import time

import pytest
import torch

from wgpt import codec, verify
from wgpt.cli import main
from wgpt.codec.training import run as codec_run
from wgpt.codec.weights import ASSETS, PACKAGED
from wgpt.errors import CheckpointError, ConfigError, WgptError
from wgpt.files import read_json, sha256_of, write_sealed
from wgpt.model import HybridModel
from wgpt.runs import pretrained
from wgpt.runs.metrics import read_metrics
from wgpt.runs.model_record import ModelRecord

UNSEALED = {".png", ".md", ".wav", ".html"}  # pictures and words, made from what is sealed
FLIPS_PER_KIND = 40


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory):
    """A codec as `wgpt codec-train` exports it: the weights of mini, under a seal."""
    out = tmp_path_factory.mktemp("codec")
    for name in PACKAGED["mini"]:
        shutil.copy(ASSETS / "mini" / name, out)
    facts = read_json(out / "config.json")
    write_sealed(out / "config.json", {**facts, "sha256": sha256_of(out / "model.safetensors")})
    return out


def is_whole(folder):
    return not any(problem for _, problem in verify.findings(str(folder)))


@pytest.mark.parametrize("kind", ["data", "run", "model", "codec", "small JSON files of a run"])
def test_every_flipped_byte_is_found(kind, prepared, tiny_run, codec_folder, tmp_path):
    """200 flips in all, spread evenly over the files of each kind of folder."""
    source = {"data": prepared, "model": tiny_run / "model", "codec": codec_folder}
    folder = shutil.copytree(source.get(kind, tiny_run), tmp_path / "copy")
    assert is_whole(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in UNSEALED)
    if kind.startswith("small"):
        files = [p for p in files if p.suffix == ".json"]
    draw = random.Random(kind)
    for i in range(FLIPS_PER_KIND):
        path = files[i % len(files)]
        before = path.read_bytes()
        at, bit = draw.randrange(len(before)), 1 << draw.randrange(8)
        path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
        try:
            assert not is_whole(folder), f"{path} at {at} bit {bit}"
        except ConfigError:  # no longer a folder of ours
            pass
        finally:
            path.write_bytes(before)
    assert is_whole(folder)


@pytest.mark.parametrize("change", [("train", "tr\xe9in"), ("0.", "O.")])
def test_damaged_metrics_are_one_sentence(change, tiny_run, tmp_path):
    content = (tiny_run / "metrics.csv").read_bytes()
    path = tmp_path / "metrics.csv"
    path.write_bytes(content.replace(change[0].encode("latin-1"), change[1].encode("latin-1")))
    with pytest.raises(CheckpointError, match=r"must be a table of step.*--resume restores it"):
        read_metrics(path)


def test_every_byte_of_a_seal_is_checked(tmp_path):
    path = tmp_path / "x.json"
    write_sealed(path, {"format": "x", "lr": 0.001, "words": ["a"]})
    whole = path.read_bytes()
    value = read_json(path)
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            try:
                got = read_json(path)
            except ConfigError:
                continue
            assert got == value, (at, bit)  # white space


NUMBERS = [-1, 0, 10**7, 10**30, 1e308, float("inf"), float("nan"), True, "7", None, [1], {}]
FIELDS = ["token_dim", "n_layers", "window_steps", "rope_base", "latent_steps"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_hostile_models_are_refused_before_they_are_built(field, value, tiny_run, tmp_path):
    """60 configurations of an unsealed folder: a clear error or the same shape, within seconds."""
    folder = shutil.copytree(tiny_run / "model", tmp_path / "model")
    facts = read_json(folder / "config.json")
    facts["model"][field] = value
    (folder / "config.json").write_text(json.dumps(facts))
    began = time.monotonic()
    try:
        HybridModel.from_pretrained(folder)
    except WgptError as error:
        assert "config.json" in str(error) or "model.safetensors" in str(error)
    else:
        assert field in ("window_steps", "latent_steps") and value == 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mel_source": "non sense"}, "mel_source"),
        ({"mel_source": 7}, "mel_source"),
        ({"mel": 7}, "JSON object"),
        ({"codec": 7}, "no "),
        ({"codec": {"source": 7, "identity": {"sha256": "0"}}}, "words"),
        ({"preset": ["x"]}, "words"),
        ({"context_steps": 10**12}, "context_steps"),
    ],
)
def test_hostile_facts_are_named(change, says, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run / "model", tmp_path / "model")
    facts = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(ConfigError, match=says):
        ModelRecord.read(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "JSON object"),
        ('{"a":' * 100_000, "JSON object"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": 1e999}', "number 1e999"),
        ('{"a": NaN}', "number NaN"),
        ("[]", "a list"),
        (b'{"a": "\xff"}', "utf-8"),
    ],
    ids=range(8),
)
def test_json_that_is_no_json_of_ours_is_refused(content, says, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says):
        read_json(path)


def test_a_fifo_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="no regular file"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "change",
    [
        {"upsampling_ratios": [8, "x"]},
        {"upsampling_ratios": [10**9]},
        {"hidden_size": 10**12},
        {"target_bandwidths": [-1.0]},
        {"num_filters": -4},
    ],
    ids=str,
)
def test_hostile_codecs_are_refused(change, tmp_path):
    folder = shutil.copytree(ASSETS / "mini", tmp_path / "codec")
    facts = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(codec.CodecError):
        codec.load(folder)


def test_packaged_files_have_their_hashes_in_code(tmp_path, monkeypatch, capsys):
    for name in PACKAGED:
        assert main(["verify", name]) == 0
    assert main(["verify", pretrained.NAME]) == 0
    monkeypatch.setattr("wgpt.codec.weights.ASSETS", tmp_path)
    shutil.copytree(ASSETS / "mini", tmp_path / "mini")
    weights = tmp_path / "mini" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert main(["verify", "mini"]) == 1
    assert "must have sha256" in capsys.readouterr().out


def test_codec_train_exports_a_sealed_folder(tmp_path, codec_folder, monkeypatch):
    class Trained:
        architecture = codec.load("mini")._weights.architecture

        def weights(self):
            return codec.load("mini")._weights.tensors

    codec_run.export(Trained(), tmp_path / "out")
    assert is_whole(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("0.75", "1.5", 1))
    assert not is_whole(tmp_path / "out")
    assert torch.is_tensor(codec.load(codec_folder).codebooks())


def test_verify_prints_what_is_whole(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    assert main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("whole") for line in lines) and len(lines) >= 4
    (folder / "metrics.csv").write_text("x")
    assert main(["verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["whole"]
    assert [p["part"] for p in report["parts"] if p["problem"]] == [f"rows {folder}/metrics.csv"]
    with pytest.raises(ConfigError, match="holds no prepared data"):
        list(verify.findings(str(tmp_path)))
