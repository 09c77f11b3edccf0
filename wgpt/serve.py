"""`wgpt serve`: a page on this machine that continues a recording while you listen.

    upload or microphone ─audio.read─▶ prompt ─Speaker.stream─▶ PCM pieces ─▶ player in the page
                                                       └▶ tokens, entropy ─▶ picture, now and then

One job runs at a time, a few wait. gradio (the extra `demo`) draws the page; `wgpt.loopback` keeps
everything but the page out. Sound goes through the page's own player, since gradio's needs FFmpeg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from wgpt import loopback
from wgpt.desk import Desk, Limits
from wgpt.generation.generator import AudioGenerator as Speaker
from wgpt.generation.sampling import FINE_TEMPERATURE
from wgpt.ops.runtime import one_thread

log = logging.getLogger(__name__)

MAX_WAITING = 8  # jobs in the queue; the next is refused


class ServeError(RuntimeError):
    """The server cannot run; the message says what is missing or in use."""


def page(desk: Desk) -> Any:
    """The page as a gradio.Blocks with its queue."""
    import gradio

    limits = desk.limits
    player_js = (resources.files("wgpt") / "assets" / "player.js").read_text()
    with gradio.Blocks(title="wgpt", analytics_enabled=False) as blocks:
        gradio.Markdown(
            "## wgpt\nA recording goes in; the model continues it while you listen. "
            "Without a prompt it starts from silence."
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                prompt = gradio.Audio(
                    type="filepath",
                    sources=["upload", "microphone"],
                    label=f"Prompt: at most {limits.max_prompt_s:g} s, {limits.max_upload_mb:g} MB",
                    editable=False,
                    buttons=[],
                    elem_id="prompt",
                )
                run = gradio.Dropdown(list(desk.speakers), label="Run", elem_id="run")
                seconds = gradio.Slider(
                    0.2,
                    limits.max_seconds,
                    value=min(8.0, limits.max_seconds),
                    step=0.2,
                    label="Seconds to make",
                    elem_id="seconds",
                )
                with_prompt = gradio.Checkbox(False, label="Play the prompt first")
                with gradio.Accordion("Sampling", open=False):
                    temperature = gradio.Slider(0, 2, value=1.0, step=0.05, label="Temperature")
                    top_k = gradio.Slider(0, 1024, value=100, step=1, label="Top k (0: all)")
                    top_p = gradio.Slider(0.05, 1, value=1.0, step=0.05, label="Top p (1: all)")
                    fine_temperature = gradio.Slider(
                        0,
                        2,
                        value=FINE_TEMPERATURE,
                        step=0.05,
                        label="Temperature of the finer codebooks (0: most likely)",
                    )
                    fine_top_k = gradio.Slider(
                        0, 1024, value=0, step=1, label="Top k of the finer codebooks (0: all)"
                    )
                    seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
                with gradio.Row():
                    start = gradio.Button("Continue", variant="primary", elem_id="continue")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column(scale=5, min_width=480):
                player = gradio.HTML(
                    None,
                    html_template=PLAYER_HTML,
                    css_template=PLAYER_CSS,
                    js_on_load=player_js,
                    apply_default_css=False,
                    elem_id="player",
                )
                line = gradio.Markdown("", elem_id="status")
                picture = gradio.Plot(show_label=False, elem_id="picture")
                text = gradio.Textbox(
                    label="Tokens, one line per codebook",
                    lines=3,
                    max_lines=3,
                    interactive=False,
                    elem_id="tokens",
                )
        job = start.click(
            desk.serve,
            [
                prompt,
                run,
                seconds,
                with_prompt,
                temperature,
                top_k,
                top_p,
                fine_temperature,
                fine_top_k,
                seed,
            ],
            [player, line, picture, text],
            api_name="continue",
            js="(...inputs) => { window.wgptStart(); return inputs; }",
            show_progress="minimal",
            show_progress_on=line,
            concurrency_limit=1,
        )
        job.failure(None, js="() => window.wgptFail()")
        stop.click(None, js="() => window.wgptStop()", cancels=[job])
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return blocks


PLAYER_HTML = """
<div class="row">
  <canvas width="640" height="56" hidden></canvas>
  <audio controls hidden></audio>
  <span class="note">Choose a prompt, press Continue.</span>
  <a download="continuation.wav" hidden>Save WAV</a>
