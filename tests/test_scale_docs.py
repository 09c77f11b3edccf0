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
SCRIPTS = re.findall(
    r"^```bash\n(#!/bin/bash\n.*?)^```", (ROOT / "docs" / "scale.md").read_text(), re.M | re.S
)


def slurm(folder, script, **variables):
    """Runs a batch script as a job of one node without GPUs."""
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
        slurm(tmp_path, prepare, SLURM_ARRAY_TASK_ID=task, **array)
    slurm(tmp_path, merge)
    account = json.loads((tmp_path / "DATA" / "manifest.json").read_text())["account"]
    assert account["found"] == 6
    brief = " --device cpu --preset hybrid-xs --batch-size 4 --context-s 0.5 --sample-s 0"
    nodes = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    for steps in (2, 3):  # the requeued job goes on
        slurm(tmp_path, train.rstrip() + f"{brief} --max-steps {steps}\n", **nodes)
    assert (tmp_path / "RUN" / "checkpoints" / "step-00000003").is_dir()
