"""`wgpt serve`: a page on this machine that continues a recording while you listen."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys

from wgpt.config import WEIGHT_DTYPES
from wgpt.errors import ServeError
from wgpt.ops.runtime import one_thread
from wgpt.serving.session import GenerationSession, Limits, load_models

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt serve`."""
    limits = Limits()
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as RUN of `wgpt generate`")
    parser.add_argument(
        "--download", action="store_true", help="let a model of the Hub be downloaded"
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="on 127.0.0.1; 0: any free (default 7860)"
    )
    group = parser.add_argument_group("limits")
    for name, text in (
        ("max_prompt_s", "longest prompt, s"),
        ("max_seconds", "longest continuation, s"),
        ("max_upload_mb", "largest prompt file, MB"),
    ):
        default = getattr(limits, name)
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=float,
            default=default,
            metavar="N",
            help=f"{text} (default {default:g})",
        )
    parser.add_argument(
        "--weight-dtype",
        choices=WEIGHT_DTYPES,
        default="fp32",
        help="how weights are held, on the CPU: bf16 and int8 are faster (default fp32)",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """`wgpt serve`: until Ctrl-C or SIGTERM, which are a success."""
    try:
        from wgpt.serving import server
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        raise ServeError(f"needs {missing}: pip install 'wgpt[serve]'") from None
    limits = Limits(args.max_prompt_s, args.max_seconds, args.max_upload_mb)
    with contextlib.suppress(KeyboardInterrupt), one_thread(), contextlib.ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        stack.callback(signal.signal, signal.SIGTERM, before)
        listening = stack.enter_context(server.listen(args.port))
        models = load_models(args.runs, args.device, args.download, args.weight_dtype)
        session = GenerationSession(models, limits)
        url = "http://{}:{}".format(*listening.getsockname())
        facts = json.dumps({"url": url, "runs": list(session.models)})
        sys.stdout.write((facts if args.json else url) + "\n")
        sys.stdout.flush()
        log.info("open %s in a browser; Ctrl-C stops", url)
        server.serve(session, listening)
    log.info("stopped")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
