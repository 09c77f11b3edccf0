"""A training process keeps the memory it frees, on huge pages where the kernel has them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import re, sys, torch
from pathlib import Path
from wgpt.training.allocator import keep_freed_memory
def mib(name, file):
    text = Path("/proc/self", file).read_text()
    return sum(map(int, re.findall(name + r":\\s+(\\d+)", text))) // 1024
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(256, 1 << 18)
print(mib("VmRSS", "status"), mib("AnonHugePages", "smaps"))
"""


def memory_after_256_mib_are_freed(keep: str) -> tuple[int, int]:
    """MiB that the process still holds, and MiB of huge pages."""
    run = subprocess.run(
        # Away from the source tree, whose wgpt/ has no compiled module.
        [sys.executable, "-c", PROGRAM, keep],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    held, huge = map(int, run.stdout.split())
    return held, huge


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_stays() -> None:
    held, huge = memory_after_256_mib_are_freed("keep")
    before, _ = memory_after_256_mib_are_freed("leave")
    assert held > before + 200
    if SWITCH.exists() and re.search(r"\[(madvise|always)\]", SWITCH.read_text()):
        assert huge > 200
