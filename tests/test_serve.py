"""wgpt serve over HTTP, with real processes: what it makes, what it refuses, how it ends."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import LIMITS, Server, join, needs_gradio, start, upload, wait_for

from wgpt import audio, cli, desk, loopback, serve
from wgpt.config import ConfigError
from wgpt.generate import Sampling, Speaker

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks and signals")


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory) -> Iterator[Server]:
    needs_gradio()
    with start(tiny_run, tmp_path_factory.mktemp("serve"), *LIMITS) as running:
        yield running


@pytest.fixture
def prompt(recordings) -> Path:
    return sorted(recordings.rglob("*.wav"))[0]


# -- what it makes --------------------------------------------------------------------------------


def test_serve_streams_what_generate_makes(server, tiny_run, prompt):
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False)
    arguments = [handle_file(str(prompt)), "tiny", 1.0, False, 1.0, 100, 1.0, 0.5, 0, 7]
    updates = list(client.submit(*arguments, api_name="/continue"))
    pcms = [update[0]["pcm"] for update in updates]
    assert len(updates) >= 4  # it streams
    assert all(late.startswith(early) for early, late in itertools.pairwise(pcms))
    assert 0 < len(base64.b64decode(pcms[0])) <= 2 * 320 * 6
    assert [update[0]["done"] for update in updates][-1] is True

    speaker = Speaker.open(tiny_run)
    steps = list(speaker.stream(audio.read(prompt), 75, Sampling(top_k=100), seed=7))
    expected = np.concatenate([step.wave for step in steps])
    close = {"rtol": 0, "atol": 1.6 / 32767}  # rounded twice: there and by another thread count
    np.testing.assert_allclose(decoded(pcms[-1]), expected, **close)
    assert updates[-1][3].split() == [str(step.tokens[0]) for step in steps]
    assert "made 1.0 of 1.0 s" in updates[-1][1]
    assert updates[-1][2]["plot"].startswith("data:image/")

    arguments[3] = True  # with the prompt in front
    pcm_with_prompt = client.predict(*arguments, api_name="/continue")[0]["pcm"]
    both = np.concatenate([audio.read(prompt), expected])
    np.testing.assert_allclose(decoded(pcm_with_prompt), both, **close)


def decoded(pcm: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(pcm), "<i2") / 32767


def test_desk_pcm_is_clipped_and_little_endian():
    assert base64.b64decode(desk.encode(np.array([0, 1, -1, 2, 1 / 32767], np.float32))) == (
        b"\x00\x00\xff\x7f\x01\x80\xff\x7f\x01\x00"
    )


def test_picture_shows_the_tokens_of_prompt_and_continuation(tiny_run, prompt):
    speaker = Speaker.open(tiny_run)
    wave = audio.read(prompt)[:9700]  # 30 whole steps, cropped at the front
    *_, progress = desk.continue_prompt(speaker, wave, 0.2, Sampling(), 3)
    figure = desk.draw(speaker, progress)
    before, after = (line.get_xydata() for line in figure.axes[2].lines[:2])
    expected = speaker.codec.encode(torch.from_numpy(wave[100:]))[0]
    np.testing.assert_allclose(before[:, 1], expected)
    np.testing.assert_allclose(before[:, 0], (np.arange(30) - 29.5) / 75)
    np.testing.assert_allclose(after[:, 1], [step.tokens[0] for step in progress.steps])
    assert len(after) == 15 and after[0, 0] > 0


def test_serve_starts_from_silence_without_a_prompt(server):
    assert join(server, seconds=0.2).finish()["success"]


def test_serve_refuses_in_plain_words(server, prompt, tmp_path):
    long = tmp_path / "long.wav"
    audio.write(long, np.zeros(24_000 * 5, np.float32))
    text = tmp_path / "text.wav"
    text.write_text("not audio")
    for path, options, words in (
        (long, {}, "the prompt must last at most 4 s, got 5.0 s"),
        (text, {}, "the prompt must be audio that libsndfile reads"),
        (prompt, {"seconds": 1e6}, "1000000"),
        (prompt, {"seconds": 0.001}, "0.001"),
        (prompt, {"run": "another"}, "another"),
        (prompt, {"seed": -1}, "-1"),
        (prompt, {"temperature": -0.5}, "-0.5"),
        (prompt, {"top_p": 0}, "0"),
        (prompt, {"fine_temperature": -0.25}, "-0.25"),
    ):
        ended = join(server, prompt=upload(server, path), **options).finish()
        assert not ended["success"]
        error = ended["output"]["error"]
        assert words in error
        assert str(server.folder) not in error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"run": "another"}, "run must be one of tiny, got 'another'"),
        ({"seconds": 30.5}, "seconds must lie in"),
        ({"seconds": float("nan")}, "seconds must lie in"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"seed": None}, "seed must be"),
    ],
)
def test_serve_checks_what_the_page_would_not_send(given, words):
    asked = desk.Desk({"tiny": None}, desk.Limits())
    with pytest.raises(ConfigError, match=words.replace("[", "\\[")):
        asked.check(**{"run": "tiny", "seconds": 1.0, "seed": 0, **given})


def test_serve_limits_must_be_positive():
    for name in ("max_prompt_s", "max_seconds", "max_upload_mb"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
                desk.Limits(**{name: value})


# -- what it keeps out ----------------------------------------------------------------------------


def test_serve_listens_on_loopback_only(server):
    tables = [Path(f"/proc/{server.process.pid}/net/{name}") for name in ("tcp", "tcp6")]
    if not tables[0].exists():
        pytest.skip("needs Linux's /proc/net/tcp")
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    bound = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{server.port:04X}")]
    assert bound == [f"0100007F:{server.port:04X}"]


def test_serve_opens_no_file_but_its_uploads(server, tiny_run, prompt, tmp_path):
    mine = upload(server, prompt)
    status, body = server.get(f"/gradio_api/file={mine}")
    assert (status, body) == (200, prompt.read_bytes())
    uploads = Path(mine).parent.parent
    link = uploads / "link.wav"
    link.symlink_to("/etc/passwd")
    secrets = ["/etc/passwd", str(link), str(uploads), str(uploads.parent / "lock")]
    secrets += [str(tiny_run / name) for name in ("config.json", "model/model.safetensors")]
    routes = ["/file=", "/file/", *("/gradio_api/file" + tail for tail in ("=", "/", "=/"))]
    paths = [route + secret for route in routes for secret in secrets]
    up = "../" * 12
    ways = [up, *(up.replace(*change) for change in (("/", "%2f"), (".", "%2e"), ("/", "\\")))]
    ways.append(up.replace("../", "%252e%252e%252f"))
    routes = ["/gradio_api/file=", f"/gradio_api/file={mine}/"]
    routes += ["/assets/", "/static/", "/svelte/", "/"]
    paths += [f"{route}{way}etc/passwd" for route in routes for way in ways]
    paths += ["/gradio_api/file=file:///etc/passwd", "/gradio_api/file=http://127.0.0.1:1/",
              "/gradio_api/proxy=http://127.0.0.1:1/", "/proxy=http://127.0.0.1:1/",
              "/gradio_api/custom_component/1/client/component/index.js", "/monitoring",
              "/gradio_api/runs", "/docs", "/openapi.json"]  # fmt: skip
    for path in paths:
        status, body = server.get(path)
        assert status in (403, 404), (path, status)
        assert b"root:" not in body and b"wgpt-run" not in body, path
    for path in ("/gradio_api/component_server", "/gradio_api/process_recording",
                 "/gradio_api/run/continue", "/gradio_api/api/continue", "/login"):  # fmt: skip
        assert server.post(path, b"{}")[0] == 404


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_serve_reads_no_file_named_by_a_request(server, prompt, tmp_path, meta):
    """A real recording outside the uploads, and one at an address, given as if uploaded."""
    uploads = Path(upload(server, prompt)).parent.parent
    before = files_in(uploads)
    for path in (
        str(prompt),
        "/etc/passwd",
        f"{uploads}/../../../{prompt}",
        "http://198.51.100.7/x.wav",
    ):
        for more in ({}, {"url": str(prompt)}, {"url": "http://198.51.100.7/x.wav"}):
            ended = join(server, prompt={"path": path, **more, **meta}, seconds=0.2).finish()
            assert not ended["success"], path
    assert files_in(uploads) == before


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_serve_keeps_uploads_in_its_folder_whatever_their_name(server, prompt):
    for name in ("../../../evil.wav", "/etc/evil.wav", "..\\evil.wav", "a/../../evil.wav"):
        stored = Path(upload(server, prompt, name=name)).resolve()
        assert stored.is_relative_to(server.folder)
        assert stored.parent.parent.name == "uploads"
    with pytest.raises(AssertionError, match=r"400.*Invalid file name"):
        upload(server, prompt, name="..")
    assert not [path for path in server.folder.rglob("*evil*") if "uploads" not in path.parts]


def test_serve_bounds_uploads(server, prompt):
    with pytest.raises(AssertionError, match=r"413.*at most 1 MB, got 1\.1 MB"):
        upload(server, b"x" * 1_100_000)
    half = b"x" * 600_000
    with pytest.raises(AssertionError, match="413"):
        upload(server, half, half)
    connection = http.client.HTTPConnection(loopback.ADDRESS, server.port, timeout=60)
    connection.request("POST", "/gradio_api/upload", iter([b"x"]), encode_chunked=True)
    assert connection.getresponse().status == 411
    assert server.post("/gradio_api/queue/join", b" " * 70_000)[0] == 413
    assert upload(server, prompt)


def test_serve_refuses_other_hosts_and_sites(server):
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{server.port}"},
                    {"Origin": "http://evil.example"}, {"Origin": "null"}):  # fmt: skip
        assert server.get("/config", headers)[0] == 403
    assert server.get("/config", {"Origin": server.url})[0] == 200
    assert server.get("/config", {"Host": f"localhost:{server.port}"})[0] == 200


def test_serve_made_no_connection(server, prompt):
    """After a whole job; what is refused is logged. (Other tests ask for 198.51.100.7.)"""
    assert join(server, prompt=upload(server, prompt), seconds=0.2).finish()["success"]
    refused = [line for line in server.log().splitlines() if "refused a connection" in line]
    assert all("198.51.100.7" in line for line in refused), refused


def test_forbid_network_leaves_this_machine_only():
    code = """
