"""`wgpt train`: train a model on prepared data, in one process or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from wgpt import config
from wgpt.cli import one_line
from wgpt.config import ModelConfig, TrainConfig
from wgpt.model.presets import PRESETS
from wgpt.training import train
from wgpt.training.allocator import keep_freed_memory
from wgpt.training.distributed import is_first_process

GROUPS = {  # heading: what it says under it
    "data": "what is read, and how it is cut into windows",
    "model": "the shape; by default that of --preset or of --init",
    "optimisation": None,
    "output": None,
    "research": "for a comparison or an experiment",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt train`: a flag for every TrainConfig and ModelConfig field."""
    parser.usage = "%(prog)s --data DATA --out RUN [flags]"
    groups = {title: parser.add_argument_group(title, text) for title, text in GROUPS.items()}
    groups["data"].add_argument("--data", help="folder written by `wgpt prepare`")
    groups["model"].add_argument(
        "--preset", choices=tuple(PRESETS), help="without it and --init, what suits the data"
    )
    output = groups["output"]
    output.add_argument("--out", required=True, metavar="RUN", help="run folder to write")
    output.add_argument(
        "--resume", action="store_true", help="resume RUN, with settings given here"
    )
    output.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    output.add_argument("--json", action="store_true", help="print the summary as JSON")
    for kind, usual in ((TrainConfig, "optimisation"), (ModelConfig, "model")):
        for field in dataclasses.fields(kind):
            add = groups[field.metadata["group"] or usual].add_argument
            doc = field.metadata["doc"].replace("%", "%%")
            if type(field.default) is bool:
                add(config.flag_of(field), action="store_const", const=True, help=doc)
                continue
            shown = kind is TrainConfig and field.default != ""
            add(
                config.flag_of(field),
                dest=field.name,
                type=type(field.default),
                metavar=field.metadata["choices"] or type(field.default).__name__.upper(),
                help=f"{doc} (default {field.default})" if shown else doc,
            )


def run(args: argparse.Namespace) -> int:
    """`wgpt train`."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    settings = {f.name: given[f.name] for f in dataclasses.fields(TrainConfig) if f.name in given}
    shape = {f.name: given[f.name] for f in dataclasses.fields(ModelConfig) if f.name in given}
    keep_freed_memory()
    summary = train(
        args.data, args.out, args.preset, resume=args.resume, dry_run=args.dry_run, model=shape,
        **settings,
    )  # fmt: skip
    if not is_first_process():  # which says it for all
        return 0
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    elif args.dry_run:
        sys.stdout.write(summary["plan"] + "\n")
    else:
        best = summary["best"]
        if best:
            sys.stdout.write(
                f"step {summary['best_step']}: validation NLL {best['nll_nats']:.4f} nats, "
                f"accuracy {100 * best['accuracy']:.2f} %\n"
            )
        sys.stdout.write(f"{one_line(args.out)}\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
