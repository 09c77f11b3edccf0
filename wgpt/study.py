"""`wgpt study`: train the hybrid, its token-only twin and the controls; one table."""

from __future__ import annotations

import argparse
import json
import sys

from wgpt.experiments.study import SIZES, as_markdown, study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt study`."""
    parser.add_argument("data", metavar="DATA", help="folder written by `wgpt prepare`")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--size", default="xs", choices=tuple(SIZES))
    parser.add_argument("--arms", nargs="+", help="default: all that the data allow")
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-s", type=float, default=10.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt study`."""
    result = study(
        args.data,
        args.out,
        size=args.size,
        arms=args.arms,
        device=args.device,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        context_s=args.context_s,
        lr=args.lr,
        seed=args.seed,
    )
    sys.stdout.write((json.dumps(result) if args.json else as_markdown(result)) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
