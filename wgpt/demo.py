"""`wgpt demo`: the whole pipeline on the speech in the package and rendered music."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from wgpt.cli import one_line
from wgpt.evaluation.tables import distance_table
from wgpt.experiments.demo import demo
from wgpt.experiments.study_tables import as_markdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt demo`."""
    parser.add_argument("--out", default="demo", help="new folder to write (default: demo)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt demo`."""
    result = demo(args.out, args.steps, args.device)
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        tables = f"{as_markdown(result)}\n\n{distance_table(result['likeness'])}"
        sys.stdout.write(f"{tables}\n\n{one_line(Path(args.out) / 'report.html')}\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
