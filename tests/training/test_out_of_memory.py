"""`wgpt train` where memory really runs out: one line that names what failed and what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource, sys
import wgpt.train
from wgpt.cli import main
from wgpt.training.step import TrainingStep
wgpt.train.keep_freed_memory = lambda: None  # 2 GB of addresses, from which the batch would come
made = TrainingStep._backward
def limited(self, *rest):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2_000_000, resource.RLIM_INFINITY))
    try:
        return made(self, *rest)
    finally:  # what failed is free again; the command goes on to import what it has not yet
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
TrainingStep._backward = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_train_says_in_one_line_what_did_not_fit(prepared: Path, tmp_path: Path) -> None:
    """The activations of a single window of 225 steps are 15 MB, and a weight is 4: none fits."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", f"--data={prepared}", f"--out={tmp_path / 'run'}",
         "--preset=gpt-xs", "--n-layers=1", "--ffn-dim=16384", "--max-steps=1", "--batch-size=2",
         "--context-s=3", "--sample-s=0", "--eval-audio-s=2", "--device=cpu"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    words = (
        r"step 1: out of memory \(feed_forward\w*: out of memory on cpu: a \w+ tensor of shape "
        r"\([\d, ]+\) needs \d+ bytes\)\. Shorter windows: .*--context-s 1.5"
    )
    assert re.search(words, done.stderr.splitlines()[-1]), done.stderr
