"""A running `wgpt serve` for the tests, and a small client of its routes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

LIMITS = ("--max-prompt-s", "4", "--max-seconds", "600", "--max-upload-mb", "1")


def needs_server() -> None:
    for module in ("starlette", "uvicorn"):
        pytest.importorskip(module, reason=f"needs {module}: pip install 'wgpt[serve]'")


def wait_for(holds: Callable[[], Any], what: str, timeout_s: float = 300.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


def decoded(pcm: str) -> np.ndarray:
    """int16 (L,) of base64."""
    return np.frombuffer(base64.b64decode(pcm), "<i2")


@dataclass
class Server:
    """A server process; `folder` is where its temporary files would be."""

    process: subprocess.Popen[str]
    folder: Path
    url: str
    log_file: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        return self.log_file.read_text()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        return self.ask("GET", path, None, headers)

    def job(self, prompt: bytes = b"", **chosen: Any) -> Job:
        """Asks for a continuation as the page does."""
        return Job(self, prompt, {"model": "tiny", "seconds": 0.2, **chosen})


@contextlib.contextmanager
def start(run: Path, folder: Path, *flags: str, port: int = 0) -> Iterator[Server]:
    """`wgpt serve run` with `folder` for its temporary files, killed at the end."""
    log_file = folder.with_name(folder.name + "-log.txt")
    command = [sys.executable, "-m", "wgpt", "serve", str(run), "--json", "--port", str(port)]
    with open(log_file, "w") as log:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder.parent,
            env={**os.environ, "TMPDIR": str(folder)},
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


@dataclass
class Job:
    """A continuation, whose lines a thread reads until it ends or `close`."""

    server: Server
    prompt: bytes
    chosen: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=300)
        self._connection.request("POST", f"/continue?{urlencode(self.chosen)}", self.prompt)
        self._answer = self._connection.getresponse()
        self.status = self._answer.status
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # Closing from the other side ends in any of these.
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            if self.status != 200:
                self.lines.append({"error": self._answer.read().decode()})
                return
            for line in self._answer:
                self.lines.append(json.loads(line))

    @property
    def started(self) -> bool:
        return any("pcm" in line for line in self.lines)

    def finish(self, timeout_s: float = 300.0) -> list[dict[str, Any]]:
        """All lines, once there are no more."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"waited {timeout_s:g} s for the end of the stream"
        self._connection.close()
        return self.lines

    def succeeded(self, timeout_s: float = 300.0) -> bool:
        return self.finish(timeout_s)[-1].get("done") is True

    def close(self) -> None:
        """The client goes away."""
        if self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        self._connection.close()