</div>
"""
PLAYER_CSS = """
.row { display: flex; align-items: center; gap: 14px; min-height: 60px; padding: 6px 14px;
  border: 1px solid var(--border-color-primary); border-radius: 10px; }
canvas, audio { flex: 1; min-width: 0; height: 48px; }
[hidden] { display: none; }
.note { white-space: nowrap; font-variant-numeric: tabular-nums; }
a { white-space: nowrap; text-decoration: underline; }
"""


# -- the command ----------------------------------------------------------------------------------


def open_speakers(runs: list[str], device: str) -> dict[str, Speaker]:
    """Run folders by a short name: the folder's, with a number where two are alike."""
    speakers: dict[str, Speaker] = {}
    for folder in runs:
        name = base = Path(folder).resolve().name
        count = 1
        while name in speakers:
            count += 1
            name = f"{base} ({count})"
        speakers[name] = Speaker.open(folder, device)
    return speakers


def load_gradio(folder: Path) -> Any:
    """Imports gradio so that it reports nothing and keeps its files in `folder`.

    Raises ServeError without the extra.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # sharing, other addresses, more folders: not from the environment
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ServeError("needs gradio, which is not here: pip install 'wgpt[demo]'") from None
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return gradio


def application(gradio: Any, desk: Desk, port: int, folder: Path) -> loopback.Gate:
    """The page behind the gate, as an ASGI application."""
    import fastapi

    blocks = page(desk)
    max_bytes = int(desk.limits.max_upload_mb * 1e6)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        server_name=loopback.ADDRESS,
        server_port=port,
        footer_links=[],
        run_history=False,
        max_file_size=max_bytes,
        show_error=False,  # of a bug: its text may name our paths; gradio.Error is always shown
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gradio.themes.Soft(
            primary_hue="orange",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
    )
    blocks.has_launched = True  # gradio checks the paths in requests only when it is
    return loopback.Gate(app, port, folder, max_bytes, keep=MAX_WAITING + 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt serve`."""
    limits = Limits()
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run or model folder, or starter")
    parser.add_argument(
        "--port", type=int, default=7860, help="on 127.0.0.1; 0: any free (default 7860)"
    )
    for name, text in (
        ("max_prompt_s", "longest prompt, s"),
        ("max_seconds", "longest continuation, s"),
        ("max_upload_mb", "largest prompt file, MB"),
    ):
        default = getattr(limits, name)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=float,
            default=default,
            metavar="N",
            help=f"{text} (default {default:g})",
        )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """`wgpt serve`: until Ctrl-C or SIGTERM, which are a success."""
    limits = Limits(args.max_prompt_s, args.max_seconds, args.max_upload_mb)
    with contextlib.suppress(KeyboardInterrupt), one_thread(), contextlib.ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = stack.enter_context(loopback.private_folder("wgpt-serve-"))
        gradio = load_gradio(folder / "uploads")
        try:
            listening = stack.enter_context(socket.create_server((loopback.ADDRESS, args.port)))
        except (OSError, OverflowError) as error:
            raise ServeError(
                f"--port must be free on {loopback.ADDRESS}, got {args.port}: {error}"
            ) from None
        port = listening.getsockname()[1]
        desk = Desk(open_speakers(args.runs, args.device), limits)
        loopback.forbid_network()
        gate = application(gradio, desk, port, folder)
        url = f"http://{loopback.ADDRESS}:{port}"
        facts = json.dumps({"url": url, "runs": list(desk.speakers)})
        sys.stdout.write((facts if args.json else url) + "\n")
        sys.stdout.flush()
        log.info("open %s in a browser; Ctrl-C stops", url)
        _serve(gate, listening)
    log.info("stopped")
    return 0


def _serve(gate: loopback.Gate, listening: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            gate.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        gate,
        loop="asyncio",
        ws="none",
        proxy_headers=False,
        access_log=False,
        log_level="warning",
        limit_concurrency=200,
        timeout_graceful_shutdown=5,
    )
    Server(config).run(sockets=[listening])


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
