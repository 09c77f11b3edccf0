"""The emulator itself: what right kernels compute on it, and what it says about wrong ones."""

import ctypes
import subprocess

import pytest
import torch
from emulator import CSRC, CXX, RUNTIME

MISTAKES = {  # case: (text in the fast build, text in the race build); None: nothing to report
    0: ("deadlock", "deadlock"),
    1: ("the warp has diverged", "the warp has diverged"),
    2: ("leaves the caller out", "leaves the caller out"),
    3: ("wrote out of bounds, at byte 256 of a static shared array of 256 bytes", "out of bounds"),
    4: ("wrote out of bounds, at byte", "out of bounds"),
    5: (None, "which no thread has written"),
    6: ("not aligned to 16", "not aligned to 16"),
    7: ("asynchronous copies that nobody waited for", "asynchronous copies that nobody waited for"),
    8: (None, "race between blocks"),
    9: (None, "static shared array of 256 bytes"),  # unwritten, or a race: as the lanes run
    10: (None, None),
    11: ("deadlock", "deadlock"),
    12: (None, None),
    13: ("does not take part", "does not take part"),
}


def run(emu, function, *args):
    f = getattr(emu.lib, function)
    f.restype = ctypes.c_char_p
    error = f(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args))
    return None if error is None else error.decode()


@pytest.mark.parametrize("blocks,threads", [(1, 32), (3, 96), (2, 1024)])
def test_block_sums(machine, blocks, threads):
    x = machine.tensor(torch.arange(float(blocks * threads)))
    sums = machine.empty((blocks,), torch.float32)
    assert run(machine, "machine_block_sum", x, sums, x.numel(), blocks, threads) is None
    assert torch.equal(sums, x.view(blocks, threads).sum(1))


def test_lane_operations(machine):
    out = machine.empty((32, 8), torch.int32)
    assert run(machine, "machine_lane_operations", out) is None
    for lane, row in enumerate(out.tolist()):
        segment = lane // 16 * 16
        up, down = lane - 2, lane + 4
        expected = [
            50,
            (lane // 8 * 8 + 1) * 10,
            lane ^ 3,
            up if up >= segment else lane,
            down if down < segment + 16 else lane,
            sum(1 << i for i in range(0, 32, 3)),
            sum(1 << i for i in range(lane % 4, 32, 4)),
            1,
        ]
        assert [v & 0xFFFFFFFF for v in row] == [v & 0xFFFFFFFF for v in expected]


def test_atomics_count_every_thread(machine):
    hits = machine.tensor(torch.zeros(1, dtype=torch.int32))
    assert run(machine, "machine_count_hits", hits, 5, 100) is None
    assert hits.item() == 500


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_reported_in_words(machine, case):
    data = machine.tensor(torch.zeros(64))
    error = run(machine, "machine_mistake", case, data, 64, 2 if case == 8 else 1)
    expected = MISTAKES[case][machine.variant == "race"]
    if expected is None:
        assert error is None
    else:
        assert error is not None and expected in error, error
    if case == 5 and machine.variant == "fast":
        assert data[:32].isnan().all()  # poison shows in the numbers


def test_a_deadlock_says_who_waits_where(machine):
    data = machine.tensor(torch.zeros(64))
    error = run(machine, "machine_mistake", 0, data, 64, 1)
    assert "lanes 0x0000ffff wait at __syncthreads" in error
    assert "lanes 0xffff0000 wait at __syncwarp" in error


def test_after_a_mistake_the_next_launch_starts_clean(machine):
    data = machine.tensor(torch.zeros(64))
    assert run(machine, "machine_mistake", 0, data, 64, 1) is not None
    assert run(machine, "machine_mistake", 10, data, 64, 1) is None
    assert data[0] == 1.0


@pytest.mark.parametrize(
    "grid,threads,shared,text",
    [
        (0, 32, 0, "without blocks"),
        (1, 0, 0, "1 to 1024 threads"),
        (1, 1025, 0, "1 to 1024 threads"),
        (1, 32, 228 * 1024, "227 KiB"),
    ],
)
def test_launch_limits(machine, grid, threads, shared, text):
    hits = machine.tensor(torch.zeros(1, dtype=torch.int32))
    assert text in run(machine, "machine_launch", grid, threads, ctypes.c_size_t(shared), hits)


def test_freed_memory_is_poisoned_and_given_again(machine):
    """In a block of its size, between red zones of its own."""
    sizes = (64, 65, 64)
    tensors = [machine.tensor(torch.zeros(n)) for n in sizes]
    addresses = [t.data_ptr() for t in tensors]
    for address in addresses[:2]:
        machine.lib.simt_free(ctypes.c_void_p(address))
    assert tensors[0].isnan().all() and not tensors[2].any()
    again = [machine.empty((n,), torch.float32) for n in (64, 64)]
    assert again[0].data_ptr() == addresses[0] and again[0].isnan().all()
    assert again[1].data_ptr() not in addresses
    ctypes.memset(addresses[2] + 4 * 64, 0, 1)  # behind its end
    hits = machine.tensor(torch.zeros(1, dtype=torch.int32))
    assert "wrote out of bounds" in run(machine, "machine_count_hits", hits, 1, 1)


@pytest.mark.slow
def test_the_example_builds_and_runs_as_its_head_says(tmp_path):
    program = tmp_path / "reverse"
    sources = ["simt/example/main.cpp", *(f"simt/{stem}.cpp" for stem in RUNTIME)]
    command = [CXX, "-std=c++17", "-O2", "-I.", *sources, "-o", str(program)]
    subprocess.run(command, cwd=CSRC, check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert lines.count("no report, 0 wrong") == 2 and "512 wrong" in lines
