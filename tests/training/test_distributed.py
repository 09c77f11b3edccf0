"""Several processes of torchrun train as one: the same losses, and one's end is everyone's."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.distributed as dist

from wgpt.errors import ConfigError, TrainError
from wgpt.model import HybridModel
from wgpt.runs.metrics import read_metrics
from wgpt.runs.run import Run
from wgpt.training import distributed, train
from wgpt.training.distributed import ProcessGroup, store_of_this_start

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
FSDP = ["--strategy=fsdp", "--activation-checkpointing"]
SHAPE = {"n_layers": 1, "n_mel_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64, "n_fine": 2}

# What a rank does at step 5, with its faults named in the environment.
PROGRAM = """
import os, signal, sys, time
from wgpt.cli import main
from wgpt.errors import TrainError
from wgpt.training.step import TrainingStep

rank, fault, whole = os.environ["RANK"], os.environ.get("FAULT", ""), TrainingStep.__call__
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    fault = ""

if os.environ.get("STAND_IN"):  # the step of a GPU, on the CPU
    sys.path.insert(0, os.environ["STAND_IN"])
    from cpu_graph import CpuGpu
    from wgpt.training import trainer
    from wgpt.training.graph import DeviceStep

    trainer.training_step = lambda *given: DeviceStep(*given, CpuGpu())

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


def last_step(run):
    """Weights and optimizer of the run's last step, by file: header and bits."""
    held = {}
    for path in (run / "checkpoints" / f"step-{SETTINGS['max_steps']:08d}").glob("*.safetensors"):
        with safetensors.safe_open(path, "np") as file:
            header = file.metadata()
            held[path.name] = header, {n: file.get_tensor(n).tobytes() for n in file.keys()}
    return held


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(prepared, out, "hybrid-xs", model=SHAPE, **SETTINGS)
    return out


def test_two_processes_equal_one(prepared, alone, tmp_path):
    """Halves of the same batches, each in two parts: the same losses and gradients to rounding."""
    out = tmp_path / "run"
    said = finish(torchrun(tmp_path, 2, *begin(prepared, out), "--accumulate=2"))
    assert said.count(f"\n{out}\n") == 1  # the summary: the first process speaks for both
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


def test_sharded_processes_equal_one_which_resumes_their_run(prepared, alone, tmp_path):
    """Two under FSDP2 that compute activations again; one fails after step 4, and one process
    resumes from step 3 with what both wrote."""
    out = tmp_path / "run"
    said = finish(torchrun(tmp_path, 2, *begin(prepared, out), *FSDP, FAULT="error"), code=1)
    assert re.search(r"^wgpt train: process 1: step 5: planted.*--resume", said, re.M)
    assert "Warning" not in said
    np.testing.assert_allclose(losses(out), losses(alone)[: len(losses(out))], rtol=2e-5)
    files = sorted(p.name for p in (out / "checkpoints" / "step-00000003").iterdir())
    assert files == [
        "README.md", "config.json", "metrics.csv", "model.safetensors",
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
        "state.json",
    ]  # fmt: skip
    train(None, out, resume=True, strategy="ddp", activation_checkpointing=False)
    assert len(losses(out)) == 6
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)
    HybridModel.from_pretrained(out)


@pytest.mark.slow
def test_sharded_run_resumes_to_the_bit_and_on_four_processes(prepared, alone, tmp_path):
    """Four hold nothing of some tensors: two residual codebooks are sharded over codebooks."""
    whole, killed, four = (tmp_path / name for name in ("whole", "killed", "four"))
    finish(torchrun(tmp_path, 2, *begin(prepared, whole), *FSDP))
    finish(torchrun(tmp_path, 2, *begin(prepared, killed), *FSDP, FAULT="kill"), code=1)
    shutil.copytree(killed, four)
    finish(torchrun(tmp_path, 2, f"--out={killed}", "--resume"))
    assert last_step(killed) == last_step(whole)
    finish(torchrun(tmp_path, 4, f"--out={four}", "--resume"))
    np.testing.assert_allclose(losses(four), losses(alone), rtol=2e-5)
    assert "optimizer-00004-of-00004.safetensors" in last_step(four)


