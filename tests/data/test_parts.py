"""prepare in parts, on as many machines: merged they have the bytes of one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
from fake_codec import FakeCodec, interrupt, make_audio, tree

from wgpt.cli import main
from wgpt.data import Dataset, assemble, merge, pipeline, prepare
from wgpt.errors import ConfigError, DataError

N = 4


@pytest.fixture(scope="module")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, some of them copies, silent, broken, or no sound at all."""
    folder = make_audio(tmp_path_factory.mktemp("audio"), n_files=14)
    first = sorted(folder.rglob("*.wav"))[0]
    for i in range(6):  # copies that fall into other parts
        shutil.copy(first, folder / f"copy-{i}.wav")
    wave, rate = soundfile.read(first)
    soundfile.write(folder / "again.flac", wave, rate)  # the same samples in other bytes
    (folder / "broken.wav").write_bytes(b"RIFFno sound")
    (folder / "speech" / "notes.txt").write_text("where and when")
    (folder / "pipe.wav").mkdir()
    return folder


@pytest.fixture(scope="module")
def plain(audio_dir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one run."""
    out = tmp_path_factory.mktemp("plain") / "data"
    prepare(audio_dir, out, codec=FakeCodec(), split_by="group", valid_fraction=0.3)
    return tree(out)


def prepare_part(audio_dir: Path, out: Path, i: int, n: int = N, **changes):
    options = {"codec": FakeCodec(), "split_by": "group", "valid_fraction": 0.3, **changes}
    return prepare(audio_dir, out, shard=(i, n), **options)


@pytest.fixture(scope="module")
def made(audio_dir, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("made")
    parts = [folder / f"part-{i}" for i in range(1, N + 1)]
    for i, part in enumerate(parts, 1):
        prepare_part(audio_dir, part, i)
    return parts


@pytest.fixture
def parts(made, tmp_path: Path) -> list[Path]:
    """Copies that a test may damage."""
    return [shutil.copytree(part, tmp_path / part.name) for part in made]


def test_merged_parts_have_the_bytes_of_one_run(parts, plain, tmp_path: Path) -> None:
    before = [tree(part) for part in parts]
    merge(parts[::-1], tmp_path / "data", codec=FakeCodec())  # in any order
    assert tree(tmp_path / "data") == plain
    assert [tree(part) for part in parts] == before
    counts = [len(json.loads((part / "part.json").read_text())["entries"]) for part in parts]
    assert counts == [0, 8, 7, 7]  # by their hashes; one has nothing to do
    Dataset(tmp_path / "data").verify()


def test_parts_may_lie_in_the_folder_that_they_become(made, plain, tmp_path: Path) -> None:
    parts = [shutil.copytree(part, tmp_path / "data" / part.name) for part in made]
    merge(parts, tmp_path / "data", codec=FakeCodec())
    got = tree(tmp_path / "data")
    assert {name: got[name] for name in plain} == plain
    with pytest.raises(DataError, match="holds prepared data; use another --out, or --overwrite"):
        merge(parts, tmp_path / "data", codec=FakeCodec())
    merge(parts, tmp_path / "data", codec=FakeCodec(), overwrite=True)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_merge_that_failed_is_merged_again(made, plain, tmp_path: Path, fault) -> None:
    """In the middle of writing, into a folder of its own and into that of the parts."""
    for out in (tmp_path / "data", made[0].parent):
        with pytest.MonkeyPatch.context() as patch:

            def failing(*args, **kwargs):
                raise fault

            patch.setattr(assemble, "write_sealed", failing)
            with pytest.raises((KeyboardInterrupt, DataError)):
                merge(made, out, codec=FakeCodec())
        merge(made, out, codec=FakeCodec())
        got = tree(out)
        assert {name: got[name] for name in plain} == plain
        assert not (out / ".partial").exists() and not (out / ".building").exists()
        for name in plain:
            (out / name).unlink()
        for name in ("train", "valid", "test"):
            shutil.rmtree(out / name)


def test_a_part_that_was_interrupted_resumes(
    audio_dir, made, plain, tmp_path: Path, monkeypatch
) -> None:
    seen = interrupt(monkeypatch, 3)
    i = max(range(N), key=lambda i: len(list((made[i] / ".partial").iterdir()))) + 1
    with pytest.raises(KeyboardInterrupt):
        prepare_part(audio_dir, tmp_path / "part", i, jobs=1)
    with pytest.raises(DataError, match=r"is no finished part.*--shard\) resumes it"):
        merge([tmp_path / "part"], tmp_path / "data", codec=FakeCodec())
    n_before = len(seen)
    prepare_part(audio_dir, tmp_path / "part", i, jobs=1)
    assert len(seen) - n_before == len(list((made[i - 1] / ".partial").glob("*.safetensors"))) - 2
    parts = [tmp_path / "part", *made[: i - 1], *made[i:]]
    merge(parts, tmp_path / "data", codec=FakeCodec())
    assert tree(tmp_path / "data") == plain


def other_settings(parts, audio_dir):
    shutil.rmtree(parts[1])
    prepare_part(audio_dir, parts[1], 2, keep_silence=True)


def other_number(parts, audio_dir):
    shutil.rmtree(parts[1])
    prepare_part(audio_dir, parts[1], 2, n=5)


def flipped(parts, audio_dir):
    path = sorted((parts[2] / ".partial").glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def other_recordings(parts, audio_dir):
    shutil.copytree(audio_dir, other := parts[0].parent / "other")
    shutil.rmtree(parts[1])
    (other / "speech" / "notes.txt").unlink()  # or a folder that one machine could not read
    prepare_part(other, parts[1], 2)


def flipped_record(parts, audio_dir):
    path = parts[2] / "part.json"
    path.write_text(path.read_text().replace('"n_hidden": 0', '"n_hidden": 1'))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda parts, _: parts.pop(2), r"part 3 of 4 is missing; make it with .* --shard 3/4"),
        (lambda parts, _: parts.append(parts[1]), r"part-2: is part 2 of 4, and so is .*part-2"),
        (flipped, r"part-3: is damaged: its finished file of .* is missing or changed; delete"),
        (flipped_record, r"part-3/part\.json"),
        (other_settings, r"part-2: was prepared with other settings than .*: treatment"),
        (other_recordings, r"part-2: was made of other recordings than .*part-1.*--overwrite"),
        (other_number, r"part-2: is part 2 of 5, .*part-1 is one of 4"),
        (lambda parts, _: parts.clear(), "at least one part is needed"),
    ],
)  # fmt: skip
def test_merge_names_the_part_at_fault(parts, audio_dir, tmp_path: Path, harm, words) -> None:
    harm(parts, audio_dir)
    with pytest.raises(DataError, match=words):
        merge(parts, tmp_path / "data", codec=FakeCodec())
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_merge_refuses_another_codec(parts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"parts were encoded by the codec .*fake.* is .*other"):
        merge(parts, tmp_path / "data", codec=FakeCodec("other"))


def test_a_part_is_not_replaced_by_another(parts, audio_dir) -> None:
    before = tree(parts[1])
    for i, changes in ((3, {}), (2, {"keep_silence": True})):
        with pytest.raises(DataError, match=r"holds part 2 of 4.*name another --out for part"):
            prepare_part(audio_dir, parts[1], i, **changes)
        assert tree(parts[1]) == before
    prepare_part(audio_dir, parts[1], 2)  # the same again: nothing to do
    assert tree(parts[1]) == before
    prepare_part(audio_dir, parts[1], 3, overwrite=True)
    assert json.loads((parts[1] / "part.json").read_text())["shard"] == [3, 4]


def test_a_merge_keeps_an_interrupted_preparation(parts, audio_dir, tmp_path, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio_dir, tmp_path / "data", codec=FakeCodec())
    before = tree(tmp_path / "data")
    with pytest.raises(DataError, match=r"holds an interrupted preparation.*use another --out"):
        merge(parts, tmp_path / "data", codec=FakeCodec())
    assert tree(tmp_path / "data") == before


def test_a_part_is_not_taken_for_data(parts, audio_dir) -> None:
    with pytest.raises(DataError, match="holds a part of a preparation; merge it"):
        prepare(audio_dir, parts[0], codec=FakeCodec())
    with pytest.raises(DataError, match=r"without manifest\.json"):
        Dataset(parts[0])


@pytest.mark.parametrize(
    "given", ["0/4", "5/4", "1", "1/", "a/b", "1/0", "-1/4", "1/1000000", "1.5/2"]
)
def test_shard_must_be_one_of_n(audio_dir, tmp_path: Path, capsys, given: str) -> None:
    arguments = [str(audio_dir), "--out", str(tmp_path / "part"), f"--shard={given}"]
    assert main(["prepare", *arguments]) == 2
    assert f"--shard must be I/N, part I of N with 1 <= I <= N <= 100000, got '{given}'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "part").exists()


def test_commands_make_and_merge_parts(audio_dir, tmp_path: Path, capsys) -> None:
    for i in (1, 2):
        arguments = [str(audio_dir / "speech"), "--out", str(tmp_path / f"part-{i}"), "--quiet"]
        assert main(["prepare", *arguments, f"--shard={i}/2", "--mel-sources", "wave"]) == 0
    said = capsys.readouterr().out
    assert "part 2 of 2:" in said and "wgpt merge PART ... --out DATA" in said
    parts = [str(tmp_path / f"part-{i}") for i in (1, 2)]
    assert main(["merge", *parts, "--out", str(tmp_path / "data")]) == 0
    assert "found 10 files: 9 used" in capsys.readouterr().out
    assert main(["merge", parts[0], "--out", str(tmp_path / "other"), "--json"]) == 1
    assert "part 2 of 2 is missing" in capsys.readouterr().err


def test_shards_of_one_are_the_whole(audio_dir, plain, tmp_path: Path) -> None:
    prepare_part(audio_dir, tmp_path / "part", 1, n=1)
    merge(tmp_path / "part", tmp_path / "data", codec=FakeCodec())
    assert tree(tmp_path / "data") == plain


def test_shard_pairs_are_checked_in_python_too(audio_dir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shard must be I/N, .* got \(5, 4\)"):
        prepare_part(audio_dir, tmp_path / "part", 5)
