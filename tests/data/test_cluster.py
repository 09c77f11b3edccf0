"""prepare --engine ray: the bytes of one process, whatever dies; on two nodes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from fake_codec import DeadlyOnce, FakeCodec, Witness, make_audio, tree

import wgpt
from wgpt.cli import main
from wgpt.data import cluster, prepare
from wgpt.data.progress import Progress
from wgpt.errors import ConfigError, DataError

ON_TWO_HOSTS = """
import json, sys, time
from pathlib import Path
import ray
from fake_codec import Witness
from wgpt.data import prepare
recordings, out, seen, options = sys.argv[1:]
ray.init(log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.1)
ray.shutdown()
codec = Witness(Path(seen), delay_s=0.3)
prepare(recordings, out, codec=codec, engine="ray", **json.loads(options))
"""
ROOT, PACKAGE = Path(__file__).parents[2], Path(wgpt.__file__).parent
OPTIONS = {"split_by": "group", "valid_fraction": 0.3, "keep_loudness": True, "progress": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the source tree, whose wgpt has no compiled module: Ray's workers look there first."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, a copy, a broken file, and one that is no sound."""
    folder = make_audio(tmp_path_factory.mktemp("audio"), n_files=10)
    shutil.copy(sorted(folder.rglob("*.wav"))[0], folder / "copy.wav")
    (folder / "broken.wav").write_bytes(b"RIFFno sound")
    (folder / "notes.txt").write_text("where and when")
    return folder


@pytest.fixture(scope="module")
def plain(audio_dir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one process."""
    out = tmp_path_factory.mktemp("plain") / "data"
    prepare(audio_dir, out, codec=FakeCodec(), jobs=1, **OPTIONS)
    return tree(out)


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes with a CPU each, to which `prepare` connects."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE.parent), str(ROOT / "tests")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args=options)
        made.add_node(num_cpus=1, object_store_memory=80 << 20)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one_process(
    nodes, audio_dir, plain, tmp_path: Path, caplog, monkeypatch
) -> None:
    (tmp_path / "seen").mkdir()
    codec = Witness(tmp_path / "seen", delay_s=0.3)
    monkeypatch.chdir(audio_dir.parent)  # tasks run elsewhere
    manifest = prepare(audio_dir.name, tmp_path / "data", codec=codec, engine="ray", **OPTIONS)
    assert tree(tmp_path / "data") == plain
    seen = {path.name.partition("-")[0] for path in (tmp_path / "seen").iterdir()}
    assert len(seen) == 2, "both nodes encoded"
    assert [entry["path"] for entry in manifest["skipped"]] == ["broken.wav"]
    assert caplog.text.count("skipped broken.wav: must be audio") == 1
    with pytest.raises(DataError, match=r"holds prepared data; use another --out, or --overwrite"):
        prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), engine="ray", **OPTIONS)


@pytest.mark.slow
def test_two_hosts_give_the_bytes_of_one_process(hosts, audio_dir, plain, tmp_path: Path) -> None:
    """Two network namespaces, each with a node that `ray start` starts there."""
    pytest.importorskip("ray")
    (tmp_path / "seen").mkdir()
    (head, address), (other, second) = hosts
    path = os.pathsep.join([str(PACKAGE.parent), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"RAY_ADDRESS": f"{address}:6379", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}

    def start(host: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        command += ["--object-store-memory=80000000", *flags]
        with open(tmp_path / f"{host}.log", "w") as log:
            return subprocess.Popen(["ip", "netns", "exec", host, *command],
                                    env=env, stdout=log, stderr=subprocess.STDOUT)  # fmt: skip

    here = f"--node-ip-address={address}"
    start(head, "--head", "--port=6379", "--include-dashboard=false", here)
    start(other, f"--address={address}:6379", f"--node-ip-address={second}")
    arguments = [str(audio_dir), str(tmp_path / "data"), str(tmp_path / "seen")]
    done = subprocess.run(
        ["ip", "netns", "exec", head, sys.executable, "-c", ON_TWO_HOSTS, *arguments,
         json.dumps(OPTIONS)], env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "data") == plain
    seen = {path.name.partition("-")[0] for path in (tmp_path / "seen").iterdir()}
    assert len(seen) == 2, "both hosts encoded"


@pytest.mark.slow
def test_a_killed_worker_is_replaced(nodes, audio_dir, plain, tmp_path: Path, caplog) -> None:
    codec = DeadlyOnce(tmp_path / "marker")
    prepare(audio_dir, tmp_path / "data", codec=codec, engine="ray", **OPTIONS)
    assert (tmp_path / "marker").exists() and tree(tmp_path / "data") == plain
    assert caplog.text.count("of 16: ") == 1  # the part that was made again


@pytest.mark.slow
def test_a_file_that_kills_its_worker_is_named(nodes, audio_dir, plain, tmp_path: Path) -> None:
    """In whichever process; the part's other files are encoded."""
    folder = shutil.copytree(audio_dir, tmp_path / "audio")
    soundfile.write(folder / "loud.wav", np.full(3200, 5.0), 24_000, subtype="FLOAT")
    manifest = prepare(folder, tmp_path / "data", codec=FakeCodec(), engine="ray", **OPTIONS)
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert "died twice" in reasons.pop("loud.wav") and list(reasons) == ["broken.wav"]
    got = tree(tmp_path / "data")
    arrays = [name for name in plain if name.endswith(".npy")]
    assert {name: got[name] for name in arrays} == {name: plain[name] for name in arrays}


@pytest.mark.slow
def test_a_node_that_goes_is_done_without(nodes, audio_dir, plain, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    lost = nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
    removed = []

    def remove() -> None:
        stop = time.monotonic() + 120
        while time.monotonic() < stop and not removed:
            if any(p.name.startswith(lost.node_id) for p in (tmp_path / "seen").iterdir()):
                nodes.remove_node(lost, allow_graceful=False)
                removed.append(lost)
            time.sleep(0.05)

    thread = threading.Thread(target=remove)
    thread.start()
    codec = Witness(tmp_path / "seen", delay_s=1.0)
    prepare(audio_dir, tmp_path / "data", codec=codec, engine="ray", **OPTIONS)
    thread.join()
    assert removed and tree(tmp_path / "data") == plain


@pytest.mark.slow
def test_an_interrupted_run_resumes(nodes, audio_dir, plain, tmp_path: Path, monkeypatch) -> None:
    """What was finished is not encoded again; parts at an address are merged from there."""

    def interrupted(self, n_files):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), engine="ray", **OPTIONS)
    finished = list((tmp_path / "data").glob(".parts/*/.partial/*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in finished}
    parts = f"file://{tmp_path}/parts"
    shutil.copytree(tmp_path / "data" / ".parts", tmp_path / "parts")
    prepare(audio_dir, tmp_path / "other", codec=FakeCodec(), engine="ray", parts=parts, **OPTIONS)
    assert tree(tmp_path / "other") == plain and len(list((tmp_path / "parts").iterdir())) == 16
    kept = []
    whole = cluster._tell

    def watching(record):
        kept.extend(path for path in before if path.stat().st_mtime_ns == before[path])
        whole(record)

    monkeypatch.setattr(cluster, "_tell", watching)
    prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), engine="ray", **OPTIONS)
    assert tree(tmp_path / "data") == plain
    assert set(kept) == set(before)


