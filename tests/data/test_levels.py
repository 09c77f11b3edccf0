"""Mel slices in 8 and 5 bits: the nearest level, whoever prepared it, and all else as with 16."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fake_codec import FakeCodec, make_audio, tree

from wgpt.cli import main
from wgpt.config import MelConfig
from wgpt.data import Dataset, merge, prepare
from wgpt.data.dataset import SHUFFLED
from wgpt.data.levels import MelLevels
from wgpt.errors import ConfigError, DataError
from wgpt.evaluation import evaluate
from wgpt.files import read_json, write_sealed
from wgpt.training import train

OPTIONS = {"codec": FakeCodec(), "split_by": "group", "valid_fraction": 0.3}


@pytest.fixture(scope="module")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_audio(tmp_path_factory.mktemp("audio"), n_files=8)


@pytest.fixture(scope="module")
def data(audio_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same recordings with 16, 8 and 5 bits."""
    folder = tmp_path_factory.mktemp("data")
    for bits in (16, 8, 5):
        prepare(audio_dir, folder / str(bits), mel_bits=bits, **OPTIONS)
    return {bits: folder / str(bits) for bits in (16, 8, 5)}


def test_codes_are_those_computed_by_hand() -> None:
    five, eight = MelLevels(5, -11.5, 0.5), MelLevels(8, -11.5, 0.5)
    frames = np.array([[-11.6, -11.1, 0.0, 99.0, -11.5, -11.5, -11.5, -3.5]])
    codes = [0, 1, 23, 31, 0, 0, 0, 16]  # the nearest
    levels = [-11.5, -11.0, 0.0, 4.0, -11.5, -11.5, -11.5, -3.5]
    assert five.encode(frames).tolist() == [[0x10, 0xF7, 0x00, 0x00, 0b10001100]]
    assert five.decode(five.encode(frames)).tolist() == [levels]
    assert five.row_bytes(8) == 5
    assert eight.encode(frames).tolist() == [[0, 1, 23, 221, *codes[4:]]]
    assert eight.decode(eight.encode(frames)).tolist() == [[*levels[:3], 99.0, *levels[4:]]]
    every = (five.low + five.step * np.arange(32)).reshape(2, 16)[:, ::-1]
    assert np.array_equal(five.decode(five.encode(every)), every.astype(np.float16))


@pytest.mark.parametrize("bits", [8, 5])
def test_levels_reach_from_silence_to_a_full_scale_sine(bits: int) -> None:
    from wgpt.audio.mel import MelFrontend

    levels, frontend = MelLevels.of(MelConfig(), bits), MelFrontend(MelConfig())
    assert levels is not None
    times = torch.arange(24_000) / 24_000
    loudest = max(
        float(frontend(torch.sin(2 * torch.pi * hz * times)).max()) for hz in range(100, 800, 13)
    )
    top = levels.low + levels.step * (2**bits - 1)
    assert loudest < top < loudest + 1
    silence = frontend.silence.numpy()[None]
    assert not levels.encode(silence).any()
    assert np.array_equal(levels.decode(levels.encode(silence)), silence.astype(np.float16))


@pytest.mark.parametrize("bits", [8, 5])
def test_frames_are_the_nearest_levels_and_all_else_is_equal(data, bits: int) -> None:
    coded, full = Dataset(data[bits]), Dataset(data[16])
    coded.verify()
    levels = coded.mel_levels
    assert levels is not None and full.mel_levels is None
    assert "mel_levels" not in full.manifest["settings"]  # as earlier versions wrote it
    for name in ("train", "valid"):
        one, other = coded.split(name), full.split(name)
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.offsets, other.offsets)
        for source in (*coded.mel_sources, SHUFFLED):
            for clip in range(one.n_clips):
                frames, true = one.clip(clip, source)[1], other.clip(clip, source)[1]
                assert (frames - true).abs().max() <= levels.step / 2 + 0.01  # of float16
        path = Path(name) / "mel" / "wave.npy"
        sizes = [np.load(data[b] / path).nbytes for b in (bits, 16)]
        assert sizes[0] * 16 == sizes[1] * bits
    mean, inv_std = coded.normalisation("wave")
    frames = torch.from_numpy(np.asarray(coded.split("train").mel["wave"], dtype=np.float64))
    torch.testing.assert_close(mean.double(), frames.mean(0), rtol=1e-5, atol=1e-5)
    std = frames.std(0, correction=0).clamp_min(0.1)
    torch.testing.assert_close(inv_std.double(), 1 / std, rtol=1e-5, atol=1e-5)


