"""Adding recordings or a mel source costs only what is new; a bad day is no bad file."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec, make_audio, tree

from wgpt.cli import main
from wgpt.data import Dataset, encode, prepare
from wgpt.errors import DataError
from wgpt.files import read_json, sha256_of, write_sealed


class CountingCodec(FakeCodec):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.n_encoded = self.n_decoded = 0

    def encode(self, wave):
        self.n_encoded += 1
        return super().encode(wave)

    def decode(self, codes):
        self.n_decoded += 1
        return super().decode(codes)


@pytest.fixture
def audio_dir(tmp_path: Path) -> Path:
    return make_audio(tmp_path / "audio")


def test_adding_a_recording_encodes_that_one(audio_dir: Path, tmp_path: Path) -> None:
    codec, out = CountingCodec(), tmp_path / "data"
    first = prepare(audio_dir, out, codec=codec)
    assert codec.n_encoded == 10
    wave = np.random.default_rng(1).standard_normal(9600) * 0.1
    soundfile.write(audio_dir / "speech" / "new.wav", wave, 24_000)
    (audio_dir / "music" / "00.wav").rename(audio_dir / "music" / "renamed.wav")
    second = prepare(audio_dir, out, codec=codec)
    assert codec.n_encoded == 11
    before = {e["sha256"]: e["split"] for e in first["sources"]}
    after = {e["sha256"]: e["split"] for e in second["sources"]}
    assert len(after) == 11 and {k: after[k] for k in before} == before
    Dataset(out).verify()
    assert not (out / ".partial").exists()
    # The same files prepared at once give the same arrays for every file.
    prepare(audio_dir, tmp_path / "fresh", codec=codec)
    for name in ("data", "fresh"):
        data = Dataset(tmp_path / name)
        found = {}
        for entry in data.manifest["sources"]:
            tokens, frames = data.split(entry["split"]).clip(entry["clips"][0], "decoded-4")
            found[entry["path"]] = (tokens.numpy().tobytes(), frames.numpy().tobytes())
        if name == "data":
            added = found
    assert added == found


def test_adding_a_mel_source_of_decoded_audio_reads_no_recording(
    audio_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    # The report decodes 20 clips each time; what is counted here is the encoding.
    monkeypatch.setattr("wgpt.data.pipeline.listen", lambda encoder, sources, jobs: [])
    codec, out = CountingCodec(), tmp_path / "data"
    prepare(audio_dir, out, codec=codec, mel_sources=("wave",))
    assert (codec.n_encoded, codec.n_decoded) == (10, 0)

    def never(*args, **kwargs):
        raise AssertionError("a recording was read")

    with monkeypatch.context() as patch:
        patch.setattr("wgpt.audio.Recording", never)
        manifest = prepare(audio_dir, out, codec=codec, mel_sources=("decoded-2",))
    assert (codec.n_encoded, codec.n_decoded) == (10, 10)
    assert manifest["mel_sources"] == ["wave", "decoded-2"]
    prepare(audio_dir, out, codec=codec, mel_sources=("leaky-1024",))
    assert codec.n_encoded == 10  # read again, but not encoded
    fresh = tmp_path / "fresh"
    prepare(audio_dir, fresh, codec=codec, mel_sources=("wave", "decoded-2", "leaky-1024"))
    assert tree(out) == tree(fresh)


def test_one_long_recording_is_not_encoded_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codec, out = CountingCodec(), tmp_path / "data"
    soundfile.write(tmp_path / "a.wav", rng.standard_normal(24_000 * 40) * 0.1, 24_000)
    first = prepare(tmp_path / "a.wav", out, codec=codec)
    soundfile.write(tmp_path / "b.wav", rng.standard_normal(24_000 * 40) * 0.1, 24_000)
    prepare([tmp_path / "a.wav", tmp_path / "b.wav"], out, codec=codec)
    assert codec.n_encoded == 2 and first["split_by"] == "time"
    assert Dataset(out).manifest["split_by"] == "time"
    fresh = tmp_path / "fresh"
    prepare([tmp_path / "a.wav", tmp_path / "b.wav"], fresh, codec=codec)
    assert tree(out) == tree(fresh)


def test_an_interrupted_addition_ends_as_an_uninterrupted_one(audio_dir, tmp_path) -> None:
    class Killed(BaseException):
        pass

    outs = [tmp_path / "whole", tmp_path / "broken"]
    for out in outs:
        prepare(audio_dir, out, codec=FakeCodec())
    for i in range(12):
        wave = np.random.default_rng(i).standard_normal(9600 + i) * 0.1
        soundfile.write(audio_dir / f"new{i}.wav", wave, 24_000)
    prepare(audio_dir, outs[0], codec=FakeCodec())
    from wgpt.data import assemble

    original = assemble._move

    def interrupted(out: Path, building: Path, manifest: bytes) -> None:
        (out / "manifest.json").unlink()
        shutil.rmtree(out / "train")
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "_move", interrupted)
        with pytest.raises(Killed):
            prepare(audio_dir, outs[1], codec=FakeCodec())
    assert assemble._move is original
    prepare(audio_dir, outs[1], codec=FakeCodec())
    assert tree(outs[0]) == tree(outs[1])


class BadDay(FakeCodec):
    """Fails once in a way that is no file's fault."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def encode(self, wave):
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().encode(wave)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["memory", "disk", "torch"],
)
def test_a_bad_day_fails_the_run_and_is_retried(audio_dir, tmp_path, error) -> None:
    out, codec = tmp_path / "data", BadDay(error)
    with pytest.raises(DataError, match="run again: finished files are kept"):
        prepare(audio_dir, out, codec=codec)
    assert not (out / "manifest.json").exists()
    manifest = prepare(audio_dir, out, codec=codec)
    assert manifest["skipped"] == [] and manifest["account"]["used"] == 10


