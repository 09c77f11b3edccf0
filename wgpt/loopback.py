"""What stands between a web page's server and the machine: one folder, one address, few routes.

A web framework serves files, proxies and uploads in more ways than a page needs. `Gate` lets
through only the requests the page makes, `private_folder` is the only place files come from or go
to, and `forbid_network` ends every connection of this process that is not to this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"

_API = "/gradio_api/"
_PAGE_ROUTES = {
    "GET": {
        *("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
        *(_API + name for name in ("info", "theme.css", "startup-events", "queue/data")),
        *(_API + name for name in ("queue/status", "upload_progress")),
    },
    "POST": {_API + name for name in ("queue/join", "cancel", "reset", "upload")},
}
_PAGE_PREFIXES = ("/assets/", "/static/", "/svelte/", _API + "heartbeat/", _API + "file=")
_UPLOAD = _API + "upload"
_MAX_CALL_BYTES = 1 << 16  # a request that is not an upload
_MULTIPART_BYTES = 1 << 12  # the form around an uploaded file
_MAX_DISCARDED_BYTES = 1 << 28  # of a body that is refused; then the connection ends
# 'unsafe-eval': the page builds its components' scripts with Function.
_CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'"
)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@contextlib.contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """A new temporary folder of this user's, removed at the end.

    Folders that killed processes left are removed too: each living process holds a lock on a file
    in its folder, which the kernel drops with the process, however it ends.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/lock"):
        with contextlib.suppress(OSError), open(lock) as file:  # another user's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    with open(folder / "new", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.rename(folder / "new", folder / "lock")  # never seen unlocked
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def keep_newest(folder: Path, max_bytes: int) -> None:
    """Removes the files of a folder, oldest first, until max_bytes are left at most."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in files) - max_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
        with contextlib.suppress(OSError):  # not empty
            path.parent.rmdir()


def forbid_network() -> None:
    """From now on this process connects to this machine only; anything else raises OSError.

    Cannot be undone: for a process that serves and does nothing else.
    """

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("socket.connect", "socket.getaddrinfo"):
            return
        where = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = where[0] if isinstance(where, tuple) else where
        if host in (None, "", b"", "localhost") or (isinstance(where, str) and "/" in where):
            return
        try:
            address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
        except ValueError:
            address = None
        if not (address and (address.is_loopback or address.is_unspecified)):
            log.warning("refused a connection to %s", host)
            raise OSError(f"wgpt serve: makes no connections to other machines, refused {host}")

    sys.addaudithook(refuse)


class Gate:
    """ASGI middleware that admits what the page needs and refuses the rest in plain words.

    keep: uploads of the largest size that are kept, newest first.

    Refused: another Host (a name that was rebound to this machine) or Origin (another site's
    script), any route not in the lists above, bodies over the limits, files outside `folder`.
    """

    def __init__(self, app: App, port: int, folder: Path, max_upload_bytes: int, keep: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
        self._folder = folder
        self._uploads = folder / "uploads"
        self._max_upload_bytes = max_upload_bytes
        self._max_kept_bytes = keep * max_upload_bytes
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Tells every open stream that its client left, so that it ends in its own way."""
        self._closing.set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self._refusal(scope)
        if refusal:
            await _discard_body(receive)
            return await _answer(send, *refusal)
        if scope["path"] == _UPLOAD:
            keep_newest(self._uploads, self._max_kept_bytes)

        async def receive_or_close() -> Message:
            waiting = asyncio.ensure_future(receive())
            closing = asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait((waiting, closing), return_when=asyncio.FIRST_COMPLETED)
                return waiting.result() if waiting.done() else {"type": "http.disconnect"}
            finally:
                waiting.cancel()
                closing.cancel()

        unfinished = False

        async def send_with_policy(message: Message) -> None:
            nonlocal unfinished
            unfinished = message["type"] == "http.response.start" or message.get("more_body", False)
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                headers += [
                    (b"content-security-policy", _CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive_or_close, send_with_policy)
        if unfinished and self._closing.is_set():
            await send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and reason, or None to let the request through."""
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        method, path = scope["method"], scope["path"]
        if headers.get("host") not in self._hosts:
            return 403, f"Host must be {' or '.join(sorted(self._hosts))}"
        origin = headers.get("origin")
        if origin is not None and origin.removeprefix("http://") not in self._hosts:
            return 403, "requests from other sites are refused"
        known = path in _PAGE_ROUTES.get("GET" if method == "HEAD" else method, ())
        if not known and not (method in ("GET", "HEAD") and path.startswith(_PAGE_PREFIXES)):
            return 404, "no such page"
        if path.startswith(_API + "file="):
            real = Path(os.path.realpath(path.removeprefix(_API + "file=")))
            if not (real.is_relative_to(self._uploads) and real.is_file()):
                return 403, "not a file of this page"
        elif ".." in path.split("/"):
            return 404, "no such page"
        if method == "POST":
            return self._body_refusal(path, headers.get("content-length", ""))
        return None

    def _body_refusal(self, path: str, length: str) -> tuple[int, str] | None:
        if not length.isascii() or not length.isdigit():
            return 411, "Content-Length is required"
        if path == _UPLOAD:
            if int(length) > self._max_upload_bytes + _MULTIPART_BYTES:
                limit, got = self._max_upload_bytes / 1e6, int(length) / 1e6
                return 413, f"an upload may hold at most {limit:g} MB, got {got:.1f} MB"
        elif int(length) > _MAX_CALL_BYTES:
            return 413, f"a request may hold at most {_MAX_CALL_BYTES} bytes, got {length}"
        return None


async def _discard_body(receive: Receive) -> None:
    """Reads what the client is still sending, so that it reads the answer; not for ever."""
    n_left = _MAX_DISCARDED_BYTES
    while n_left > 0:
        message = await receive()
        n_left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _answer(send: Send, status: int, text: str) -> None:
    body = f"wgpt serve: {text}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
