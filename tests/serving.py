"""A running `wgpt serve` for the tests, and a small client that speaks gradio's queue protocol."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LIMITS = ("--max-prompt-s", "4", "--max-seconds", "600", "--max-upload-mb", "1")


def needs_gradio() -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'wgpt[demo]'")


def wait_for(holds: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


@dataclass
class Server:
    """A server process; `folder` is its temporary folder."""

    process: subprocess.Popen[str]
    folder: Path
    url: str
    log_file: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        return self.log_file.read_text()

    def _ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        return self._ask("GET", path, None, headers or {})

    def post(
        self, path: str, body: bytes, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        return self._ask("POST", path, body, {"Content-Type": content_type})


@contextlib.contextmanager
def start(run: Path, folder: Path, *flags: str, port: int = 0) -> Iterator[Server]:
    """`wgpt serve run` with `folder` for its temporary files, killed at the end."""
    log_file = folder.with_name(folder.name + "-log.txt")
    command = [sys.executable, "-m", "wgpt", "serve", str(run), "--json", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_SHARE": "True"}
    with open(log_file, "w") as log:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder.parent,
            env=environment,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"the server ended: {log_file.read_text()}"
        yield Server(process, folder, json.loads(line)["url"], log_file)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def upload(server: Server, *files: Path | bytes, name: str = "prompt.wav") -> str:
    """The server's path of the uploaded file, as the page learns it."""
    body = b""
    for file in files:
        content = file if isinstance(file, bytes) else file.read_bytes()
        head = f'Content-Disposition: form-data; name="files"; filename="{name}"'
        body += f"--edge\r\n{head}\r\nContent-Type: audio/wav\r\n\r\n".encode() + content + b"\r\n"
    body += b"--edge--\r\n"
    status, answer = server.post("/gradio_api/upload", body, "multipart/form-data; boundary=edge")
    assert status == 200, f"{status} {answer.decode()}"
    path: str = json.loads(answer)[0]
    return path


class Job:
    """A job in the server's queue, whose messages a thread reads until it ends or `close`."""

    def __init__(self, server: Server, event: str, session: str, fn_index: int) -> None:
        self.event = {"event_id": event, "session_hash": session, "fn_index": fn_index}
        self.started = False
        self._ended: queue.Queue[dict[str, Any]] = queue.Queue()
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        self._connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        self._answer = self._connection.getresponse()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            for line in self._answer:
                if not line.startswith(b"data: "):
                    continue
                message = json.loads(line.removeprefix(b"data: "))
                self.started |= message["msg"] == "process_generating"
                if message["msg"] == "process_completed":
                    self._ended.put(message)

    def finish(self, timeout_s: float = 120.0) -> dict[str, Any]:
        """The last message: {"success": bool, "output": ...}."""
        message = self._ended.get(timeout=timeout_s)
        self.close()
        return message

    def close(self) -> None:
        """The client goes away."""
        if self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        self._connection.close()


def join(server: Server, **chosen: Any) -> Job:
    """Asks for a continuation as the page does; AssertionError with the status if refused."""
    prompt = chosen.pop("prompt", None)
    if isinstance(prompt, str):
        prompt = {"path": prompt, "meta": {"_type": "gradio.FileData"}}
    values = {"run": "tiny", "seconds": 0.2, "with_prompt": False, "temperature": 1.0,
              "top_k": 100, "top_p": 1.0, "fine_temperature": 0.5, "fine_top_k": 0,
              "seed": 0}  # fmt: skip
    assert set(chosen) <= set(values)
    config = json.loads(server.get("/config")[1])
    (fn_index,) = [d["id"] for d in config["dependencies"] if d["api_name"] == "continue"]
    session = uuid.uuid4().hex
    data = [prompt, *{**values, **chosen}.values()]
    body = json.dumps({"data": data, "fn_index": fn_index, "session_hash": session})
    status, answer = server.post("/gradio_api/queue/join", body.encode())
    assert status == 200, f"{status} {answer.decode()}"
    return Job(server, json.loads(answer)["event_id"], session, fn_index)
