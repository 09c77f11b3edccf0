"""Memory that runs out inside an op: the words are those that batch finders look for."""

import subprocess
import sys

OUT_BYTES = 400_000 * 64 * 128 * 4  # of an input that is one row, seen many times
LIMITED = f"""
import resource, torch
from wgpt import ops
from wgpt.errors import is_out_of_memory
rows = torch.empty(1, 1, 1, 128).expand(1, 400_000, 64, 128)
ops.flash_attention(rows[:, :1], rows[:, :1], rows[:, :1])  # threads and workspaces are there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {OUT_BYTES // 2},) * 2)
try:
    ops.flash_attention(rows, rows, rows, window=1)
except RuntimeError as error:
    assert is_out_of_memory(error), error
    print(error)
"""


def test_an_op_says_what_it_could_not_allocate():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.startswith(
        "out of memory: cannot allocate (1, 400000, 64, 128) of float32 on cpu"
    )
