"""Training under faults (harness.py), one of two ranks killed, and two runs in one folder."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.harness import DONE, FAULTS, REFUSED, plain_pictures, race, sweep, tree, undisturbed

from wgpt import commits
from wgpt.training import train

SETTINGS = {
    "max_steps": 3,
    "batch_size": 2,
    "context_s": 0.32,
    "warmup_steps": 2,
    "eval_every": 2,
    "eval_audio_s": 1.0,
    "save_every": 1,
    "keep_checkpoints": 1,
    "sample_every": 2,
    "sample_s": 0.1,
    "device": "cpu",
}
TINY = {"n_layers": 1, "ffn_dim": 64, "dropout": 0.1}


@pytest.fixture(scope="module")
def command(prepared):
    logging.disable(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        plain_pictures(patch)
        yield lambda out: train(prepared, out, "gpt-xs", resume=True, model=TINY, **SETTINGS)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    return undisturbed(command, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fault", FAULTS)
def test_train_is_resumed_to_the_same_folder(fault, command, whole, tmp_path):
    assert not sweep(fault, command, *whole, tmp_path, n_spread=1)


def test_two_trainings_in_one_folder_leave_one(command, whole, tmp_path):
    ends, found = race(command, tmp_path / "0")
    assert found == whole[0] and ends in ([DONE, DONE], [DONE, REFUSED])


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 3])  # of three, sums depend on their order
def test_a_killed_rank_ends_the_others_and_the_run_resumes(n_ranks, prepared, tmp_path):
    """Processes of torchrun; the one that keeps the files lives, another is killed."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}", "-m",
             "wgpt.train", f"--data={prepared}", "--preset=gpt-xs", "--n-layers=1", "--ffn-dim=64",
             "--resume", "--max-steps=60", "--save-every=1", "--sample-s=0", "--batch-size=6",
             "--context-s=0.32", "--eval-every=0", "--device=cpu"]  # fmt: skip

    def start(out):
        command = [sys.executable, *words, f"--out={out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd="/", env=environment, stderr=subprocess.PIPE)

    out, whole = tmp_path / "killed", tmp_path / "whole"
    struck, undisturbed = start(out), start(whole)
    deadline = time.monotonic() + 300
    while (commits.newest_step(out / "checkpoints") or 0) < 3 and time.monotonic() < deadline:
        assert struck.poll() is None, struck.communicate()[1]
        time.sleep(0.01)
    children = Path(f"/proc/{struck.pid}/task/{struck.pid}/children").read_text().split()
    ranks = {_rank(child): int(child) for child in children if _rank(child) is not None}
    os.kill(ranks["1"], signal.SIGKILL)
    assert struck.wait(timeout=120) != 0 and commits.newest_step(out / "checkpoints") < 60
    for process in (undisturbed, start(out)):
        assert process.wait(timeout=300) == 0, process.communicate()[1]
    assert commits.newest_step(out / "checkpoints") == 60
    assert tree(out) == tree(whole)


def _rank(process: str) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)
