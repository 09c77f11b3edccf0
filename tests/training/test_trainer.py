"""Training: it learns, resumes bit for bit after a kill or Ctrl-C, and stops with a reason."""

import csv
import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from wgpt import commits
from wgpt.config import TrainConfig
from wgpt.data.dataset import Dataset
from wgpt.errors import CheckpointError, TrainError
from wgpt.files import read_json
from wgpt.generation import AudioGenerator
from wgpt.model import HybridModel
from wgpt.runs.metrics import METRICS, read_metrics
from wgpt.runs.run import Run
from wgpt.training import train
from wgpt.training.optimizer import learning_rate

SETTINGS = {
    "max_steps": 12,
    "batch_size": 2,
    "context_s": 0.64,
    "warmup_steps": 2,
    "eval_every": 4,
    "save_every": 4,
    "eval_audio_s": 4.0,
    "sample_s": 0.0,
    "device": "cpu",
}
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
LONG = 80
TINY = {"n_layers": 1, "n_mel_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64, "dropout": 0.1}


def tree(folder):
    """Every file that a resumed run must repeat, as bytes."""
    kept = [p for p in folder.rglob("*") if p.is_file() and "plots" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("train") / "whole"
    train(prepared, out, "hybrid-xs", model=TINY, **SETTINGS)
    return out


def start(prepared, out, *extra):
    command = [sys.executable, "-m", "wgpt.train", f"--data={prepared}", f"--out={out}"]
    shape = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    return subprocess.Popen(
        [*command, "--preset=hybrid-xs", *FLAGS, *shape, *extra],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def test_train_leaves_a_whole_run_folder(whole):
    assert {p.name for p in whole.iterdir()} == {
        "checkpoints", "config.json", "metrics.csv", "model", "plots",
    }  # fmt: skip
    rows = read_metrics(whole / "metrics.csv")
    assert [int(r["step"]) for r in rows if r["split"] == "train"] == list(range(1, 13))
    assert [int(r["step"]) for r in rows if r["split"] == "valid"] == [0, 4, 8, 12]
    assert (whole / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in commits.list_steps(whole / "checkpoints")] == [
        "step-00000008", "step-00000012",
    ]  # fmt: skip
    for path in whole.rglob("*"):
        assert path.suffix not in (".pt", ".pth", ".pkl", ".bin"), path


def test_speed_and_epoch_count_real_tokens(prepared, tmp_path, monkeypatch):
    """Two epochs and a window: padding ends each epoch and is not counted."""
    monkeypatch.setattr(time, "monotonic", iter(range(10**6)).__next__)
    split = Dataset(prepared).split("train")
    context = split.n_steps // 2 - 3  # three windows, the last of 6 or 7 tokens
    settings = {**SETTINGS, "max_steps": 7, "batch_size": 1, "context_s": context / 75}
    settings |= {"eval_every": 0, "eval_audio_s": 1.0}
    summary = train(prepared, tmp_path / "run", "gpt-xs", model=TINY, **settings)
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.csv") if r["split"] == "train"]
    assert [float(row["epoch"]) for row in rows] == [n / 3 for n in range(1, 8)]
    n_tokens = round(summary["tokens_per_s"] * summary["seconds"])
    assert n_tokens in (2 * split.n_steps + context, 2 * split.n_steps + split.n_steps % context)


def test_train_learns(prepared, tmp_path):
    settings = {**SETTINGS, "max_steps": 40, "lr": 3e-3, "eval_every": 0, "batch_size": 8}
    train(prepared, tmp_path / "run", "gpt-xs", model={"n_layers": 1}, **settings)
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.csv") if r["split"] == "train"]
    first, last = float(rows[0]["nll_nats"]), np.mean([float(r["nll_nats"]) for r in rows[-5:]])
    assert last < first - 0.5


@pytest.fixture(scope="module")
def long(prepared, tmp_path_factory):
    """An uninterrupted run, long enough to be interrupted on a fast machine."""
    out = tmp_path_factory.mktemp("train") / "long"
    train(prepared, out, "hybrid-xs", model=TINY, **{**SETTINGS, "max_steps": LONG})
    return out


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


def test_train_killed_and_resumed_is_the_same_to_the_last_bit(prepared, long, tmp_path):
    out = tmp_path / "killed"
    process = start(prepared, out, f"--max-steps={LONG}")
    wait_for(process, (out / "checkpoints" / "step-00000004" / "state.json").exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train(None, out, resume=True)
    expected, got = tree(long), tree(out)
    assert expected.keys() == got.keys()
    for name in expected:
        if name != "config.json":
            assert expected[name] == got[name], name


def test_train_ctrl_c_saves_and_says_how_to_go_on(prepared, long, tmp_path):
    out = tmp_path / "interrupted"
    process = start(prepared, out, f"--max-steps={LONG}", "--save-every=0")
    # Validations are flushed, so the second row says that step 4 is done.
    wait_for(process, lambda: len(read_metrics(out / "metrics.csv")) >= 2)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 1, words
    assert f"wgpt train --out {out} --resume" in words
    train(None, out, resume=True)
    assert (out / "metrics.csv").read_bytes() == (long / "metrics.csv").read_bytes()
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (long / name).read_bytes()


def test_train_stops_at_a_loss_that_is_not_finite(prepared, tmp_path, monkeypatch):
    hidden = HybridModel.hidden

    def broken(self, *args, **options):
        return hidden(self, *args, **options) * (torch.nan if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(HybridModel, "hidden", broken)
    with pytest.raises(TrainError, match=r"step 1: loss nan.*\(clip, first step\) \[\(\d+, \d+\)"):
        train(prepared, tmp_path / "run", "gpt-xs", **SETTINGS)


def test_train_finds_a_flipped_bit(whole, tmp_path):
    import shutil

    out = tmp_path / "flipped"
    shutil.copytree(whole, out)
    path = out / "checkpoints" / "step-00000012" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        train(None, out, resume=True)
    assert str(path) in str(error.value)
    assert "step-00000008" in str(error.value)


def test_train_mel_source_must_be_prepared(prepared, tmp_path):
    from wgpt.data.dataset import DataError

    with pytest.raises(DataError, match=r"decoded-5.*--mel-sources decoded-5"):
        train(prepared, tmp_path / "run", "hybrid-xs", mel_source="decoded-5", **SETTINGS)


def test_train_learning_rate_warms_up_and_decays():
    settings = TrainConfig(max_steps=110, warmup_steps=10, lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, settings) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_train_metrics_row_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    header = ",".join(METRICS)
    path.write_text(f"{header}\n1,0.1,train,5.0,0.1,0.1,1.0,\n2,0.2,tr")
    assert [row["step"] for row in read_metrics(path)] == ["1"]


def test_run_checks_codec_of_other_data(prepared, whole, tmp_path):
    import shutil

    from wgpt.data.dataset import DataError

    other = tmp_path / "data"
    shutil.copytree(prepared, other)
    manifest = read_json(other / "manifest.json")
    manifest["codec"]["identity"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="prepare it with the same codec"):
        Run.open(whole).dataset(other)
    manifest = read_json(prepared / "manifest.json")
    manifest["mel"]["window_samples"] = 600
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="prepare it with the same settings"):
        Run.open(whole).dataset(other)
    assert Dataset(prepared).codec_identity == Run.open(whole).dataset().codec_identity


def test_train_finds_damaged_data(prepared, tmp_path):
    import shutil

    from wgpt.data.dataset import DataError

    other = tmp_path / "data"
    shutil.copytree(prepared, other)
    path = other / "train" / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokens\.npy: must have sha256"):
        train(other, tmp_path / "run", "gpt-xs", **SETTINGS)


def test_metrics_are_csv_that_others_can_read(whole):
    with open(whole / "metrics.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header == ["step", "epoch", "split", "nll_nats", "accuracy", "lr", "grad_norm",
                      "fine_nll_nats"]  # fmt: skip


def test_train_and_generate_on_a_gpu_without_kernels(
    whole, prepared, tmp_path, gpu_without_kernels, monkeypatch
):
    """Plain torch learns what the kernels learn; the ops' own kernels are not called."""
    for name in ("flash_attention", "mel_embed", "token_concat"):
        monkeypatch.setattr(sys.modules[f"wgpt.ops.{name}"], f"_{name}", None)
    out = tmp_path / "run"
    train(prepared, out, "hybrid-xs", model=TINY, **SETTINGS)
    plain, kernels = (
        [float(row["nll_nats"]) for row in read_metrics(folder / "metrics.csv")]
        for folder in (out, whole)
    )
    np.testing.assert_allclose(plain, kernels, rtol=1e-4)
    wave = AudioGenerator.load(out).generate(None, 0.2, seed=1)
    assert np.isfinite(wave).all()
    assert gpu_without_kernels.n_warnings == 1
