"""`wgpt presets`: list the model presets."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from wgpt.config import to_json
from wgpt.model import HybridModel
from wgpt.model.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt presets`."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    """`wgpt presets`."""
    rows = []
    for name, (shape, summary) in PRESETS.items():
        with torch.device("meta"):
            parameters = HybridModel(shape).n_parameters()
        rows.append({"name": name, "parameters": parameters, "summary": summary, **to_json(shape)})
    if args.json:
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


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["presets", *sys.argv[1:]]))
