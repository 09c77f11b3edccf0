"""prepare in several processes, killed, restarted, run twice, out of disk: the same bytes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec, make_audio, tree

from wgpt import files
from wgpt.config import MelConfig
from wgpt.data import dataset as dataset_module
from wgpt.data import encode, pipeline, prepare
from wgpt.errors import DataError

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_audio(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def plain(audio_dir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of an uninterrupted single-process run with one mel source."""
    out = tmp_path_factory.mktemp("plain") / "data"
    prepare(audio_dir, out, codec=FakeCodec())
    return tree(out)


def test_two_processes_give_the_same_bytes(audio_dir, plain, tmp_path: Path) -> None:
    prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), jobs=2)
    assert tree(tmp_path / "data") == plain


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from fake_codec import FakeCodec
from wgpt.data.pipeline import prepare
if __name__ == "__main__":
    prepare({audio!r}, {out!r}, codec=FakeCodec(delay_s={delay}), jobs={jobs})
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_restarted_gives_the_same_bytes(
    audio_dir, plain, tmp_path: Path, caplog, jobs: int
) -> None:
    out = tmp_path / "data"
    partial = out / ".partial"
    root = str(Path(encode.__file__).parents[2])
    code = SCRIPT.format(
        paths=[str(HERE), root], audio=str(audio_dir), out=str(out), delay=0.2, jobs=jobs
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # workers import torch, on a busy machine for minutes
    while len(list(partial.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="if prepare was interrupted, run it again"):
        dataset_module.Dataset(out)
    time.sleep(0.5)  # workers notice the death and leave
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert 3 <= len(finished) < 10
    # A torn file from the kill must not count as finished.
    (partial / f"{'0' * 64}.safetensors").write_bytes(b"torn")

    made: list[str] = []
    original = encode.Encoder.encode_file

    def spy(self, job):
        made.append(Path(job.partial).name)
        return original(self, job)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(encode.Encoder, "encode_file", spy)
        prepare(audio_dir, out, codec=FakeCodec())
    assert not set(made) & set(finished) and len(made) == 10 - len(finished)
    assert f"continuing: {len(finished)} files finished before" in caplog.text
    assert tree(out) == plain


@pytest.mark.parametrize("name", ["*.safetensors", "settings.json"])
def test_a_damaged_finished_file_is_found(audio_dir, plain, tmp_path: Path, name: str) -> None:
    out = tmp_path / "data"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio_dir, out, codec=FakeCodec())
    path = next((out / ".partial").glob(name))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    if path.suffix == ".safetensors":
        with pytest.raises(DataError, match="another sha256; delete it and run again"):
            prepare(audio_dir, out, codec=FakeCodec())
        path.unlink()
    prepare(audio_dir, out, codec=FakeCodec())
    assert tree(out) == plain


def test_killed_while_assembling_gives_the_same_bytes(audio_dir, plain, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    out = tmp_path / "data"
    for place in ("_move", "_write_split"):
        with pytest.MonkeyPatch.context() as patch:
            original = pipeline.assemble.__globals__[place]

            def interrupted(*args, original=original):
                original(*args)
                raise Killed

            patch.setitem(pipeline.assemble.__globals__, place, interrupted)
            with pytest.raises(Killed):
                prepare(audio_dir, out, codec=FakeCodec(), overwrite=True)
    prepare(audio_dir, out, codec=FakeCodec(), overwrite=True)
    assert tree(out) == plain


def test_temporaries_lie_where_a_rerun_clears_them(audio_dir, tmp_path: Path) -> None:
    # A kill inside write_atomically leaves its temporary file behind.
    out, folders = tmp_path / "data", set()

    def spy(path, blob, durable=True, original=encode.write_atomically):
        folders.add(path.parent)
        original(path, blob, durable)

    with pytest.MonkeyPatch.context() as patch:
        for module in (encode, files):
            patch.setattr(module, "write_atomically", spy)
        prepare(audio_dir, out, codec=FakeCodec())
    assert folders == {out / ".partial", out / ".building"}


def test_changed_settings_redo_an_interrupted_run_and_say_so(
    audio_dir, plain, tmp_path: Path, caplog
) -> None:
    out = tmp_path / "data"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio_dir, out, codec=FakeCodec("other"), mel=MelConfig(floor=1e-3))
    assert len(list((out / ".partial").glob("*.safetensors"))) == 10
    prepare(audio_dir, out, codec=FakeCodec())
    assert "settings changed" in caplog.text and "(codec, mel): 10 finished" in caplog.text
    assert tree(out) == plain


def test_a_finished_folder_is_kept_or_refused(audio_dir, tmp_path: Path, caplog) -> None:
    out = tmp_path / "data"
    audio_dir = Path(shutil.copytree(audio_dir, tmp_path / "audio"))
    first = prepare(audio_dir, out, codec=FakeCodec())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with caplog.at_level(logging.INFO):
        assert prepare(audio_dir, out, codec=FakeCodec()) == first
    assert "already prepared" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(DataError, match=r"other settings \(mel\).*--overwrite"):
        prepare(audio_dir, out, codec=FakeCodec(), mel=MelConfig(floor=1e-3))
    (audio_dir / "music" / "00.wav").unlink()
    with pytest.raises(DataError, match=r"other files \(1 are gone .*first music/00.wav\)"):
        prepare(audio_dir, out, codec=FakeCodec())
    second = prepare(audio_dir, out, codec=FakeCodec(), overwrite=True)
    assert sum(total["clips"] for total in second["totals"].values()) == 9
    dataset_module.Dataset(out).verify()


def test_a_folder_of_something_else_is_never_touched(audio_dir, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="must be new, empty, or a folder that wgpt"):
        prepare(audio_dir, tmp_path, codec=FakeCodec(), overwrite=True)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="format"):
        prepare(audio_dir, tmp_path, codec=FakeCodec(), overwrite=True)
    assert (tmp_path / "train" / "thesis.txt").read_text() == "mine"
    with pytest.raises(DataError, match="must be new, empty, or a folder that wgpt"):
        prepare(audio_dir, audio_dir, codec=FakeCodec())


