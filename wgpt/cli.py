"""The command line: `wgpt COMMAND`.

stdout is data, stderr is log and progress; exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys

from wgpt import __version__
from wgpt.errors import WgptError

COMMANDS = {
    "prepare": ("wgpt.prepare", "turn a folder of recordings into tokens and mel slices"),
    "train": ("wgpt.train", "train a model on prepared data"),
    "eval": ("wgpt.evaluate", "NLL, accuracy and perplexity of a run beside baselines"),
    "generate": ("wgpt.generate", "continue a recording, or start from silence"),
    "study": ("wgpt.study", "train the hybrid, its token-only twins and controls; one table"),
    "demo": ("wgpt.demo", "the whole way on the speech in the package and rendered music"),
    "serve": ("wgpt.serve", "a page on this machine: continue a recording and listen"),
    "doctor": ("wgpt.doctor", "what is installed, and what will run"),
}


def parser_for(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s module is imported, so that `--help` stays quick."""
    parser = argparse.ArgumentParser(
        prog="wgpt",
        description="Train, evaluate and sample audio language models over mel slices and tokens.",
        epilog="Start with `wgpt demo`, or: wgpt prepare DIR --out DATA; wgpt train --data DATA "
        "--out RUN; wgpt eval RUN; wgpt generate RUN --prompt x.wav --seconds 10 --out y.wav",
    )
    parser.add_argument("--version", action="version", version=f"wgpt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == command:
            importlib.import_module(module).add_arguments(sub)
    presets = commands.add_parser("presets", help="list the model presets")
    presets.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


def _print_presets(as_json: bool) -> int:
    import torch

    from wgpt.config import to_json
    from wgpt.model import HybridModel
    from wgpt.model.presets import PRESETS

    rows = []
    for name, (shape, summary) in PRESETS.items():
        with torch.device("meta"):
            parameters = HybridModel(shape).n_parameters()
        rows.append({"name": name, "parameters": parameters, "summary": summary, **to_json(shape)})
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    for row in rows:
        widths = f"{row['token_dim']}+{row['mel_dim']}"
        layers = f"{row['n_mel_layers'] if row['mel_dim'] else 0}+{row['n_layers']}"
        sys.stdout.write(
            f"{row['name']:14} {row['parameters']:>11,} parameters  token+mel width {widths:8} "
            f"mel+fused layers {layers:4} {row['summary']}\n"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. User errors become one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    for noisy in ("httpx", "huggingface_hub", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    command = next((word for word in argv if not word.startswith("-")), None)
    args = parser_for(command).parse_args(argv)
    if args.command == "presets":
        return _print_presets(args.json)
    module = importlib.import_module(COMMANDS[args.command][0])
    try:
        return int(module.run(args))
    except KeyboardInterrupt:
        sys.stderr.write(f"wgpt {args.command}: interrupted\n")
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; Python would complain again at exit
        return 1
    except WgptError as error:
        sys.stderr.write(f"wgpt {args.command}: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"wgpt {args.command}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