import socket, threading
from wgpt import loopback
loopback.forbid_network()
listening = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listening.getsockname()).close()
for call in (lambda: socket.create_connection(("198.51.100.7", 80), timeout=5),
             lambda: socket.getaddrinfo("example.com", 80),
             lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
             lambda: socket.socket(type=socket.SOCK_DGRAM).connect(("198.51.100.7", 80))):
    try:
        call()
    except OSError as error:
        assert "to other machines" in str(error), error
    else:
        raise AssertionError("connected")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# -- one job at a time ----------------------------------------------------------------------------


def test_serve_bounds_its_queue_and_frees_it_when_clients_leave(server):
    """Jobs of ten minutes: only a queue that drops the clients who left gets to the short one."""
    jobs = [join(server, seconds=600.0)]
    try:
        wait_for(lambda: jobs[0].started, "the first job to start")
        jobs += [join(server, seconds=600.0) for _ in range(serve.MAX_WAITING)]
        with pytest.raises(AssertionError, match="503"):
            join(server, seconds=0.2)
    finally:
        for job in jobs:
            job.close()
    late = join_when_free(server)
    assert late.finish(timeout_s=90)["success"]


def test_serve_goes_on_after_stop(server):
    job = join(server, seconds=600.0)
    wait_for(lambda: job.started, "the stream to start")
    assert server.post("/gradio_api/cancel", json.dumps(job.event).encode())[0] == 200
    assert join(server, seconds=0.2).finish(timeout_s=90)["success"]