def test_an_error_of_reading_the_disk_fails_the_run(audio_dir, tmp_path, monkeypatch) -> None:
    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("wgpt.data.scan.hash_file", failing)
        with pytest.raises(DataError, match="Input/output error"):
            prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_damage_that_is_the_disks_fails_the_run(audio_dir, tmp_path, monkeypatch) -> None:
    """libsndfile calls an I/O error damage: the file is read again to tell."""
    (audio_dir / "broken.flac").write_bytes(b"fLaC" + bytes(400))

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("wgpt.data.encode.sha256_of", failing)  # hash_file's, and the second reading
        patch.setattr("wgpt.data.scan.hash_file", lambda path: (sha256_of(path), os.stat(path)))
        with pytest.raises(DataError, match="run again: finished files are kept"):
            prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    manifest = prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    assert [entry["path"] for entry in manifest["skipped"]] == ["broken.flac"]


def test_a_bad_day_ends_the_command_with_1(audio_dir, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "wgpt.data.pipeline.load_codec", lambda codec, download: BadDay(MemoryError())
    )
    out = str(tmp_path / "data")
    assert main(["prepare", str(audio_dir), "--out", out, "--quiet", "--jobs", "1"]) == 1
    assert "for want of memory" in capsys.readouterr().err


def test_a_file_whose_worker_died_is_tried_again(tmp_path: Path, caplog) -> None:
    audio_dir = make_audio(tmp_path / "audio", n_files=3)
    soundfile.write(audio_dir / "loud.wav", np.full(3200, 5.0), 24_000, subtype="FLOAT")
    options = {"jobs": 2, "keep_loudness": True}
    manifest = prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), **options)
    assert [entry["path"] for entry in manifest["skipped"]] == ["loud.wav"]
    with caplog.at_level(logging.INFO):
        manifest = prepare(
            audio_dir, tmp_path / "data", codec=FakeCodec(die_at_power=99.0), **options
        )
    assert manifest["skipped"] == [] and "3 files finished before, 1 to do" in caplog.text


@pytest.mark.slow
def test_ten_thousand_tiny_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(10_000):
        folder = tmp_path / "audio" / f"{i % 40}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{i}.wav", rng.standard_normal(2400) * 0.1, 24_000)
    manifest = prepare(tmp_path / "audio", tmp_path / "data", codec=FakeCodec())
    assert manifest["account"]["used"] == 10_000 and manifest["split_by"] == "group"


