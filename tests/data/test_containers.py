"""Tars, data sets of Hugging Face, manifests of lhotse: the arrays are those of the same files."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
import soundfile
from fake_codec import FakeCodec, make_audio, tree

from wgpt.data import merge, pieces, prepare
from wgpt.data.inputs import collect
from wgpt.errors import DataError

OPTIONS = {"codec": FakeCodec(), "split_by": "group", "valid_fraction": 0.3, "jobs": 1}
NOWHERE = Path("/nonexistent-output")
SOUND = "sound + more/1"  # a column


@pytest.fixture(scope="module")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings in two folders, one broken, and texts beside them."""
    folder = make_audio(tmp_path_factory.mktemp("audio"), n_files=8)
    (folder / "speech" / "broken.wav").write_bytes(b"RIFFno sound")
    for path in sorted(folder.rglob("*.*")):
        path.with_suffix(".txt").write_text(f"what {path.stem} says")
    return folder


@pytest.fixture(scope="module")
def plain(audio_dir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one run over the folder."""
    out = tmp_path_factory.mktemp("plain") / "data"
    prepare(audio_dir, out, **OPTIONS)
    return tree(out)


def arrays(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if name.endswith(".npy")}


def sounds(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.*") if p.suffix != ".txt")


@pytest.fixture
def no_pickle(monkeypatch):
    """Whatever reads a pickle fails."""

    def refused(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)


def pack(folder: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as tar:
        tar.add(folder, ".")
    return target


def test_a_tar_has_the_bytes_of_its_folder(audio_dir, plain, tmp_path: Path) -> None:
    prepare(pack(audio_dir, tmp_path / "a.tar"), tmp_path / "data", **OPTIONS)
    assert tree(tmp_path / "data") == plain


def test_a_tar_at_an_address_in_parts(audio_dir, plain, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(pack(audio_dir, tmp_path / "a.tar")), "/tars/a.tar")
    for i in (1, 2):
        prepare("memory://tars/*.tar", tmp_path / f"{i}", shard=(i, 2), **OPTIONS)
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "data", codec=FakeCodec())
    fs.store.clear()
    assert tree(tmp_path / "data") == plain


def test_shards_of_webdataset(audio_dir, plain, tmp_path: Path, no_pickle) -> None:
    """Written by its own writer; its own reader gives the same keys and bytes."""
    wds = pytest.importorskip("webdataset")
    paths = sounds(audio_dir)
    shards = [tmp_path / "000.tar", tmp_path / "001.tar"]
    for shard, chosen in zip(shards, (paths[::2], paths[1::2]), strict=True):
        with wds.TarWriter(str(shard)) as writer:
            for path in chosen:
                key = path.relative_to(audio_dir).with_suffix("").as_posix()
                text = path.with_suffix(".txt").read_text()
                pickled = pickle.dumps(shard.name)
                sample = {"txt": text, "pickle": pickled, path.suffix[1:]: path.read_bytes()}
                writer.write({"__key__": key, **sample})
    prepare(shards, tmp_path / "data", **OPTIONS)
    assert arrays(tree(tmp_path / "data")) == arrays(plain)
    entries = collect(shards, [], [], NOWHERE).entries
    ours = {}
    for entry in entries:
        with pieces.opened(entry.path) as file:
            ours[Path(entry.name).with_suffix("").as_posix()] = file.read_bytes()
    theirs = {}
    for sample in wds.WebDataset([str(shard) for shard in shards], shardshuffle=False):
        (suffix,) = set(sample) & {"wav", "flac", "aiff"}
        theirs[sample["__key__"]] = sample[suffix]
    assert ours == theirs and len(ours) == len(paths)


def test_damaged_tars(audio_dir, tmp_path: Path) -> None:
    packed = pack(audio_dir, tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(packed[: len(packed) * 2 // 3])
    inputs = collect([tmp_path / "cut.tar"], [], [], NOWHERE)
    assert 0 < len(inputs.entries) < 9
    (named,) = inputs.unreadable
    assert named["path"] == "cut.tar" and "the tar is damaged" in named["reason"]
    manifest = prepare(tmp_path / "cut.tar", tmp_path / "data", **OPTIONS | {"valid_fraction": 0})
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert "the tar is damaged" in reasons["cut.tar"]
    assert any("bytes before it does" in reason for reason in reasons.values())
    pack(audio_dir, tmp_path / "packed.tar", "w:gz")
    (tmp_path / "none.tar").write_bytes(b"not a tar" * 100)
    for name in ("packed.tar", "none.tar"):
        with pytest.raises(DataError, match=rf"{name}: must be a tar without compression, got: "):
            collect([tmp_path / name], [], [], NOWHERE)


def test_members_that_are_no_files_and_names_that_lead_out(audio_dir, tmp_path: Path) -> None:
    content = sounds(audio_dir)[0].read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("../../up.wav", tarfile.REGTYPE), ("/abs.wav", tarfile.REGTYPE),
                           ("nameless", tarfile.REGTYPE),
                           ("caf\udce9+%.wav", tarfile.REGTYPE),
                           ("x" * 300 + ".wav", tarfile.REGTYPE), ("link.wav", tarfile.SYMTYPE),
                           ("pipe.wav", tarfile.FIFOTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content))
    inputs = collect([tmp_path / "a.tar"], [], [], NOWHERE)
    assert inputs.other == ["link.wav", "pipe.wav"]
    for entry in inputs.entries:
        with pieces.opened(entry.path) as file:
            assert file.read_bytes() == content and file.parent.name.startswith("wgpt-")
    names = {Path(entry.name).name for entry in inputs.entries}
    assert names == {"abs.wav", "nameless", "caf\udce9+%.wav", "x" * 300 + ".wav"}
    assert inputs.n_hidden == 1  # "..": a name that begins with a dot


def dataset_of(datasets, audio_dir: Path, paths: list[Path]):
    """Sound as it lies, the folder as the speaker."""
    rows = {
        "text": [path.with_suffix(".txt").read_text() for path in paths],
        SOUND: [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "speaker": [path.parent.name for path in paths],
    }
    return datasets.Dataset.from_dict(rows).cast_column(SOUND, datasets.Audio())


def test_datasets_of_hugging_face(audio_dir, plain, tmp_path: Path, monkeypatch, no_pickle) -> None:
    """Saved to disk, as one parquet file, and with paths in place of bytes."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = sounds(audio_dir)
    made = dataset_of(datasets, audio_dir, paths)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    named = datasets.Dataset.from_dict(
        {"sound": [str(path) for path in paths], "group": [path.parent.name for path in paths]}
    ).cast_column("sound", datasets.Audio())
    named.to_parquet(str(tmp_path / "named.parquet"))
    for name in ("saved", "a.parquet", "named.parquet"):
        manifest = prepare(tmp_path / name, tmp_path / f"{name}-data", **OPTIONS)
        assert arrays(tree(tmp_path / f"{name}-data")) == arrays(plain)
        assert [entry["path"] for entry in manifest["skipped"]] == ["broken.wav"]


def test_splits_and_columns_of_a_dataset(audio_dir, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = sounds(audio_dir)
    splits = {"train": paths[2:], "validation.clean": paths[:1], "test": paths[1:2]}
    made = {name: dataset_of(datasets, audio_dir, chosen) for name, chosen in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    entries = collect([tmp_path / "saved"], [], [], NOWHERE).entries
    got = {entry.name: (entry.split, entry.group) for entry in entries}
    assert got[paths[0].name] == ("valid", paths[0].parent.name)
    assert got[paths[1].name][0] == "test" and got[paths[2].name][0] == "train"
    with pytest.raises(OSError, match=r"cannot be read from .*train"):  # skipped, by this reason
        with pieces.opened(pieces.piece("row", tmp_path / "saved" / "train", "a", 99, SOUND)):
            pass
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(DataError, match=r"must have one column of sound .*, got none among text"):
        collect([tmp_path / "texts"], [], [], NOWHERE)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet: must be a data set of Hugging Face"):
        collect([tmp_path / "bad.parquet"], [], [], NOWHERE)
    with pytest.raises(DataError, match="a data set must lie on this machine; copy it here first"):
        fs = fsspec.filesystem("memory")
        fs.pipe_file("/a.parquet", b"PAR1")
        collect(["memory://a.parquet"], [], [], NOWHERE)


def test_recordings_of_lhotse(audio_dir, plain, tmp_path: Path, no_pickle) -> None:
    lhotse = pytest.importorskip("lhotse")
    paths = [path for path in sounds(audio_dir) if path.stem != "broken"]
    recordings = lhotse.RecordingSet.from_recordings(map(lhotse.Recording.from_file, paths))
    cuts = lhotse.CutSet.from_manifests(recordings=recordings)
    recordings.to_file(tmp_path / "recordings.jsonl.gz")
    cuts.to_file(tmp_path / "cuts.jsonl")
    for name in ("recordings.jsonl.gz", "cuts.jsonl"):
        prepare(tmp_path / name, tmp_path / f"{name}-data", **OPTIONS)
        assert arrays(tree(tmp_path / f"{name}-data")) == arrays(plain)


def test_cuts_of_lhotse_are_spans(audio_dir, tmp_path: Path) -> None:
    """Sample for sample those of the recording; the speaker is the group; the rest is named."""
    lhotse = pytest.importorskip("lhotse")
    path = audio_dir / "speech" / "01.flac"
    wave, rate = soundfile.read(path, dtype="float32")
    recording = lhotse.Recording.from_file(path)
    segment = lhotse.SupervisionSegment("s", "01", 0.1, 0.4, speaker="Ada")
    cut = lhotse.MonoCut("a/b", 0.1, 0.4, 0, [segment], recording=recording)
    command = lhotse.audio.AudioSource("command", [0], f"touch {tmp_path}/ran")
    run = lhotse.Recording("run", [command], rate, len(wave), len(wave) / rate)
    beyond = lhotse.MonoCut("beyond", 0.9, 9.0, 0, recording=recording)
    odd = [cut.perturb_speed(1.1), cut.pad(5.0), lhotse.MonoCut("run", 0, 0.5, 0, recording=run)]
    lhotse.CutSet.from_cuts([cut, beyond, *odd]).to_file(tmp_path / "cuts.jsonl.gz")
    inputs = collect([tmp_path / "cuts.jsonl.gz"], [], [], NOWHERE)
    first, second = sorted(inputs.entries, key=lambda entry: entry.name)
    assert (first.name, first.group) == ("a_b.wav", "Ada")
    with pieces.opened(first.path) as file:
        got, got_rate = soundfile.read(file, dtype="float32")
    assert got_rate == rate and (got == wave[2400:12000]).all()
    assert len(inputs.unreadable) == 3 and not (tmp_path / "ran").exists()
    reasons = " ".join(entry["reason"] for entry in inputs.unreadable)
    assert "a MixedCut is no span" in reasons and "transforms" in reasons and "command" in reasons
    with pytest.raises(OSError, match=r"cannot be cut from .*: its recording has \d+ samples from"):
        with pieces.opened(second.path):
            pass


def test_json_lines_that_are_a_list_stay_one(audio_dir, tmp_path: Path) -> None:
    path = sounds(audio_dir)[0]
    (tmp_path / "l.jsonl").write_text(json.dumps({"path": str(path), "type": "speech"}) + "\n")
    (only,) = collect([tmp_path / "l.jsonl"], [], [], NOWHERE).entries
    assert only.path == path
    (tmp_path / "cuts.jsonl").write_text('{"id": "a", "type": "MonoCut"}\n')
    pytest.importorskip("lhotse")
    with pytest.raises(DataError, match=r"cuts\.jsonl: must be a manifest of lhotse, got: "):
        collect([tmp_path / "cuts.jsonl"], [], [], NOWHERE)


@pytest.mark.parametrize("name, package", [("saved", "datasets"), ("cuts.jsonl", "lhotse")])
def test_without_its_package_an_input_says_what_to_install(
    name, package, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "saved").mkdir()
    for file in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / file).write_text("{}")
    (tmp_path / "cuts.jsonl").write_text('{"id": "a", "type": "MonoCut"}\n')
    with pytest.raises(DataError, match=rf"{name}: .*: pip install 'wgpt\[{package}\]'$"):
        collect([tmp_path / name], [], [], NOWHERE)