@pytest.mark.slow
def test_sharded_processes_go_on_from_whole_ones_and_train_a_head(prepared, alone, tmp_path):
    out = tmp_path / "run"
    finish(torchrun(tmp_path, 2, *begin(prepared, out), FAULT="kill"), code=1)
    finish(torchrun(tmp_path, 2, f"--out={out}", "--resume", *FSDP))
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-5)
    # A frozen trunk, from the weights of that run.
    heads = []
    for n, name in ((1, "one"), (2, "two")):
        given = [f"--data={prepared}", f"--out={tmp_path / name}", f"--init={out}",
                 "--freeze-trunk", *flags(SETTINGS), *FSDP]  # fmt: skip
        finish(torchrun(tmp_path, n, *given))
        heads.append(losses(tmp_path / name))
    np.testing.assert_allclose(*heads, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "n"), [("fp32", 1), ("bf16", 2)])
def test_sharded_steps_of_a_gpu_equal_whole_ones(dtype, n, prepared, tmp_path):
    """On a stand-in for the GPU: the update divides by the clipping factor, sharded or not. In bf16
    gradients of half a batch are rounded, so both are computed in halves."""
    runs = []
    for n_processes, flags_of_it in ((n, []), (2, FSDP)):
        out = tmp_path / f"run{len(flags_of_it)}"
        given = [*begin(prepared, out), *flags_of_it, f"--dtype={dtype}", "--grad-clip=0.5"]
        finish(torchrun(tmp_path, n_processes, *given, STAND_IN=str(Path(__file__).parents[1])))
        runs.append(losses(out))
    np.testing.assert_allclose(*runs, rtol=2e-5)


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


def test_a_store_with_words_of_ended_processes_is_begun_anew():
    """Three starts over one store; before the last one a process ended after it was seen."""
    store, found = dist.HashStore(), []

    def start(rank):
        found.append(store_of_this_start(store, rank, 3, 30.0))

    for n in (1, 2, 3):
        threads = [threading.Thread(target=start, args=(rank,)) for rank in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3 * n
        found[-1].set("key", str(n))
        assert [same.get("key") for same in found[-3:]] == [str(n).encode()] * 3
        assert n == 1 or found[0].get("key") == b"1"
        store.set("wgpt-said-1", "a word of one that ended")
    with pytest.raises(TrainError, match=r"process 1 waited 0\.2 s for all 2 to start"):
        store_of_this_start(dist.HashStore(), 1, 2, 0.2)


def test_losses_of_no_collective_are_not_explained():
    assert ProcessGroup(0, 2).explain(RuntimeError("mat1 and mat2 shapes")) is None
    assert ProcessGroup().explain(RuntimeError("Connection closed by peer")) is None


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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_process_of_two_hosts_is_restarted_to_the_same_weights(
    strategy, prepared, tmp_path, hosts
):
    """What docs/scale.md starts on each host; one of four processes is killed at step 5."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    given = [f"--strategy={strategy}", "--resume"]
    finish(torchrun(tmp_path, 4, *begin(prepared, whole), *given))
    running = [
        torchrun(
            tmp_path, 2, *begin(prepared, out), *given,
            launcher=("--nnodes=2", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=7",
                      f"--rdzv-endpoint={hosts[0][1]}:29401", f"--local-addr={address}",
                      # A namespace has not the hostname that belongs to its address.
                      f"--rdzv-conf=is_host={int(address == hosts[0][1])}"),
            prefix=("ip", "netns", "exec", host), GLOO_SOCKET_IFNAME=host, FAULT="kill",
        )
        for host, address in hosts
    ]  # fmt: skip
    said = [finish(process) for process in running]
    assert any("resumed from step 3" in text for text in said)
    assert not any(re.search(r"--resume.*--resume", text) for text in said)
    assert last_step(out) == last_step(whole)