def test_merged_parts_of_5_bits_have_the_bytes_of_one_run(audio_dir, data, tmp_path) -> None:
    parts = [tmp_path / f"part-{i}" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        prepare(audio_dir, part, shard=(i, 2), mel_bits=5, **OPTIONS)
    merge(parts, tmp_path / "merged", codec=FakeCodec())
    assert tree(tmp_path / "merged") == tree(data[5])
    prepare(audio_dir, tmp_path / "other", shard=(2, 2), **OPTIONS)
    for pair in ([parts[0], tmp_path / "other"], [tmp_path / "other", parts[0]]):
        with pytest.raises(DataError, match=r"with other settings than .*: mel_levels"):
            merge(pair, tmp_path / "no", codec=FakeCodec())


def test_adding_a_recording_keeps_the_codes(audio_dir, tmp_path, monkeypatch) -> None:
    out, more = tmp_path / "data", tmp_path / "new.wav"
    prepare(audio_dir, out, mel_bits=5, **OPTIONS)
    wave = np.random.default_rng(1).standard_normal(9600) * 0.1
    soundfile.write(more, wave, 24_000)
    encoded = []
    encode = FakeCodec.encode
    monkeypatch.setattr(
        FakeCodec, "encode", lambda self, wave: encoded.append(1) or encode(self, wave)
    )
    prepare([audio_dir, more], out, mel_bits=5, **OPTIONS)
    assert len(encoded) == 1
    prepare([audio_dir, more], tmp_path / "fresh", mel_bits=5, **OPTIONS)
    found = []
    for folder in (out, tmp_path / "fresh"):  # the split of a file may differ, see keep_splits
        splits = [Dataset(folder).split(name) for name in ("train", "valid")]
        frames = [s.clip(i, "wave")[1] for s in splits for i in range(s.n_clips)]
        found.append({one.numpy().tobytes() for one in frames})
    assert found[0] == found[1] and len(found[0]) == 9


def test_other_bits_are_refused_with_a_command_that_works(audio_dir, tmp_path, capsys) -> None:
    out = tmp_path / "data"
    flags = ["--codec", "mini", "--mel-sources", "wave", "--quiet"]
    base = ["prepare", str(audio_dir), "--out", str(out), *flags]
    assert main([*base, "--mel-bits", "8"]) == 0
    before = tree(out)
    for bits in ("16", "5"):
        assert main([*base, "--mel-bits", bits]) == 1
        message = capsys.readouterr().err
        assert "other settings (mel_levels)" in message and "--mel-bits 8" in message
    command = message[message.rindex("wgpt prepare ") :]
    assert main([*shlex.split(command)[1:], "--quiet"]) == 0
    assert tree(out) == before


def test_settings_that_cannot_work_are_refused(audio_dir, data, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"mel_bits must be one of \(16, 8, 5\), got 4"):
        prepare(audio_dir, tmp_path / "data", mel_bits=4, codec=FakeCodec())
    with pytest.raises(ConfigError, match="n_mels must be divisible by 8 with mel_bits 5, got 60"):
        MelLevels.of(MelConfig(n_mels=60), 5)
    copy = tmp_path / "copy"
    copy.mkdir()
    manifest = read_json(data[5] / "manifest.json")
    for change in ({"bits": 4}, {"step": 0.0}, {"low": "deep"}, {"high": 1.0}):
        levels = {"bits": 5, "low": -11.5, "step": 1.0, **change}
        settings = {**manifest["settings"], "mel_levels": levels}
        write_sealed(copy / "manifest.json", {**manifest, "settings": settings})
        with pytest.raises(DataError, match="must follow the format, got a bad entry"):
            Dataset(copy)


@pytest.mark.slow
def test_a_model_trains_on_5_bits_and_is_evaluated_on_16(audio_dir, tmp_path) -> None:
    data = {bits: tmp_path / str(bits) for bits in (5, 16)}
    for bits, folder in data.items():
        prepare(audio_dir, folder, mel_bits=bits, mel_sources=("wave",))
    model = {"n_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64}
    settings = {"max_steps": 2, "batch_size": 2, "context_s": 1.0, "eval_every": 0}
    train(data[5], tmp_path / "run", "hybrid-xs", model=model, **settings)
    nll = {
        bits: [
            row["nll_nats"]
            for row in evaluate(tmp_path / "run", folder)["rows"]
            if row["group"] == "all" and "hybrid" in row["model"]
        ]
        for bits, folder in data.items()
    }
    assert nll[5] == pytest.approx(nll[16], abs=0.05) and nll[5] != nll[16]
