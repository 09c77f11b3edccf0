"""A command is hit at its n-th file-system event, run again, and must leave the undisturbed folder.

Audit hooks see every open for writing, rename, removal and new folder that Python does, with its
path, and can stop it with an error: no shim to compile, and it works where LD_PRELOAD does not.
They do not see single writes, nor what libraries open themselves (safetensors, libsndfile); a
rename follows each of those. Every case is a fork of the test process, which has imported all.

A second run is left out where the folder is, byte for byte, one that a second run has already made
whole: errors that differ in their number alone mostly leave the same.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from wgpt.errors import WgptError
from wgpt.ops.runtime import one_thread

Command = Callable[[Path], object]  # what it is told: the folder to work in
State = tuple[tuple[str, str], ...]  # of a folder: names, and hashes of contents

EVERY = int(os.environ.get("WGPT_FAULTS_EVERY", "0"))  # `make faults`: 1; 0: a few, spread
FAULTS = {
    "kill": None,
    "enospc": OSError(errno.ENOSPC, "No space left on device"),
    "eio": OSError(errno.EIO, "Input/output error"),
    "enomem": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
DONE, REFUSED, CRASHED, HANGS = 0, 1, 2, 3  # how a case ends
PATIENCE_S = 300.0


def changes(event: str, args: tuple) -> bool:
    """Whether an audit event changes a file system."""
    if event == "open":
        return bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def start(work: Callable[[], object], folder: Path, at: int = 0, fault: OSError | None = None):
    """Forks a process that does `work` and meets `fault`, None for SIGKILL, at event `at` below
    `folder`. Returns what `end` takes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code, n = CRASHED, 0
    try:
        # Of a pool of threads that OpenMP made before the fork none is left to wait for.
        torch.set_num_threads(1)
        os.fsync = lambda _: None  # no power fails here

        def hook(event, args):
            nonlocal n
            if not changes(event, args) or not str(args[0]).startswith(str(folder)):
                return
            n += 1
            os.write(writer, b".")
            if n == at:
                if fault is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise fault

        sys.addaudithook(hook)
        code = REFUSED if work() in (1, 2) else DONE  # the exit code of a command
    except WgptError:
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int, reader: int) -> tuple[int, int]:
    """How a case ended, negative for a signal, and how many events it got to."""
    n = 0
    while select.select([reader], [], [], PATIENCE_S)[0]:
        got = os.read(reader, 1 << 16)
        n += len(got)
        if not got:
            break
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return HANGS, n
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), n


def case(work, folder: Path, at: int = 0, fault: OSError | None = None) -> tuple[int, int]:
    """`start` and `end`."""
    return end(*start(work, folder, at, fault))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def state(folder: Path) -> State:
    """Every file and folder in a folder, hidden ones without the process that made them."""
    found = []
    for path in folder.rglob("*"):
        name = re.sub(r"\.\d+(\.tmp|\.old|/|$)", r".PID\1", str(path.relative_to(folder)))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found.append((name, sha256))
    return tuple(sorted(found))


def plain_pictures(patch: Any) -> None:
    """Pictures hold what they show as text, for drawing takes longer than these tiny trainings."""
    from matplotlib.figure import Figure

    def savefig(figure, path, format):
        curves = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
        Path(path).write_text(repr(curves))

    patch.setattr(Figure, "savefig", savefig)


def points(fault: str, n_events: int, n_spread: int) -> Sequence[int]:
    """Events at which a fault strikes: every EVERY-th, or n_spread, other ones for each fault."""
    index = list(FAULTS).index(fault)
    if EVERY:
        return range(1 + index % EVERY, n_events + 1, EVERY)
    shift = (index + 0.5) / len(FAULTS)
    return [1 + int((i + shift) * n_events / n_spread) for i in range(n_spread)]


def undisturbed(
    command: Command, folder: Path, begin: Command = lambda out: None
) -> tuple[dict[str, bytes], int, set[State]]:
    """What `command(folder/1)` leaves, at how many events a fault can strike, and an empty set for
    the states that a second run makes whole.

    begin: makes the folder as it is before, if it is not empty.
    """
    with one_thread():
        for name in ("0", "1"):  # the first here: later forks have imported what it needs
            out = folder / name
            out.mkdir()
            begin(out)
            if name == "0":
                command(out)
                continue
            code, n_events = case(lambda out=out: command(out), out)
            assert code == DONE and n_events > 3
    found = tree(folder / "1")
    assert tree(folder / "0") == found
    return found, n_events, set()


def sweep(
    fault: str,
    command: Command,
    expected: dict[str, bytes],
    n_events: int,
    mended: set[State],
    folder: Path,
    n_spread: int,
    begin: Command = lambda out: None,
) -> list[tuple]:
    """Strikes `command(folder/N)` at `points`, runs it again and compares the folder.

    mended: states that a second run makes whole; those found here are added.

    Returns what went wrong: (event, what, files that differ).
    """
    wrong: list[tuple] = []
    n_again = 0
    at_events = points(fault, n_events, n_spread)
    for at in at_events:
        out = folder / str(at)
        out.mkdir()
        begin(out)
        code, _ = case(lambda out=out: command(out), out, at, FAULTS[fault])
        if code not in (DONE, REFUSED, -signal.SIGKILL):
            wrong.append((at, "a traceback or a hang"))
        left = state(out)
        if left not in mended:
            n_again += 1
            code, _ = case(lambda out=out: command(out), out)
            got = tree(out)
            differing = sorted(n for n in {**expected, **got} if expected.get(n) != got.get(n))
            if code != DONE or differing:
                wrong.append((at, f"the second run ends with {code}", differing))
            else:
                mended.add(left)
        shutil.rmtree(out)
    print(f"{fault}: {len(at_events)} cases of {n_events} events, {n_again} states that no case "
          f"before had left, {len(wrong)} wrong", flush=True)  # fmt: skip
    return wrong


def race(command: Command, out: Path) -> tuple[list[int], dict[str, bytes]]:
    """How two processes end that do the same in one folder at the same time, the best first, and
    what they leave."""
    out.mkdir()
    ends = sorted(end(*one)[0] for one in [start(lambda: command(out), out) for _ in range(2)])
    return ends, tree(out)
