"""`wgpt eval`: NLL, accuracy and perplexity of a run beside baselines."""

from __future__ import annotations

import argparse
import json
import sys

from wgpt.config import WEIGHT_DTYPES
from wgpt.data.dataset import SPLITS
from wgpt.evaluation import evaluate
from wgpt.evaluation.tables import codebook_table, drift_table, listener_table, score_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt eval`."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run folder, RUN@step-500, a model folder, starter, or user/model of the Hub",
    )
    parser.add_argument(
        "--download", action="store_true", help="let a model of the Hub be downloaded"
    )
    parser.add_argument(
        "--data", help="prepared data folder (default: that of the run; a model folder has none)"
    )
    parser.add_argument(
        "--split",
        default="valid",
        choices=SPLITS,
        help="clips to score (default valid)",
    )
    parser.add_argument(
        "--context-s",
        type=float,
        metavar="S",
        help="length of the scored windows, seconds (default: that of the training windows)",
    )
    parser.add_argument(
        "--weight-dtype",
        choices=WEIGHT_DTYPES,
        default="fp32",
        help="score weights as `wgpt generate --weight-dtype` rounds them (default fp32)",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default cpu)")
    parser.add_argument(
        "--rollout-s",
        type=int,
        default=0,
        metavar="S",
        help="also continue prompts for S seconds and report how the sound drifts (default 0)",
    )
    parser.add_argument("--rollout-clips", type=int, default=8, help="rollouts (default 8)")
    parser.add_argument(
        "--metrics",
        action="store_true",
        help="also let trained listeners judge the rollouts: speaker similarity, a recogniser of "
        "English; each needs a package, and is left out by name where that is missing",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt eval`: prints the table, or JSON."""
    result = evaluate(
        args.run,
        args.data,
        args.split,
        args.device,
        args.rollout_s,
        args.rollout_clips,
        args.context_s,
        args.download,
        args.weight_dtype,
        args.metrics,
    )
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    sys.stdout.write(score_table(result["rows"]) + "\n")
    if result["codebooks"]:
        sys.stdout.write("\n" + codebook_table(result["codebooks"]) + "\n\n")
    if result["rollout"]:
        sys.stdout.write("\n" + drift_table(result["rollout"]) + "\n\n")
        if result["rollout"]["listeners"]:
            sys.stdout.write(listener_table(result["rollout"]["listeners"]["rows"]) + "\n\n")
    for row in result["codec"]:
        sys.stdout.write(
            f"codec ceiling, {row['codebooks']} codebook(s): log-mel error "
            f"{row['log_mel_error_db']:.2f} dB\n"
        )
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