def test_encoding_is_not_done_by_name(audio_dir: Path, tmp_path: Path) -> None:
    """A finished file is named by content: a file that changes meanwhile is not taken for it."""
    job = encode.Job(str(audio_dir / "music" / "00.wav"), "0" * 64, 0, 1, str(tmp_path / "p"))
    from wgpt.config import MelConfig
    from wgpt.data.treatment import Treatment

    encoder = encode.Encoder(FakeCodec(), MelConfig(), ("wave",), Treatment(), 1e9)
    assert encoder.encode_file(job).reason == "must not change while it is read"
    assert not (tmp_path / "p").exists()


def command_in(message: str) -> list[str]:
    return shlex.split(message.partition("to add to it with its own: wgpt ")[2])


def test_other_settings_name_a_command_that_adds(audio_dir: Path, tmp_path: Path, capsys) -> None:
    """Every setting at once, with a path that must be quoted, and then each in turn."""
    out, folder = tmp_path / "my data", tmp_path / "my audio"
    audio_dir.rename(folder)
    first = ["prepare", str(folder), "--out", str(out), "--mel-sources", "wave", "--quiet"]
    flags = ["--split-by", "file", "--valid-fraction", "0.3", "--test-fraction", "0.2",
             "--keep-silence", "--keep-loudness", "--max-seconds", "100", "--codec", "mini-v1",
             "--mel-n-mels", "32", "--mel-floor", "1e-4"]  # fmt: skip
    assert main([*first, *flags]) == 0
    kept = Dataset(out).manifest
    soundfile.write(folder / "new.wav", np.random.default_rng(5).standard_normal(9600) * 0.1,
                    24_000)  # fmt: skip
    capsys.readouterr()
    assert main(first) == 1
    message = capsys.readouterr().err
    assert "other settings (codec, max_seconds, mel, split_by, test_fraction, treatment" in message
    assert main(command_in(message)) == 0
    now = Dataset(out).manifest
    assert now["settings"] == kept["settings"]
    assert len(now["sources"]) == len(kept["sources"]) + 1

    for changed in (["--split-by", "time"], ["--codec", "mini"], ["--max-seconds", "9"]):
        asked = [*first, *flags, *changed, "--mel-sources", "wave", "decoded-2"]
        assert main(asked) == 1
        command = command_in(capsys.readouterr().err)
        assert command[-3:] == ["--mel-sources", "wave", "decoded-2"]
    assert main(command) == 0
    assert Dataset(out).mel_sources == ("wave", "decoded-2")


def test_a_folder_that_no_flags_describe_is_not_added_to(audio_dir, tmp_path, capsys) -> None:
    out = tmp_path / "data"
    arguments = ["prepare", str(audio_dir), "--out", str(out), "--mel-sources", "wave", "--quiet"]
    assert main(arguments) == 0
    manifest = read_json(out / "manifest.json")
    manifest["settings"]["treatment"]["target_lufs"] = -23.0
    write_sealed(out / "manifest.json", manifest)
    assert main(arguments) == 1
    assert (
        "(treatment); use another --out, or --overwrite to replace it; it cannot be added to"
        in (capsys.readouterr().err)
    )
    del manifest["settings"]["treatment"]  # as version 0.1 wrote it
    write_sealed(out / "manifest.json", manifest)
    assert main(arguments) == 1
    assert "it cannot be added to" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_adding_alone_says_to_name_the_others_too(audio_dir, tmp_path, capsys) -> None:
    out, more = tmp_path / "data", make_audio(tmp_path / "more", 3, seconds=0.7)
    arguments = ["--out", str(out), "--mel-sources", "wave", "--quiet"]
    assert main(["prepare", str(audio_dir), *arguments]) == 0
    assert main(["prepare", str(more), *arguments]) == 1
    assert "to add recordings, name those as well" in capsys.readouterr().err
    assert main(["prepare", str(audio_dir), str(more), *arguments]) == 0
