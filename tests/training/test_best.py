"""The best checkpoint stays and speaks, training ends in time, and a kill loses neither."""

import json
import shutil
import threading

import numpy as np
import pytest

from wgpt import commits
from wgpt.errors import ConfigError
from wgpt.evaluation.scores import to_score
from wgpt.model import HybridModel
from wgpt.runs import checkpoint
from wgpt.runs.metrics import read_metrics
from wgpt.runs.pretrained import model_folder
from wgpt.training import record, train
from wgpt.training.progress import Progress
from wgpt.training.trainer import Trainer

SETTINGS = {
    "max_steps": 24,
    "batch_size": 2,
    "context_s": 0.32,
    "warmup_steps": 2,
    "eval_every": 2,
    "save_every": 3,
    "sample_s": 0.0,
    "patience": 3,
    "device": "cpu",
}
TINY = {"n_layers": 1, "ffn_dim": 64, "dropout": 0.1}
#          step 0  2    4    6    8    10   12   14
VALIDATION = [7.0, 5.0, 4.0, 4.5, 3.5, 3.6, 3.5, 4.0, 1.0]


class Killed(BaseException):
    """What a kill looks like from inside: nothing more is written."""


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """Validations give VALIDATION, by the number of training rows written before them."""

    def scores(name, model, split, **options):
        path = scores.run / "metrics.csv"
        n_done = sum(row["split"] == "train" for row in read_metrics(path))
        sums = np.ones((3, split.n_clips))
        sums[0] = VALIDATION[n_done // SETTINGS["eval_every"]]
        return [to_score(name, sums, split)]

    original = record.RunRecord.validate

    def validate(self, step, epoch):
        scores.run = self.run.folder
        self.metrics.flush()
        return original(self, step, epoch)

    monkeypatch.setattr(record, "codebook_scores", scores)
    monkeypatch.setattr(record.RunRecord, "validate", validate)


def start(prepared, out, **changes):
    return train(prepared, out, "gpt-xs", model=TINY, **{**SETTINGS, **changes})


def tree(folder):
    """Every file that a resumed run must repeat, as bytes."""
    kept = [p for p in folder.rglob("*") if p.is_file() and "plots" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def kill_at(monkeypatch, owner, name, n_calls):
    """From its n-th call on, owner.name kills the run instead."""
    whole, calls = getattr(owner, name), []

    def fatal(*args, **options):
        calls.append(name)
        if len(calls) >= n_calls:
            raise Killed
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, fatal)


@pytest.fixture
def whole(prepared, tmp_path, scripted):
    out = tmp_path / "whole"
    summary = start(prepared, out)
    return out, summary


def test_training_ends_after_patience_and_the_best_speaks(whole):
    out, summary = whole
    assert (summary["steps"], summary["ended"], summary["best_step"]) == (14, "patience", 8)
    assert summary["best"]["nll_nats"] == 3.5 and summary["valid"]["nll_nats"] == 4.0
    kept = [p.name for p in commits.list_steps(out / "checkpoints")]
    assert kept == ["step-00000008", "step-00000012", "step-00000014"]
    facts = json.loads((out / "model" / "config.json").read_text())
    assert facts["step"] == 8
    best = out / "checkpoints" / "step-00000008" / "model.safetensors"
    assert (out / "model" / "model.safetensors").read_bytes() == best.read_bytes()
    card = (out / "model" / "README.md").read_text()
    assert "Step 8 of 24" in card and "nll_nats 3.5000" in card


def test_patience_zero_trains_to_the_end(prepared, tmp_path):
    summary = start(prepared, tmp_path / "run", patience=0, max_steps=16)
    assert (summary["steps"], summary["ended"], summary["best_step"]) == (16, "max_steps", 16)


@pytest.mark.parametrize(
    ("owner", "name", "n_calls"),
    [
        (Trainer, "_step", 4),  # the best so far, 4, is still to come
        (Trainer, "_step", 12),  # after the best: what was best, and for how long, is remembered
        (checkpoint, "copy_model", 5),  # between the checkpoint and RUN/model
        (checkpoint, "commit", 7),  # between a validation and the checkpoint
        (record.RunRecord, "validate", 1),  # before the first checkpoint
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_killed_run_ends_with_the_same_bits(
    prepared, tmp_path, monkeypatch, whole, owner, name, n_calls
):
    expected, out = tree(whole[0]), tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, owner, name, n_calls)
        start(prepared, out)
    # What a real kill may leave of files and folders that were being written.
    for name in ("model/.config.json.1.tmp", ".metrics.csv.1.tmp", "checkpoints/.step-1.1/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
    summary = train(None, out, resume=True)
    assert summary["steps"] == 14
    got = tree(out)
    assert expected.keys() == got.keys()
    for path in expected:
        assert expected[path] == got[path] or path == "config.json", path
    # There is nothing left to do, and doing it changes nothing.
    assert train(None, out, resume=True)["steps"] == 14
    assert tree(out) == got


def test_any_kept_checkpoint_speaks(whole, tmp_path):
    out, _ = whole
    assert model_folder(out) == model_folder(f"{out}@best") == out / "model"
    assert model_folder(f"{out}@step-12") == out / "checkpoints" / "step-00000012"
    assert model_folder(f"{out}@newest") == out / "checkpoints" / "step-00000014"
    HybridModel.from_pretrained(model_folder(f"{out}@newest"))
    named = shutil.copytree(out, tmp_path / "a@best")  # a folder's own name comes first
    assert model_folder(named) == named / "model"
    for which in ("step-10", "worst", ""):
        with pytest.raises(ConfigError, match="step-8, step-12, step-14"):
            model_folder(f"{out}@{which}")
    with pytest.raises(ConfigError, match="no such file"):
        model_folder(f"{tmp_path / 'none'}@best")


def test_without_validation_data_the_newest_speaks(prepared, tmp_path, monkeypatch):
    def empty(self, name):
        split = split_of(self, name)
        if name == "valid":
            split.offsets = split.offsets[:1]
        return split

    split_of = record.Dataset.split
    monkeypatch.setattr(record.Dataset, "split", empty)
    out = tmp_path / "other"
    summary = start(prepared, out, max_steps=3)
    assert (summary["best_step"], summary["best"]) == (3, {})
    assert json.loads((out / "model" / "config.json").read_text())["step"] == 3


def test_train_runs_outside_the_main_thread(prepared, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(start(prepared, tmp_path / "run", max_steps=2))
    )
    thread.start()
    thread.join()
    assert found[0]["steps"] == 2


def test_progress_by_hand():
    progress = Progress()
    better = [progress.add_validation(i, {"nll_nats": x}) for i, x in enumerate([3, 2, 2, 4])]
    assert better == [True, True, False, False]
    assert (progress.best_step, progress.n_worse) == (1, 2)
    assert progress.is_exhausted(2) and not progress.is_exhausted(3)
    assert not progress.is_exhausted(0)
    assert not Progress().add_validation(0, {"nll_nats": float("nan")})
