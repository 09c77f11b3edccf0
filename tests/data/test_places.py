"""Recordings and parts at addresses of fsspec: the bytes are those of the same files here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
from fake_codec import FakeCodec, interrupt, make_audio, tree

from wgpt.audio import AudioError
from wgpt.cli import main
from wgpt.data import encode, merge, places, prepare
from wgpt.data.inputs import collect
from wgpt.errors import ConfigError, DataError

OPTIONS = {"codec": FakeCodec(), "split_by": "group", "valid_fraction": 0.3, "jobs": 1}
NOWHERE = Path("/nonexistent-output")


@pytest.fixture(scope="module")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, a copy, a broken file, one without a suffix, others, and hidden ones."""
    folder = make_audio(tmp_path_factory.mktemp("audio"), n_files=8)
    first = sorted(folder.rglob("*.wav"))[0]
    shutil.copy(first, folder / "copy.wav")
    shutil.copy(sorted(folder.rglob("*.flac"))[0], folder / "speech" / "nameless")
    (folder / "broken.wav").write_bytes(b"RIFFno sound")
    (folder / "speech" / "notes.txt").write_text("where and when")
    (folder / ".hidden" / "deep").mkdir(parents=True)
    for name in ("a.wav", "deep/b.wav"):
        shutil.copy(first, folder / ".hidden" / name)
    return folder