def join_when_free(server):
    made = []

    def attempt():
        try:
            made.append(join(server, seconds=0.2))
        except AssertionError as error:
            assert "503" in str(error)
        return bool(made)

    wait_for(attempt, "a place in the queue", timeout_s=60)
    return made[0]


# -- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly_in_the_middle_of_a_stream(tiny_run, tmp_path, prompt, how):
    needs_gradio()
    with start(tiny_run, tmp_path, *LIMITS) as server:
        upload(server, prompt)
        job = join(server, seconds=600.0)
        wait_for(lambda: job.started, "the stream to start")
        server.process.send_signal(how)
        assert server.process.wait(timeout=60) == 0
        assert "ERROR" not in server.log() and "Traceback" not in server.log()
    assert list(server.folder.iterdir()) == []


def test_serve_works_again_after_a_kill(tiny_run, tmp_path, prompt):
    needs_gradio()
    with start(tiny_run, tmp_path, *LIMITS) as killed:
        upload(killed, prompt)
        job = join(killed, seconds=600.0)
        wait_for(lambda: job.started, "the stream to start")
        killed.process.kill()
        killed.process.wait(timeout=60)
    (left,) = tmp_path.iterdir()
    with start(tiny_run, tmp_path, *LIMITS, port=killed.port) as server:
        assert not left.exists()
        assert join(server, prompt=upload(server, prompt), seconds=0.2).finish()["success"]


