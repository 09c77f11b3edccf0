"""`wgpt study`: train the hybrid, its token-only twins and the controls; one table."""

from __future__ import annotations

import argparse
import json
import sys

from wgpt.experiments.arms import PLANS
from wgpt.experiments.study import study
from wgpt.experiments.study_tables import as_markdown

_SETTINGS = ("max_steps", "batch_size", "context_s", "lr", "patience", "eval_every", "dtype",
             "device")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt study`."""
    data = parser.add_argument_group("what")
    data.add_argument("data", metavar="DATA", help="folder written by `wgpt prepare`")
    data.add_argument(
        "--plan",
        default="quick",
        choices=tuple(PLANS),
        help="quick: models of 1.1 M, one seed, some minutes an arm on two cores (default); paper: "
        "those of 4 and 40 M with three seeds, days on a CPU",
    )
    data.add_argument("--arms", nargs="+", metavar="ARM", help="some of the plan's; default: all")
    data.add_argument(
        "--only", nargs="+", metavar="ARM:SEED", help="train these here; others elsewhere, or later"
    )
    data.add_argument(
        "--collect", action="store_true", help="train nothing; tables of what is in --out"
    )
    data.add_argument(
        "--dry-run", action="store_true", help="say what would be trained, and for how long"
    )
    training = parser.add_argument_group("settings of every arm, instead of the plan's")
    training.add_argument("--max-steps", type=int, help="optimizer steps at most")
    training.add_argument("--batch-size", type=int, help="windows per step")
    training.add_argument("--context-s", type=float, metavar="S", help="length of a window")
    training.add_argument("--lr", type=float, help="peak learning rate")
    training.add_argument("--dropout", type=float, help="on the residual branches")
    training.add_argument("--eval-every", type=int, help="steps between validations")
    training.add_argument(
        "--patience", type=int, help="validations without gain before an arm ends; 0: all steps"
    )
    training.add_argument("--dtype", choices=("fp32", "bf16"), help="arithmetic")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, help="folder to write, or to resume")
    output.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt study`."""
    settings = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    result = study(
        args.data,
        args.out,
        args.plan,
        arms=args.arms,
        only=args.only,
        collect=args.collect,
        dry_run=args.dry_run,
        model=None if args.dropout is None else {"dropout": args.dropout},
        **settings,
    )
    if args.json or args.dry_run:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write(as_markdown(result) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