def test_recordings_are_no_data_and_the_way_there_leaves_them_alone(audio_dir, tmp_path) -> None:
    """Not `--out` that folder: recordings are never written among."""
    with pytest.raises(DataError, match=r"got one without manifest\.json") as refused:
        dataset_module.Dataset(audio_dir)
    assert "`wgpt prepare RECORDINGS --out DATA`" in str(refused.value)
    with pytest.raises(DataError, match="got no folder"):
        dataset_module.Dataset(tmp_path / "nothing")


def test_a_file_that_kills_its_worker_is_skipped(tmp_path: Path) -> None:
    audio_dir = make_audio(tmp_path / "audio", n_files=3)
    soundfile.write(audio_dir / "deadly.wav", np.full(3200, 5.0), 24_000, subtype="FLOAT")
    manifest = prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), jobs=2, keep_loudness=True)
    (entry,) = manifest["skipped"]
    assert entry["path"] == "deadly.wav" and "worker process died twice" in entry["reason"]
    assert sum(total["clips"] for total in manifest["totals"].values()) == 3


def test_a_full_disk_is_a_clear_error_and_finished_files_are_kept(audio_dir, tmp_path) -> None:
    calls = []

    def full(path, blob, durable=True, original=encode.write_atomically):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        original(path, blob)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "write_atomically", full)
        with pytest.raises(DataError, match=r"No space left.*finished files are kept"):
            prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    assert len(list((tmp_path / "data" / ".partial").glob("*.safetensors"))) == 4


def test_two_runs_into_one_folder_are_refused(audio_dir, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "data"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="by another process"):
            prepare(audio_dir, out, codec=FakeCodec())
    finally:
        os.close(descriptor)