def test_serve_says_which_port_is_taken(tiny_run, capsys):
    needs_gradio()
    with socket.create_server((loopback.ADDRESS, 0)) as taken:
        code = cli.main(["serve", str(tiny_run), "--port", str(taken.getsockname()[1])])
    assert code == 1
    assert "--port must be free on 127.0.0.1" in capsys.readouterr().err


def test_serve_names_a_run_that_is_not_there(tmp_path):
    needs_gradio()
    command = [sys.executable, "-m", "wgpt", "serve", "no-such-run", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode in (1, 2)
    assert "no-such-run" in ended.stderr and "Traceback" not in ended.stderr


def test_serve_names_the_missing_extra(tiny_run, tmp_path):
    code = "import sys; sys.modules['gradio'] = None; from wgpt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(tiny_run)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert "pip install 'wgpt[demo]'" in ended.stderr and "Traceback" not in ended.stderr


# -- its folder -----------------------------------------------------------------------------------


def test_private_folder_removes_what_the_dead_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, other = tmp_path / "x-dead", tmp_path / "y-other"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "lock").touch()
    with loopback.private_folder("x-") as first, loopback.private_folder("x-") as second:
        assert first.is_dir() and second.is_dir() and other.is_dir()
        assert not dead.exists()
        assert first.stat().st_mode & 0o777 == 0o700
    assert sorted(tmp_path.iterdir()) == [other]


def test_keep_newest_removes_the_oldest(tmp_path):
    for i in range(4):
        path = tmp_path / str(i) / "prompt.wav"
        path.parent.mkdir()
        path.write_bytes(b"x" * 10)
        os.utime(path, (i, i))
    loopback.keep_newest(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    loopback.keep_newest(tmp_path / "nothing here", 25)


def test_two_runs_of_one_name_stay_apart(tiny_run, tmp_path):
    twin = tmp_path / tiny_run.name
    twin.symlink_to(tiny_run)
    speakers = serve.open_speakers([str(tiny_run), str(twin), str(tiny_run / "model")], "cpu")
    assert list(speakers) == ["tiny", "tiny (2)", "model"]
