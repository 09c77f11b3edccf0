"""ASGI middleware that lets this page on this machine in, and nobody else."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADDRESS = "127.0.0.1"

# Scripts and styles are files of the page; sounds to save and to play are blobs it made itself.
POLICY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; media-src blob:; frame-ancestors 'none'; "
    "form-action 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class LocalhostMiddleware:
    """Refuses another Host (a name rebound to this machine) or Origin (another site's script).

    Adds a content policy to every answer, so that the page loads and sends nothing elsewhere.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(POLICY)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        app = PlainTextResponse(refusal, 403) if refusal else self._app
        await app(scope, receive, send_with_policy)

    def _refusal(self, headers: Headers) -> str | None:
        host, origin = headers.getlist("host"), headers.getlist("origin")
        if len(host) != 1 or host[0] not in self._hosts:
            return f"wgpt serve: Host must be {' or '.join(self._hosts)}"
        if origin not in ([], *([f"http://{known}"] for known in self._hosts)):
            return "wgpt serve: requests from other sites are refused"
        return None
