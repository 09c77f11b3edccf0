"""wgpt serve over HTTP, with real processes: what it sends, what it refuses, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import soundfile
from serving.server_process import LIMITS, Server, decoded, needs_server, start, wait_for

from wgpt import audio, cli
from wgpt.generation import AudioGenerator, Sampling
from wgpt.ops.runtime import one_thread
from wgpt.serving.session import GenerationSession, Limits, pcm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory) -> Iterator[Server]:
    needs_server()
    with start(tiny_run, tmp_path_factory.mktemp("serve"), *LIMITS) as running:
        yield running


@pytest.fixture
def prompt(recordings) -> bytes:
    return sorted(recordings.rglob("*.wav"))[0].read_bytes()


# -- what it sends --------------------------------------------------------------------------------


def test_serve_streams_what_the_generator_makes(server, tiny_run, recordings, prompt):
    lines = server.job(prompt, seconds=1.0, seed=7).finish()
    assert len(lines) >= 4 and lines[-1]["done"]
    made = np.concatenate([decoded(line["pcm"]) for line in lines])
    generator = AudioGenerator.load(tiny_run)
    wave = audio.read(sorted(recordings.rglob("*.wav"))[0])
    with one_thread():
        steps = list(generator.steps(wave, 75, Sampling(top_k=100), seed=7))
    expected = np.concatenate([step.wave for step in steps])
    np.testing.assert_array_equal(made, np.frombuffer(pcm(expected), "<i2"))


def test_serve_streams_while_it_makes(server):
    job = server.job(seconds=600.0)
    wait_for(lambda: job.started, "the first piece")
    assert not job.lines[-1]["done"]
    job.close()


def test_serve_starts_from_silence_without_a_prompt(server):
    assert server.job(seconds=0.2).succeeded()


def test_serve_describes_a_prompt(server, prompt):
    status, body = server.ask("POST", "/prompt?model=tiny", prompt)
    assert status == 200
    answer = json.loads(body)
    assert answer["seconds"] == 3.0
    assert len(decoded(answer["codec"]["pcm"])) == len(decoded(answer["recording"]["pcm"])) == 72000


def test_serve_has_the_page_and_its_examples(server):
    facts = json.loads(server.get("/facts")[1])
    assert facts["limits"]["max_prompt_s"] == 4
    status, body = server.get("/examples/0")
    wave, rate_hz = soundfile.read(io.BytesIO(body))
    assert (status, len(wave), rate_hz) == (200, 96_000, 24_000)
    assert server.get(f"/examples/{len(facts['examples'])}")[0] == 404
    for path in (
        "/",
        "/style.css",
        "/app.js",
        "/player.js",
        "/view.js",
        "/recorder-worklet.js",
        "/icon.svg",
    ):
        assert server.get(path)[0] == 200, path


def test_serve_refuses_in_plain_words(server, prompt, tmp_path):
    audio.write(tmp_path / "long.wav", np.zeros(24_000 * 5, np.float32))
    long = (tmp_path / "long.wav").read_bytes()
    for content, options, words in (
        (long, {}, "the prompt must last at most 4 s, got 5.0 s"),
        (b"not audio", {}, "the prompt must be audio that libsndfile reads"),
        (prompt, {"seconds": 1e6}, "seconds must lie in [1/75, 600], got 1e+06"),
        (prompt, {"model": "another"}, "model must be one of tiny, got 'another'"),
        (prompt, {"seed": -1}, "seed must lie in [0, 2^63), got -1"),
    ):
        job = server.job(content, **options)
        ((error,),) = [line.values() for line in job.finish()]
        assert job.status == 400 and words in error
        assert str(server.folder) not in error
    assert server.ask("POST", "/prompt?model=tiny", long)[0] == 400
    assert server.ask("POST", "/prompt?model=tiny", b"")[0] == 400


# -- what it keeps out ----------------------------------------------------------------------------


def test_serve_listens_on_loopback_only(server):
    tables = [Path(f"/proc/{server.process.pid}/net/{name}") for name in ("tcp", "tcp6")]
    if not tables[0].exists():
        pytest.skip("needs Linux's /proc/net/tcp")
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    bound = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{server.port:04X}")]
    assert bound == [f"0100007F:{server.port:04X}"]


def test_serve_opens_no_file_that_a_request_names(server, tiny_run):
    up = "../" * 12
    ways = [up, *(up.replace(*change) for change in (("/", "%2f"), (".", "%2e"), ("/", "\\")))]
    ways.append(up.replace("../", "%252e%252e%252f"))
    routes = ["/", "//", "/app.js/", "/examples/", "/examples/0/", "/page/", "/file="]
    paths = [f"{route}{way}etc/passwd" for route in routes for way in ways]
    paths += ["/etc/passwd", f"/{tiny_run}/config.json", "/server.py", "/page/index.html",
              "/examples/-1", "/examples/x", "/docs", "/openapi.json", "file:///etc/passwd",
              "http://127.0.0.1:1/"]  # fmt: skip
    for path in paths:
        status, body = server.get(path)
        assert status in (403, 404), (path, status)
        assert b"root:" not in body and b"wgpt-run" not in body, path
    for method in ("PUT", "DELETE", "POST"):
        assert server.ask(method, "/app.js", b"")[0] == 405
    assert server.get("/continue?model=tiny")[0] == 405


def test_serve_logs_no_traceback_of_hostile_requests(server):
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    for request in (
        f"GET /examples/{'9' * 5000} HTTP/1.1\r\n{host}\r\n",
        f"POST /prompt?model=tiny HTTP/1.1\r\n{host}Content-Length: 100\r\n\r\nabc",
        f"POST /continue?model=tiny HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "\x16\x03\x01\x02",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(request.encode())
            connection.shutdown(socket.SHUT_WR)
            assert b"500" not in connection.recv(100)
    for name, value in (("seed", "9" * 5000), ("temperature", "1e-320"), ("top_k", "1" * 40)):
        assert server.ask("POST", f"/continue?model=tiny&seconds=0.02&{name}={value}")[0] < 500
    assert "Traceback" not in server.log() and "RuntimeWarning" not in server.log()


def test_serve_writes_no_file(server, prompt):
    assert server.job(prompt).succeeded()
    assert list(server.folder.rglob("*")) == []


def test_serve_bounds_uploads(server, prompt):
    status, body = server.ask("POST", "/continue?model=tiny", b"x" * 1_100_000)
    assert (status, body) == (413, b"the prompt may hold at most 1 MB, got 1.1 MB")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunks = iter([b"x" * 600_000] * 2)
    connection.request("POST", "/prompt?model=tiny", chunks, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.job(prompt).succeeded()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path", ["/", "/app.js", "/facts", "/examples/0", "/prompt", "/continue", "/nothing"]
)
def test_serve_refuses_other_hosts_and_sites(server, method, path):
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{server.port}"},
                    {"Host": f"127.0.0.1:{server.port + 1}"}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": f"https://127.0.0.1:{server.port}"},
                    {"Origin": f"{server.url}.evil.example"}):  # fmt: skip
        status, body = server.ask(method, path, None, headers)
        assert status == 403 and body.startswith(b"wgpt serve: "), headers


def test_serve_lets_its_own_page_in(server):
    for name in ("127.0.0.1", "localhost"):
        host = f"{name}:{server.port}"
        assert server.get("/facts", {"Host": host, "Origin": f"http://{host}"})[0] == 200


def test_serve_sends_a_policy_with_every_answer(server):
    for path, headers in (("/", {}), ("/nothing", {}), ("/", {"Origin": "null"})):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", path, headers=headers)
        policy = connection.getresponse().headers["content-security-policy"]
        connection.close()
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


# -- one job at a time ----------------------------------------------------------------------------


def test_serve_bounds_its_queue_and_frees_it_when_clients_leave(server):
    """Jobs of ten minutes: only a queue that drops the clients who left gets to the short one."""
    from wgpt.serving.server import MAX_WAITING

    jobs = [server.job(seconds=600.0)]
    try:
        wait_for(lambda: jobs[0].started, "the first job to start")
        jobs += [server.job(seconds=600.0) for _ in range(MAX_WAITING)]
        wait_for(lambda: jobs[-1].lines, "the last one's place")
        assert jobs[-1].lines == [{"ahead": MAX_WAITING}]
        refused = server.job()
        assert refused.status == 503
        assert "9 jobs are waiting already" in refused.finish()[0]["error"]
    finally:
        for job in jobs:
            job.close()
    wait_for(lambda: server.job().succeeded(), "a place in the queue")


def test_serve_goes_on_after_a_listener_leaves(server):
    job = server.job(seconds=600.0)
    wait_for(lambda: job.started, "the stream to start")
    job.close()
    assert server.job().succeeded()


def test_serve_survives_a_client_that_leaves_while_it_sends(server):
    for _ in range(12):  # more than the queue has places
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /continue?model=tiny HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\nabc".encode())
    wait_for(lambda: server.job().succeeded(), "a place in the queue")
    assert "Traceback" not in server.log()


def test_a_listener_that_takes_nothing_loses_its_turn(tiny_run):
    needs_server()
    from wgpt.serving.server import ContinueRoute, PageServer

    session = GenerationSession({"tiny": AudioGenerator.load(tiny_run)}, Limits())
    query = urlencode({"model": "tiny", "seconds": 30}).encode()
    scope = {"type": "http", "method": "POST", "path": "/continue", "query_string": query,
             "headers": [], "asgi": {"spec_version": "2.3"}}  # fmt: skip

    async def stalled() -> None:
        page = PageServer(session, 1)
        body = iter([{"type": "http.request", "body": b""}])

        async def receive():
            with contextlib.suppress(StopIteration):
                return next(body)
            await asyncio.Event().wait()

        async def send(message):
            await asyncio.Event().wait()

        route = ContinueRoute(page, stall_s=0.2)
        await asyncio.wait_for(route(scope, receive, send), timeout=30)
        assert not page.queue.turn.locked()
        async with page.queue.place() as n_ahead:
            assert n_ahead == 0

    asyncio.run(stalled())


# -- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly_in_the_middle_of_a_stream(tiny_run, tmp_path, prompt, how):
    needs_server()
    (tmp_path / "temporary").mkdir()
    with start(tiny_run, tmp_path / "temporary", *LIMITS) as server:
        jobs = [server.job(prompt, seconds=600.0), server.job(prompt, seconds=600.0)]
        wait_for(lambda: jobs[0].started and jobs[1].lines, "one stream to start, one to wait")
        server.process.send_signal(how)
        assert server.process.wait(timeout=300) == 0
        assert "ERROR" not in server.log() and "Traceback" not in server.log()
    assert list(server.folder.iterdir()) == []


def test_serve_works_again_on_the_same_port_after_a_kill(tiny_run, tmp_path, prompt):
    needs_server()
    (tmp_path / "temporary").mkdir()
    with start(tiny_run, tmp_path / "temporary", *LIMITS) as killed:
        job = killed.job(prompt, seconds=600.0)
        wait_for(lambda: job.started, "the stream to start")
        killed.process.kill()
        killed.process.wait(timeout=60)
    assert list(killed.folder.iterdir()) == []
    with start(tiny_run, tmp_path / "temporary", *LIMITS, port=killed.port) as server:
        assert server.job(prompt).succeeded()


def test_serve_says_which_port_is_taken(tiny_run, capsys):
    needs_server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code = cli.main(["serve", str(tiny_run), "--port", str(taken.getsockname()[1])])
    assert code == 1
    assert "--port must be free on 127.0.0.1" in capsys.readouterr().err


def test_serve_names_a_run_that_is_not_there(tmp_path):
    needs_server()
    command = [sys.executable, "-m", "wgpt", "serve", "no-such-run", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode in (1, 2)
    assert "no-such-run" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("module", ["starlette", "uvicorn"])
def test_serve_names_the_missing_extra(tiny_run, tmp_path, module):
    code = f"import sys; sys.modules[{module!r}] = None; from wgpt.cli import main; "
    code += "sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(tiny_run)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert "pip install 'wgpt[serve]'" in ended.stderr and "Traceback" not in ended.stderr