@pytest.fixture(scope="module")
def plain(audio_dir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one run over the folder."""
    out = tmp_path_factory.mktemp("plain") / "data"
    prepare(audio_dir, out, **OPTIONS)
    return tree(out)


@pytest.fixture
def memory(audio_dir):
    """The recordings at memory://audio."""
    fs = fsspec.filesystem("memory")
    fs.put(str(audio_dir), "/audio", recursive=True)
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def bucket(audio_dir):
    """The recordings at s3://sounds/audio of a server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("sounds")
        fs.put(str(audio_dir), "sounds/audio", recursive=True)
        yield fs
    server.stop()


def test_a_folder_in_memory_has_the_bytes_of_a_folder(memory, plain, tmp_path: Path) -> None:
    manifest = prepare("memory://audio", tmp_path / "data", **OPTIONS)
    assert tree(tmp_path / "data") == plain
    assert manifest["account"]["hidden"] == 1
    assert [entry["path"] for entry in manifest["skipped"]] == ["broken.wav"]
    again = prepare("memory://audio", tmp_path / "data", **OPTIONS)
    assert again == manifest and tree(tmp_path / "data") == plain


@pytest.mark.slow
def test_a_folder_on_s3_has_the_bytes_of_a_folder(bucket, plain, tmp_path: Path) -> None:
    """Also where worker processes read it, and parts are written there and merged from there."""
    prepare("s3://sounds/audio", tmp_path / "data", **{**OPTIONS, "jobs": 2})
    assert tree(tmp_path / "data") == plain
    for i in (1, 2):
        prepare("s3://sounds/audio", f"s3://sounds/parts/{i}", shard=(i, 2), **OPTIONS)
    merge("s3://sounds/parts/*", tmp_path / "merged", codec=FakeCodec())
    assert tree(tmp_path / "merged") == plain
    assert not bucket.exists("s3://sounds/parts/.partial")


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_sentence(bucket, tmp_path: Path, capsys) -> None:
    arguments = ["prepare", "s3://none/audio", "--out", str(tmp_path / "data")]
    assert main(arguments) == 1
    assert capsys.readouterr().err.endswith(
        "s3://none/audio: must be a folder, an audio file or a list, got nothing there\n"
    )


def test_files_globs_and_lists_at_addresses(memory, audio_dir, tmp_path: Path) -> None:
    inputs = collect(["memory://audio/music/*.wav"], [], [], NOWHERE)
    assert [entry.name for entry in inputs.entries] == ["00.wav", "03.wav", "06.wav"]
    memory.pipe_file("/odd/a[1].wav", b"RIFF")
    (odd,) = collect(["memory://odd/a[1].wav"], [], [], NOWHERE).entries
    assert odd.name == "a[1].wav"
    memory.pipe_file("/audio/lists/l.csv", b"path,group\n../music/00.wav,x\n")
    (listed,) = collect(["memory://audio/lists/l.csv"], [], [], NOWHERE).entries
    assert (listed.path, listed.name, listed.group) == (
        "memory://audio/music/00.wav", "00.wav", "x"
    )  # fmt: skip
    (tmp_path / "l.txt").write_text("memory://audio/music/00.wav\nmemory://audio/speech/01.flac\n")
    both = collect([tmp_path / "l.txt"], [], [], NOWHERE).entries
    assert [(entry.name, entry.group) for entry in both] == [
        ("music/00.wav", "music"), ("speech/01.flac", "speech")
    ]  # fmt: skip
    names = [e.name for e in collect(["memory://audio", audio_dir], [], [], NOWHERE).entries]
    assert {name.partition("/")[0] for name in names} == {"audio", audio_dir.name}
    with pytest.raises(ConfigError, match=r"memory://audio/\*\.mp3: matches nothing there"):
        collect(["memory://audio/*.mp3"], [], [], NOWHERE)
    with pytest.raises(AudioError, match=r"memory://none: must be a folder, .*, got nothing there"):
        collect(["memory://none"], [], [], NOWHERE)


@pytest.mark.parametrize("problem", [RuntimeError, ConnectionResetError])
def test_what_is_gone_is_skipped_and_a_network_that_failed_fails_the_run(
    memory, tmp_path: Path, monkeypatch, problem
) -> None:
    (tmp_path / "l.txt").write_text("memory://audio/music/00.wav\nmemory://audio/gone.wav\n")
    manifest = prepare(tmp_path / "l.txt", tmp_path / "data", **OPTIONS | {"valid_fraction": 0})
    assert manifest["skipped"] == [{"path": "gone.wav", "reason": "no such file"}]

    def failing(*args, **kwargs):
        raise problem("the connection was reset")

    monkeypatch.setattr(type(memory), "get_file", failing)
    with pytest.raises(DataError, match="the connection was reset; free the cause and run again"):
        prepare("memory://audio", tmp_path / "other", **OPTIONS)
    assert not (tmp_path / "other").exists()


def test_an_object_that_changes_between_readings_is_skipped(memory, tmp_path: Path) -> None:
    """By its content: no time of change is trusted that a server gives."""
    job = encode.Job("memory://audio/music/00.wav", "0" * 64, 0, 1, str(tmp_path / "p"))
    from wgpt.config import MelConfig
    from wgpt.data.treatment import Treatment

    encoder = encode.Encoder(FakeCodec(), MelConfig(), ("wave",), Treatment(), 1e9)
    assert encoder.encode_file(job).reason == "must not change while it is read"
    assert not (tmp_path / "p").exists()


def test_an_interrupted_part_at_an_address_resumes(
    memory, audio_dir, plain, tmp_path: Path, monkeypatch
) -> None:
    """On any machine: nothing of it is kept here. Other settings delete what they do not fit."""
    seen = interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        prepare(audio_dir, "memory://part", shard=(1, 1), **OPTIONS)
    assert len(memory.glob("/part/.partial/*.safetensors")) == 1
    with pytest.raises(DataError, match=r"memory://part: is no finished part"):
        merge("memory://part", tmp_path / "data", codec=FakeCodec())
    n_before = len(seen)
    prepare(audio_dir, "memory://part", shard=(1, 1), **OPTIONS)
    assert len(seen) - n_before == 9 - 1  # the broken one is tried again; copies are not encoded
    merge("memory://part", tmp_path / "data", codec=FakeCodec())
    assert tree(tmp_path / "data") == plain

    changed = OPTIONS | {"keep_silence": True}
    with pytest.raises(DataError, match=r"memory://part: holds part 1 of 1, perhaps with other"):
        prepare(audio_dir, "memory://part", shard=(1, 1), **changed)
    monkeypatch.setattr(encode.Encoder, "encode_file", lambda self, job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(audio_dir, "memory://part", shard=(1, 1), overwrite=True, **changed)
    assert memory.glob("/part/.partial/*.safetensors") == []
    settings = json.loads(memory.cat_file("/part/.partial/settings.json"))
    assert settings["treatment"]["trim_silence"] is False


def test_a_part_is_not_written_among_other_files(memory, audio_dir) -> None:
    with pytest.raises(DataError, match="memory://audio: must be new, empty, or a part that wgpt"):
        prepare(audio_dir, "memory://audio", shard=(1, 1), **OPTIONS)
    with pytest.raises(ConfigError, match=r"out must be a folder of this machine.*--shard I/N"):
        prepare(audio_dir, "memory://data", **OPTIONS)


def test_an_address_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        AudioError, match=r"^gs://b/a: needs a package .*: pip install 'wgpt\[gs\]'"
    ):
        places.Remote("gs://b/a")
    monkeypatch.setitem(sys.modules, "dropboxdrivefs", None)
    with pytest.raises(ConfigError, match=r"dropbox://a: needs a package .*: .*dropboxdrivefs"):
        places.filesystem("dropbox://a")
    with pytest.raises(ConfigError, match=r"^s4://a: no filesystem of fsspec is called s4$"):
        places.filesystem("s4://a")


def test_the_hub_is_not_read_unless_downloads_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("hf://datasets/user/sounds/a.wav\n")
    for given in ("hf://datasets/user/sounds", tmp_path / "l.txt"):
        with pytest.raises(ConfigError, match=r"hf://.*: lies on the .* Hub; .* --download"):
            prepare(given, tmp_path / "data", **OPTIONS)


@pytest.mark.parametrize("text", ["s3://b/a", "hf://datasets/u/d", "file:///a", "A1+b://c"])
def test_an_address_is_never_a_path(text) -> None:
    assert places.is_address(text) and places.places(text) == [text]
    assert not places.is_address(str(Path(text)))
    assert not any(map(places.is_address, ("a/b.wav", "/a", "a:b", "://a", Path(text))))
