"""Several processes of torchrun train as one: the same losses, and one's end is everyone's."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
import torch

from wgpt.errors import ConfigError
from wgpt.runs.metrics import read_metrics
from wgpt.runs.run import Run
from wgpt.training import distributed, train
from wgpt.training.distributed import ProcessGroup

SETTINGS = {
    "max_steps": 6,
    "batch_size": 4,
    "context_s": 0.64,
    "warmup_steps": 2,
    "eval_every": 3,
    "save_every": 3,
    "eval_audio_s": 4.0,
    "sample_s": 0.0,
    "mel_noise": 0.2,
    "mel_drop": 0.2,
    "device": "cpu",
}
SHAPE = {"n_layers": 1, "n_mel_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64, "n_fine": 2}

# What a rank does at step 5, with its faults named in the environment.
PROGRAM = """
import os, signal, sys, time
from wgpt.cli import main
from wgpt.errors import TrainError
from wgpt.training.step import TrainingStep

rank, fault, whole = os.environ["RANK"], os.environ.get("FAULT", ""), TrainingStep.__call__

def faulty(self, step, batch):
    if step == 5 and rank == "1" and fault == "error":
        raise TrainError("step 5: planted")
    if step == 5 and rank == "1" and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 5 and rank == "0" and fault == "slow":
        time.sleep(25)
    return whole(self, step, batch)

TrainingStep.__call__ = faulty
sys.exit(main(["train", *sys.argv[1:]]))
"""


def flags(values):
    names = {"n_fine": "fine_codebooks"}
    return [f"--{names.get(k, k).replace('_', '-')}={v}" for k, v in values.items()]


def torchrun(folder, n, *arguments, launcher=("--standalone",), prefix=(), **environment):
    """Starts n processes; their stdout and stderr are merged."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", *launcher,
         f"--nproc-per-node={n}", str(program), *map(str, arguments)],
        cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, code=0):
    said, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == (code == 0), said
    return said


def begin(prepared, out):
    """Arguments of a new run."""
    return [f"--data={prepared}", f"--out={out}", "--preset=hybrid-xs", *flags(SETTINGS | SHAPE)]


def losses(run):
    return [
        (float(row["nll_nats"]), float(row["fine_nll_nats"]), float(row["grad_norm"]))
        for row in read_metrics(run / "metrics.csv")
        if row["split"] == "train"
    ]


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(prepared, out, "hybrid-xs", model=SHAPE, **SETTINGS)
    return out


def test_two_processes_equal_one(prepared, alone, tmp_path):
    """Halves of the same batches, each in two parts: the same losses and gradients to rounding."""
    out = tmp_path / "run"
    finish(torchrun(tmp_path, 2, *begin(prepared, out), "--accumulate=2"))
    assert len(losses(out)) == 6
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)


def test_an_error_in_one_process_ends_all_with_its_message(prepared, tmp_path):
    out = tmp_path / "run"
    process = torchrun(tmp_path, 2, *begin(prepared, out), FAULT="error")
    said = finish(process, code=1)
    assert re.search(r"^wgpt train: step 5: planted.*--resume", said, re.M)  # the process itself
    assert re.search(r"^wgpt train: process 1: step 5: planted.*--resume", said, re.M)
    assert "Warning" not in said
    assert Run.open(out).checkpoints.joinpath("step-00000003").is_dir()


@pytest.mark.slow
def test_four_processes_equal_one(prepared, alone, tmp_path):
    out = tmp_path / "run"
    finish(torchrun(tmp_path, 4, *begin(prepared, out)))
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_another_number_resumes(prepared, alone, tmp_path):
    out = tmp_path / "run"
    said = finish(torchrun(tmp_path, 2, *begin(prepared, out), FAULT="kill"), code=1)
    assert re.search(r"another process ended without a word.*--resume", said)
    finish(torchrun(tmp_path, 4, f"--out={out}", "--resume"))
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)


@pytest.mark.slow
def test_the_wait_for_others_has_an_end_that_is_named(prepared, tmp_path):
    out = tmp_path / "run"
    began = time.monotonic()
    said = finish(
        torchrun(tmp_path, 2, *begin(prepared, out), FAULT="slow", WGPT_TIMEOUT_S="5"), code=1
    )
    assert "process 1 waited 5 s for the others" in said
    assert "WGPT_TIMEOUT_S=SECONDS lets it wait longer" in said
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e12"])
def test_timeout_must_be_seconds(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WGPT_TIMEOUT_S", given)
    with pytest.raises(ConfigError, match=f"WGPT_TIMEOUT_S must be seconds .* got '{given}'"):
        ProcessGroup.join("cpu")


class Resolved(Exception):
    pass


@pytest.fixture
def two_gpus(monkeypatch):
    """Two processes of torchrun on a machine with two GPUs; what is set before one is used."""
    chosen = []

    def resolve(device):
        raise Resolved

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "resolve_device", resolve)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return chosen


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_process_takes_its_own_gpu_before_it_touches_one(device, two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Resolved):
        ProcessGroup.join(device)
    assert two_gpus == [1]


def test_more_processes_than_gpus_are_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"has 2; --nproc-per-node=2, or --device cpu"):
        ProcessGroup.join("auto")


def test_losses_of_no_collective_are_not_explained():
    assert ProcessGroup(0, 2).explain(RuntimeError("mat1 and mat2 shapes")) is None
    assert ProcessGroup().explain(RuntimeError("Connection closed by peer")) is None


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable, as two hosts: names and addresses."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    name = f"wgpt{uuid.uuid4().hex[:6]}"
    names, addresses = [f"{name}{i}" for i in "ab"], ["10.77.0.1", "10.77.0.2"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for host in names:
            ip("netns", "add", host)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for host, address in zip(names, addresses, strict=True):
            ip("link", "set", host, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", host)
            ip("-n", host, "link", "set", host, "up")
            ip("-n", host, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for host in names:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield list(zip(names, addresses, strict=True))
    for host in names:
        for pid in subprocess.run(["ip", "netns", "pids", host], capture_output=True,
                                  text=True).stdout.split():  # fmt: skip
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


@pytest.mark.slow
def test_two_hosts_of_two_processes_equal_one(prepared, alone, tmp_path, hosts):
    out = tmp_path / "run"
    running = [
        torchrun(
            tmp_path, 2, *begin(prepared, out),
            launcher=(f"--node-rank={rank}", "--nnodes=2", f"--master-addr={hosts[0][1]}",
                      "--master-port=29400"),
            prefix=("ip", "netns", "exec", host), GLOO_SOCKET_IFNAME=host,
        )
        for rank, (host, _) in enumerate(hosts)
    ]  # fmt: skip
    for process in running:
        finish(process)
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)
