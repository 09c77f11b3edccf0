"""The scripts of docs/scale.md, run by bash with a stand-in for SLURM."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "scale.md").read_text(), re.M | re.S)
SCRIPTS = [block for block in BLOCKS if block.startswith("#!/bin/bash")]
COMMANDS = [block for block in BLOCKS if "torchrun" in block and block not in SCRIPTS]
# What makes a step of any of them brief; of two flags the later one holds.
BRIEF = (
    " --device cpu --batch-size 4 --context-s 0.5 --sample-s 0 --max-steps 2 --n-layers 1 "
    "--token-dim 64 --mel-dim 64 --ffn-dim 64 --mel-ffn-dim 64 --fine-dim 64 --fine-ffn-dim 64"
)


def bash(folder, script, **variables):
    """Runs a script as a job of one node without GPUs."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    python = f'#!/bin/bash\nexec {sys.executable} -m "$0" "$@"\n'
    for name, text in {
        "wgpt": python.replace('"$0"', "wgpt"),
        "torchrun": python.replace('"$0"', "torch.distributed.run"),
        "srun": '#!/bin/bash\nexec "$@"\n',
        "scontrol": '#!/bin/bash\ntest "$1 $2 $3" = "show hostnames node[1-2]"; '
        "echo localhost; echo node2\n",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", **variables}
    done = subprocess.run(
        ["bash", "-e", "-c", script.replace(":29500", f":{port}")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_scripts_prepare_merge_and_train(tmp_path):
    prepare, merge, train = SCRIPTS
    (tmp_path / "RECORDINGS").mkdir()
    for clip in sorted((ROOT / "wgpt" / "assets" / "speech").glob("*.ogg"))[:6]:
        shutil.copyfile(clip, tmp_path / "RECORDINGS" / clip.name)
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
    for task in ("1", "2"):
        bash(tmp_path, prepare, SLURM_ARRAY_TASK_ID=task, **array)
    bash(tmp_path, merge)
    account = json.loads((tmp_path / "DATA" / "manifest.json").read_text())["account"]
    assert account["found"] == 6
    brief = " --device cpu --preset hybrid-xs --batch-size 4 --context-s 0.5 --sample-s 0"
    nodes = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    for steps in (2, 3):  # the requeued job goes on
        bash(tmp_path, train.rstrip() + f"{brief} --max-steps {steps}\n", **nodes)
    assert (tmp_path / "RUN" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_commands_of_hosts_without_a_scheduler_train(tmp_path):
    """Two processes of one host stand for GPUs and hosts."""
    (tmp_path / "RECORDINGS").mkdir()
    for clip in sorted((ROOT / "wgpt" / "assets" / "speech").glob("*.ogg"))[:6]:
        shutil.copyfile(clip, tmp_path / "RECORDINGS" / clip.name)
    assert len(COMMANDS) == 3
    for block in sorted(COMMANDS, key=lambda block: "prepare" not in block):  # first what prepares
        block = re.sub(r"^pip .*\n", "", block)
        block = re.sub(r"--nproc-per-node \S+", "--nproc-per-node 2", block)
        block = block.replace("--nnodes 2", "--nnodes 1").replace("HOST:", "localhost:")
        bash(tmp_path, block.rstrip() + BRIEF + "\n")
        assert (tmp_path / "RUN" / "checkpoints" / "step-00000002").is_dir()
        shutil.rmtree(tmp_path / "RUN")
