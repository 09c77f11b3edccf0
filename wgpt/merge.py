"""`wgpt merge`: join the parts that `wgpt prepare --shard` made into one data folder."""

from __future__ import annotations

import argparse
import json
import sys

from wgpt.cli import one_line
from wgpt.data import merge
from wgpt.data.report import report_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt merge`."""
    parser.add_argument(
        "parts",
        nargs="+",
        metavar="PART",
        help="all folders of wgpt prepare --shard, in any order; "
        "folders or addresses (s3://bucket/part-*)",
    )
    parser.add_argument("--out", required=True, metavar="DATA", help="folder to write")
    parser.add_argument("--codec", help="that of the parts, where it lies elsewhere by now")
    parser.add_argument("--overwrite", action="store_true", help="replace data that are there")
    parser.add_argument(
        "--json", action="store_true", help="print account and totals as one line of JSON"
    )


def run(args: argparse.Namespace) -> int:
    """`wgpt merge`."""
    manifest = merge(args.parts, args.out, codec=args.codec, overwrite=args.overwrite)
    if args.json:
        shown = ("account", "totals", "split_by", "report")
        sys.stdout.write(json.dumps({"out": args.out, **{n: manifest[n] for n in shown}}) + "\n")
        return 0
    lines = [*report_lines(manifest), f"listen and look: {args.out}/report.html"]
    sys.stdout.write("\n".join(map(one_line, lines)) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["merge", *sys.argv[1:]]))
