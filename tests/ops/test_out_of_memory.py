"""Memory that runs out inside an op: the words are those that batch finders look for."""

import subprocess
import sys

import pytest
import torch

from wgpt import ops

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
except torch.OutOfMemoryError as error:
    assert is_out_of_memory(error), error
    print(error)
"""


def test_an_op_says_what_it_could_not_allocate():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.startswith(
        "flash_attention: out of memory on cpu: a float32 tensor of shape (1, 400000, 64, 128) "
        f"needs {OUT_BYTES} bytes"
    )


SCRATCH_OF_A_THREAD = """
import resource, sys, torch
from wgpt.ops.flash_attention import _flash_attention_backward as backward
torch.set_num_threads(int(sys.argv[1]))
def gradients(steps):
    rows = torch.ones(1, 1, 1, 128).expand(8, steps, 1, 128)
    return backward(rows, None, rows, rows, rows, rows, torch.ones(8, 1, steps), 1.0, True, 1)
STEPS = 80_000
gradients(100)
of_a_head = STEPS * 128 * 4
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# The gradients fit, and not a thread's dq of one head, in float32, beside them.
limit = used + 3 * 8 * of_a_head + of_a_head // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    gradients(STEPS)
except torch.OutOfMemoryError as error:
    print(error)
"""


@pytest.mark.parametrize("n_threads", [1, 2])
def test_scratch_of_a_thread_that_runs_out_says_so(n_threads: int) -> None:
    """The error keeps its type on the way out of torch's thread pool."""
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH_OF_A_THREAD, str(n_threads)],
        capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    assert done.stdout.startswith(
        "flash_attention_backward: out of memory on cpu: a thread's scratch needs "
    ), done
    assert "bytes. Lower the batch size or the length" in done.stdout


FAILING_COPY = """
import torch
from wgpt import ops
def fail(*arguments):
    raise IndexError("planted")
library = torch.library.Library("aten", "IMPL")
library.impl("copy_", fail, "CPU", allow_override=True)
with torch.no_grad():
    rows = torch.ones(1, 5, 2, 64)[..., ::2]  # copied: its channels are strided
    try:
        ops.flash_attention(rows, rows, rows)
    except RuntimeError as error:
        print(error)
"""


def test_an_error_of_torch_inside_an_op_keeps_its_words() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILING_COPY],
        capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    words = "planted" if torch.__version__ >= "2.13" else "this torch (before 2.13) says no more"
    assert words in done.stdout, done


HUGE = 1 << 40


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_names_op_tensor_and_bytes(in_backward: bool) -> None:
    """Arguments that are views of one number: only what the op allocates is large."""
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    table = torch.ones(1, 2).expand(1 if in_backward else HUGE, 2).requires_grad_()
    if in_backward:
        backward = ops.gradient.backward_op("token_concat")
        call = lambda: backward(torch.ones(1, 1, 2), tokens, HUGE, 2, -1)  # noqa: E731
        words = rf"token_concat_backward: out of memory on cpu: .*\({HUGE}, 2\) needs {8 * HUGE} b"
    else:
        call = lambda: ops.token_concat(tokens, table)  # noqa: E731
        words = rf"token_concat: out of memory on cpu: a float32 tensor .* needs {8 * HUGE} bytes"
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match=words) as caught:
        call()
    if torch.__version__ >= "2.13":
        assert "torch says:" in str(caught.value)


def test_sizes_whose_product_is_no_number_are_out_of_memory_too() -> None:
    """Found by make fuzz FUZZ=ops: the product wrapped round."""
    backward = torch.ops.wgpt_kernels.token_concat_backward.default
    given = torch.ones(1, 1, 8), torch.zeros(1, 1, dtype=torch.int64)
    words = r"of shape \(4611686018427387905, 8\) needs 2\^63 or more bytes"
    with pytest.raises(MemoryError, match=words):
        backward(*given, 1, 8, (1 << 62) + 1)
    with pytest.raises(ValueError, match="vocab must be at most 281474976710656, got 46116860184"):
        backward(*given, (1 << 62) + 1, 0, -1)  # no channels, no table: its workspace wrapped round
    packed = torch.ops.wgpt_kernels.packed_addmm.default
    with pytest.raises(
        ValueError, match=r"panels must have shape .* = \(144115188075855872, 4, 64\)"
    ):
        packed(torch.zeros(2, 4), torch.zeros(1, 4, 64), None, (1 << 63) - 1)
    mel = torch.ops.wgpt_kernels.check_mel_embed.default
    row = torch.ones(8)
    with pytest.raises(ValueError, match=r"context_frames must be at most .* for M = 8, got 1 and"):
        mel(torch.ones(1, 5, 8), row, row, torch.ones(4, 8), row[:4], None, 1, (1 << 62) + 1)
