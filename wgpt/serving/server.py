"""The routes of the page, a queue of one job at a time, and uvicorn around them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import soundfile
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from wgpt.config import SAMPLE_RATE_HZ
from wgpt.errors import ServeError, WgptError
from wgpt.serving.localhost import ADDRESS, LocalhostMiddleware
from wgpt.serving.session import GenerationSession, Request

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
MAX_WAITING = 8  # jobs in the queue; the next is refused
UPLOAD_S = 60.0  # for a body to arrive
STALL_S = 20.0  # a listener that takes nothing for so long has left
MAX_DISCARDED_BYTES = 1 << 28  # of a body over the limit, read so that its sender sees the answer


class JobQueue:
    """One job at a time; a few wait, and the next is refused."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.turn = asyncio.Lock()  # held while the model works
        self._max_jobs = 1 + max_waiting
        self._n_jobs = 0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[int]:
        """A place in the queue; gives the number of jobs ahead. Raises HTTPException(503)."""
        if self._n_jobs >= self._max_jobs:
            raise HTTPException(503, f"{self._n_jobs} jobs are waiting already; try again later")
        self._n_jobs += 1
        try:
            yield self._n_jobs - 1
        finally:
            self._n_jobs -= 1


class ContinueRoute:
    """POST a file: its continuation, a JSON line for each piece as it is made.

    An ASGI application of its own and no function, because the place in the queue is held until
    the last line is sent or the listener leaves.
    """

    def __init__(self, server: PageServer, stall_s: float = STALL_S) -> None:
        self._server = server
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http, listening = HttpRequest(scope, receive), anyio.CancelScope()

        async def send_in_time(message: Message) -> None:
            with anyio.move_on_after(self._stall_s) as patience:
                await send(message)
            if patience.cancelled_caught:
                listening.cancel()

        async with self._server.queue.place() as n_ahead:
            request = self._server.session.request(http.query_params)
            prompt = await self._server.read_prompt(http)
            # aclosing: the generator holds the model's turn, and must not wait for the collector.
            async with contextlib.aclosing(self._lines(request, prompt, n_ahead)) as lines:
                response = StreamingResponse(lines, media_type="application/x-ndjson")
                with listening, contextlib.suppress(ClientDisconnect):
                    await response(scope, receive, send_in_time)

    async def _lines(
        self, request: Request, prompt: np.ndarray, n_ahead: int
    ) -> AsyncGenerator[bytes, None]:
        server = self._server
        if n_ahead:
            yield _line({"ahead": n_ahead})
        async with server.queue.turn:
            pieces = server.session.continue_prompt(request, prompt)
            try:
                while not server.closing:
                    piece = await run_in_threadpool(next, pieces, None)
                    if piece is None:
                        return
                    yield _line(piece)
            except WgptError as error:
                yield _line({"error": str(error)})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


class PageServer:
    """The application of one session on one port; `closing` ends every stream at its next piece."""

    def __init__(self, session: GenerationSession, port: int) -> None:
        self.session = session
        self.queue = JobQueue()
        self.closing = False
        files = {path.name: path for path in PAGE.iterdir() if path.suffix in MEDIA_TYPES}
        files[""] = files["index.html"]
        self.app = Starlette(
            routes=[
                *(Route(f"/{name}", _static(path)) for name, path in files.items()),
                Route("/facts", self._facts),
                Route("/examples/{index}", self._example),
                Route("/prompt", self._prompt, methods=["POST"]),
                Route("/continue", ContinueRoute(self), methods=["POST"]),
            ],
            middleware=[Middleware(LocalhostMiddleware, port=port)],
            exception_handlers={WgptError: _refuse, ClientDisconnect: _refuse},
        )
        self.app.router.redirect_slashes = False

    async def _facts(self, request: HttpRequest) -> Response:
        return JSONResponse(self.session.facts())

    async def _example(self, request: HttpRequest) -> Response:
        index = request.path_params["index"]
        if index not in map(str, range(len(self.session.examples))):
            raise HTTPException(404)
        wave = await run_in_threadpool(self.session.example, int(index))
        file = io.BytesIO()
        soundfile.write(file, wave, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")
        return Response(file.getvalue(), media_type="audio/wav")

    async def _prompt(self, request: HttpRequest) -> Response:
        """POST a file: the prompt and what the codec makes of it."""
        async with self.queue.place():
            prompt = await self.read_prompt(request)
            async with self.queue.turn:
                query = request.query_params
                return JSONResponse(await run_in_threadpool(self.session.describe, query, prompt))

    async def read_prompt(self, request: HttpRequest) -> np.ndarray:
        """The sound in a request's body. Raises AudioError, HTTPException(408 or 413)."""
        try:
            body = await asyncio.wait_for(self._body(request), UPLOAD_S)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"an upload may take at most {UPLOAD_S:g} s") from None
        return await run_in_threadpool(self.session.read_prompt, body)

    async def _body(self, request: HttpRequest) -> bytes:
        chunks, n_bytes, max_bytes = [], 0, self.session.limits.max_upload_bytes
        async for chunk in request.stream():
            n_bytes += len(chunk)
            if n_bytes <= max_bytes:
                chunks.append(chunk)
            elif n_bytes > max_bytes + MAX_DISCARDED_BYTES:
                break
        if n_bytes > max_bytes:
            limit_mb, got_mb = max_bytes / 1e6, n_bytes / 1e6
            raise HTTPException(
                413, f"the prompt may hold at most {limit_mb:g} MB, got {got_mb:.1f} MB"
            )
        return b"".join(chunks)


def _static(path: Path) -> Any:
    """An endpoint that answers with one file, read now: no path of a request reaches the disk."""
    content, media_type = path.read_bytes(), MEDIA_TYPES[path.suffix]

    async def endpoint(request: HttpRequest) -> Response:
        return Response(content, media_type=media_type)

    return endpoint


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    return PlainTextResponse(str(error), 400)


def listen(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; port 0: any free one. Raises ServeError."""
    try:
        return socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise ServeError(f"--port must be free on {ADDRESS}, got {port}: {error}") from None


def serve(session: GenerationSession, listening: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, whose handlers are called again at the end."""
    server = PageServer(session, listening.getsockname()[1])

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            server.closing = True
            await super().shutdown(sockets)

    config = uvicorn.Config(
        server.app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="warning",
        limit_concurrency=100,
        timeout_graceful_shutdown=5,
    )
    Server(config).run(sockets=[listening])
