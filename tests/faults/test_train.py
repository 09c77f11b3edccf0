"""Training is hit at its n-th file-system event, resumed, and must leave the undisturbed folder.

Audit hooks see every open for writing, rename, removal and new folder that Python does, with its
path, and can stop it with an error: no shim to compile, and it works where LD_PRELOAD does not.
They do not see single writes, nor what safetensors opens itself; a rename follows each of those.
Every case is a fork of the test process, which has imported all there is.
"""

import errno
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

import pytest

from wgpt.errors import WgptError
from wgpt.training import train

SETTINGS = {
    "max_steps": 3,
    "batch_size": 2,
    "context_s": 0.32,
    "warmup_steps": 2,
    "eval_every": 2,
    "eval_audio_s": 1.0,
    "save_every": 1,
    "keep_checkpoints": 1,
    "sample_every": 2,
    "sample_s": 0.1,
    "device": "cpu",
}
TINY = {"n_layers": 1, "ffn_dim": 64, "dropout": 0.1}
EVERY = int(os.environ.get("WGPT_FAULTS_EVERY", "61"))  # `make faults`: 1
FAULTS = {
    "kill": None,
    "enospc": OSError(errno.ENOSPC, "No space left on device"),
    "eio": OSError(errno.EIO, "Input/output error"),
    "enomem": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
DONE, REFUSED, CRASHED = 0, 1, 2  # exit codes of a case


def changes(event, args):
    """Whether an audit event changes a file system."""
    if event == "open":
        return bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def case(work, out, at=0, fault=None):
    """Runs `work` in a fork; returns its exit code and how many events it got to under `out`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        _, status = os.waitpid(child, 0)
        count = len(os.read(reader, 1 << 16))
        os.close(reader)
        return os.waitstatus_to_exitcode(status), count
    code = CRASHED
    try:
        state = {"n": 0}

        def hook(event, args):
            if not changes(event, args) or not str(args[0]).startswith(str(out)):
                return
            state["n"] += 1
            os.write(writer, b".")
            if state["n"] == at:
                if fault is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise fault

        sys.addaudithook(hook)
        work()
        code = DONE
    except WgptError:
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def tree(folder: Path):
    """Every file of a folder, as bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The undisturbed folder, and the number of its events."""
    logging.disable(logging.INFO)
    out = tmp_path_factory.mktemp("whole") / "run"
    code, n_events = case(lambda: begin(prepared, out), out)
    assert code == DONE
    yield tree(out), n_events
    logging.disable(logging.NOTSET)


def begin(prepared, out):
    train(prepared, out, "gpt-xs", resume=True, model=TINY, **SETTINGS)


@pytest.mark.slow  # 93 s, see `make faults`
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_event_is_resumed_to_the_same_folder(name, prepared, whole, tmp_path):
    expected, n_events = whole
    assert n_events > 50
    wrong = []
    for at in range(1 + list(FAULTS).index(name), n_events + 1, EVERY):
        out = tmp_path / str(at) / "run"
        code, _ = case(lambda out=out: begin(prepared, out), out, at, FAULTS[name])
        if code == CRASHED:
            wrong.append((at, "a traceback"))
        code, _ = case(lambda out=out: begin(prepared, out), out)
        got = tree(out)
        differing = sorted(n for n in {**expected, **got} if expected.get(n) != got.get(n))
        if code != DONE or differing:
            wrong.append((at, code, differing))
    print(f"{name}: {len(range(1 + list(FAULTS).index(name), n_events + 1, EVERY))} cases")
    assert not wrong
