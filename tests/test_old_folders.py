"""Data, run, model and codec folders that version 0.1.0 wrote (tests/fixtures/v0.1) still work."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import wgpt
from wgpt import codec, commits
from wgpt.data import Dataset
from wgpt.evaluation import evaluate
from wgpt.files import read_json
from wgpt.generation import Sampling
from wgpt.runs.metrics import read_metrics
from wgpt.training import train

FIXTURE = Path(__file__).parent / "fixtures" / "v0.1"


@pytest.fixture
def old(tmp_path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((FIXTURE / "expected.json").read_text())


def tone(hz: float, n_samples: int) -> torch.Tensor:
    return torch.sin(torch.arange(n_samples) * (2 * torch.pi * hz / 24_000)) * 0.3


def test_old_data_are_whole(old):
    dataset = Dataset(old / "data")
    dataset.verify()
    assert set(dataset.manifest["files"]) == {
        str(path.relative_to(old / "data")) for path in (old / "data").rglob("*.npy")
    }


def test_old_run_evaluates_to_the_same_figures(old, expected):
    rows = evaluate(old / "run", old / "data")["rows"]
    of_all = [row for row in rows if row["group"] == "all"]
    assert [row["model"] for row in of_all] == [row["model"] for row in expected["evaluate"]]
    for got, want in zip(of_all, expected["evaluate"], strict=True):
        assert got["n_tokens"] == want["n_tokens"]
        assert got["nll_nats"] == pytest.approx(want["nll_nats"], rel=1e-5)


@pytest.mark.parametrize("folder", ["run", "run/model"])
def test_old_model_generates_the_same_tokens(old, expected, folder):
    model = wgpt.load(old / folder)
    steps = model.steps(tone(220, 24_000), 5, Sampling(temperature=0))
    assert [step.tokens[0] for step in steps] == expected["most_likely_tokens_after_220_hz"]


def test_old_run_resumes_from_its_checkpoint(old):
    # Its two steps are done: what is resumed is the checkpoint itself, and nothing is repeated.
    before = read_metrics(old / "run" / "metrics.csv")
    assert train(old / "data", old / "run", resume=True)["steps"] == 2
    assert read_metrics(old / "run" / "metrics.csv") == before


def test_a_run_without_seals_and_committed_rows_resumes(tiny_run, prepared, tmp_path):
    """As it was between 0.1.0 and the sealed folders: model folders in checkpoints, no more."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    facts = read_json(run / "config.json")
    del facts["data"]["manifest_sha256"]
    (run / "config.json").write_text(json.dumps(facts))
    for path in commits.list_steps(run / "checkpoints"):
        (path / "metrics.csv").unlink()
        state = read_json(path / "state.json")
        sums = {
            name: state["sha256"][name] for name in ("model.safetensors", "optimizer.safetensors")
        }
        state = {"step": state["step"], "progress": state["progress"], "sha256": sums}
        (path / "state.json").write_text(json.dumps(state))
    before = read_metrics(run / "metrics.csv")
    assert train(None, run, resume=True, max_steps=4)["steps"] == 4
    assert read_metrics(run / "metrics.csv")[: len(before)] == before


def test_old_codec_gives_the_same_tokens(old, expected):
    loaded = codec.load(old / "codec")
    assert loaded.encode(tone(440, 3200)).tolist() == expected["codec_codes_of_440_hz"]
    assert loaded.identity["sha256"] == expected["codec_identity"]["sha256"]
