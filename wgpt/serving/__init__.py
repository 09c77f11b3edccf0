"""The page of `wgpt serve`: a recording goes in, the model continues it while you listen.

    bytes of a file ─audio.read─▶ prompt ─AudioGenerator.steps─▶ JSON lines ─▶ player and pictures
                                     └─codec.encode, decode─▶ the ceiling: what the codec keeps

    session.py      what a page may ask for, and the answers; knows nothing of HTTP
    localhost.py    ASGI middleware: this machine and this page only
    server.py       the routes, the queue, uvicorn (extra `serve`: starlette, uvicorn)
    page/           the page itself: HTML, CSS, JavaScript modules; no build step

The server keeps nothing between requests: a prompt comes with each request and is decoded from an
unnamed temporary file, so that there is no folder to guard, to bound or to clean up.
"""
