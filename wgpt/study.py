"""`wgpt study`: train the hybrid, its token-only twin and the controls; one table."""

from __future__ import annotations

import argparse
import json
import sys

from wgpt.experiments.study import SIZES, as_markdown, study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt study`."""
    data = parser.add_argument_group("data")
    data.add_argument("data", metavar="DATA", help="folder written by `wgpt prepare`")
    data.add_argument("--batch-size", type=int, default=8, help="windows per step (default 8)")
    data.add_argument(
        "--context-s", type=float, default=10.0, help="length of a window, seconds (default 10)"
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--size", default="xs", choices=tuple(SIZES), help="size of every arm (default xs)"
    )
    models.add_argument(
        "--arms", nargs="+", metavar="ARM",
        help="tokens, hybrid, decoded-K, leaky-W; default: all that the data allow",
    )  # fmt: skip
    training = parser.add_argument_group("optimisation")
    training.add_argument(
        "--max-steps", type=int, default=2000, help="optimizer steps of each arm (default 2000)"
    )
    training.add_argument(
        "--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)"
    )
    training.add_argument(
        "--seed", type=int, default=0, help="seed of weights and data order (default 0)"
    )
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, help="folder to write")
    output.add_argument("--json", action="store_true", help="print one JSON object")


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