@pytest.mark.slow
def test_a_command_with_a_codec_beside_it(
    nodes, audio_dir, tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(PACKAGE / "assets" / "mini", tmp_path / "codec")
    monkeypatch.chdir(tmp_path)  # tasks run elsewhere
    arguments = ["prepare", str(audio_dir), "--quiet", "--mel-sources", "wave", "--jobs", "2"]
    arguments += ["--codec", "codec"]
    for name, engine in (("here", []), ("there", ["--engine", "ray"])):
        assert main([*arguments, *engine, "--out", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["account"]["used"] == 10
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def test_a_cluster_that_cannot_be_joined_is_one_sentence(audio_dir, tmp_path: Path, monkeypatch):
    def refused(**options):
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    fake = SimpleNamespace(is_initialized=lambda: False, init=refused)
    monkeypatch.setitem(sys.modules, "ray", fake)
    errors = SimpleNamespace(RayError=Exception, RayTaskError=Exception)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    with pytest.raises(DataError, match=r"Failed to connect .* at 10\.0\.0\.1:6379; check RAY_ADD"):
        prepare(audio_dir, tmp_path / "data", codec=FakeCodec(), engine="ray", **OPTIONS)


def test_what_a_node_does_not_see_is_named(audio_dir, tmp_path: Path) -> None:
    path = audio_dir / "copy.wav"
    entry = cluster.Entry(path, "copy.wav", ".")
    record = {"unreadable_files": [{"path": "copy.wav", "reason": "must be a regular file"}]}
    with pytest.raises(DataError, match=r"copy\.wav: a node cannot read it and this machine can"):
        cluster._check_seen("s3://bucket/part", [entry], record)
    with pytest.raises(DataError, match=r"this machine does not see it; .* --parts FOLDER or s3:"):
        cluster._check_seen(tmp_path / "part", [], {"unreadable_files": []})


def test_the_number_of_parts_is_a_power_of_two() -> None:
    numbers = [cluster._count_parts(n) for n in (1, 2, 3, 16, 17, 1000, 10**7)]
    assert numbers == [1, 2, 4, 16, 32, 1024, 1024]


def test_the_engine_and_its_flags_are_checked(audio_dir, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "data"
    with pytest.raises(ConfigError, match="--engine makes all parts and --shard one"):
        prepare(audio_dir, out, engine="ray", shard=(1, 2))
    with pytest.raises(ConfigError, match="--parts is for --engine ray"):
        prepare(audio_dir, out, parts="s3://bucket/parts")
    with pytest.raises(ConfigError, match="engine must be ray or none, got 'dask'"):
        prepare(audio_dir, out, engine="dask")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"^--engine ray needs Ray: pip install 'wgpt\[ray\]'$"):
        prepare(audio_dir, out, codec=FakeCodec(), engine="ray", **OPTIONS)
    assert not list(out.glob("*"))
    prepare(audio_dir, out, codec=FakeCodec(), jobs=1, **OPTIONS)  # and nothing is in the way
