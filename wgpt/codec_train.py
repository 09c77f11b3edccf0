"""`wgpt codec-train`: train a codec on recordings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from wgpt.cli import one_line
from wgpt.codec.training.run import train_codec
from wgpt.codec.training.trainer import DTYPES, CodecTrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt codec-train`."""
    default = CodecTrainConfig()
    data = parser.add_argument_group("data and output")
    data.add_argument(
        "--data", type=Path, required=True, metavar="RECORDINGS",
        help="folder of recordings, or the table that benchmarks/recordings.py writes",
    )  # fmt: skip
    data.add_argument(
        "--work", type=Path, required=True, help="folder of the decoded corpus and the checkpoints"
    )
    data.add_argument(
        "--out", type=Path, required=True, metavar="CODEC", help="codec folder to write"
    )
    data.add_argument(
        "--init", metavar="CODEC",
        help="start from the weights of this codec (mini, or a folder of codec-train) instead of "
        "random ones",
    )  # fmt: skip
    data.add_argument("--resume", action="store_true", help="go on from the newest step in WORK")
    data.add_argument("--json", action="store_true", help="print the summary as JSON")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--filters", type=int, default=default.filters, metavar="INT",
        help=f"channels at the audio rate (default {default.filters})",
    )  # fmt: skip
    model.add_argument(
        "--hidden", type=int, default=default.hidden, metavar="INT",
        help=f"channels of a latent frame (default {default.hidden})",
    )  # fmt: skip
    training = parser.add_argument_group("optimisation")
    for flag, name, kind, text in (
        ("--steps", "n_steps", int, "training steps; may be changed when resuming"),
        ("--decay-steps", "decay_steps", int, "last steps, over which the step size falls"),
        ("--batch", "batch", int, "crops of half a second in a batch"),
        ("--lr", "lr", float, "peak step, relative to a tensor's own size"),
        (
            "--warmup-steps",
            "warmup_steps",
            int,
            "steps before the quantiser starts; none with --init",
        ),
        ("--seed", "seed", int, "seed of every draw"),
    ):
        value = getattr(default, name)
        training.add_argument(
            flag, dest=name, type=kind, default=value, metavar=kind.__name__.upper(),
            help=f"{text} (default {value})",
        )  # fmt: skip
    training.add_argument(
        "--dtype", choices=tuple(DTYPES), default=default.dtype,
        help="of activations; float32 where the CPU has no bfloat16 (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """`wgpt codec-train`."""
    names = CodecTrainConfig.__dataclass_fields__
    config = CodecTrainConfig(**{name: getattr(args, name) for name in names if name in args})
    summary = train_codec(
        args.data, args.work, args.out, config, init=args.init, resume=args.resume
    )
    sys.stdout.write((json.dumps(summary) if args.json else one_line(args.out)) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    raise SystemExit(main(["codec-train", *sys.argv[1:]]))
