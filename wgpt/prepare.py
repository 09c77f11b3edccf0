"""`wgpt prepare`: turn recordings into tokens and mel slices, with an account of every file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys

from wgpt.cli import one_line
from wgpt.config import MelConfig, mel_source_name
from wgpt.data import prepare
from wgpt.data.parts import shard_of
from wgpt.data.report import report_lines
from wgpt.data.splits import SPLIT_BY
from wgpt.errors import ConfigError, Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, so that a larger command line can mount it."""
    parser.usage = "%(prog)s AUDIO [AUDIO ...] --out DATA [flags]"
    add = parser.add_argument_group("recordings").add_argument
    add(
        "audio", nargs="*", metavar="AUDIO",
        help="folders (walked recursively), audio files, or lists: a path a line, or CSV, TSV, "
        "JSON lines with path and, if wanted, group and split; tars of WebDataset, data sets of "
        "Hugging Face (of save_to_disk, parquet), manifests of lhotse; paths, or addresses of "
        "fsspec: s3://bucket/folder, gs://, hf://datasets/user/name (with --download)",
    )  # fmt: skip
    add("--valid", nargs="+", default=[], metavar="AUDIO", help="recordings to validate on")
    add("--test", nargs="+", default=[], metavar="AUDIO", help="recordings to test on")
    add(
        "--split-by", choices=SPLIT_BY,
        help="hold out whole groups (a list's column, LibriSpeech's speaker, or first-level "
        "folder), files, or the end of each file; default: group where there are at least 10, "
        "else file, else time for one or two long recordings",
    )  # fmt: skip
    add("--valid-fraction", type=float, default=0.1, help="share to validate on (default: 0.1)")
    add("--test-fraction", type=float, default=0.0, help="share to test on (default: 0)")
    add("--keep-silence", action="store_true", help="do not cut silence (over 0.3 s inside)")
    add("--keep-loudness", action="store_true", help="do not bring the loudness to -18 LUFS")
    add("--max-seconds", type=float, help="skip longer files (default: cut them into pieces)")
    add = parser.add_argument_group("tokens and mel slices").add_argument
    add("--codec", default="mini", help="codec name or path (default: mini)")
    add(
        "--mel-sources", nargs="+", metavar="SOURCE", type=mel_source_name,
        help="wave, decoded-K (audio of the first K codebooks), leaky-W (centred window of W "
        "samples, sees the future); default: wave decoded-1 and decoded-K of all codebooks up to "
        "8; adding one later costs only that one",
    )  # fmt: skip
    add(
        "--mel-bits", type=int, metavar="{16,8,5}", default=16,
        help="of a stored mel bin: 8 and 5 take a half and 5/16 of the space of the default 16, "
        "float16",
    )  # fmt: skip
    add("--jobs", type=int, metavar="N", help="worker processes (default: one per core)")
    add(
        "--shard", metavar="I/N",
        help="encode part I of N of the same recordings, on one of N machines; then wgpt merge",
    )  # fmt: skip
    add(
        "--engine", choices=["ray"],
        help="encode all parts on a Ray cluster, and merge them (pip install 'wgpt[ray]')",
    )  # fmt: skip
    add(
        "--parts", metavar="PARTS",
        help="with --engine: a folder or address for the parts, which all nodes see (default: "
        "DATA/.parts, deleted in the end)",
    )  # fmt: skip
    add("--download", action="store_true", help="let weights and hf:// recordings be downloaded")
    add = parser.add_argument_group("output").add_argument
    add(
        "--out", required=True, metavar="DATA",
        help="folder to write, or to add to; with --shard it may be an address",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace a finished folder that differs")
    add("--json", action="store_true", help="print account and totals as one line of JSON")
    add("--quiet", action="store_true", help="no progress bars, warnings only")
    add = parser.add_argument_group("mel", "the log-mel front end").add_argument
    for field in dataclasses.fields(MelConfig):
        if field.name in ("sample_rate_hz", "hop_samples"):  # the codec's
            continue
        flag, doc = f"--mel-{field.name.replace('_', '-')}", field.metadata.get("doc", "")
        if isinstance(field.default, bool):
            add(flag, action="store_true", help=doc)
        else:
            add(flag, type=type(field.default), default=field.default,
                help=f"{doc} (default: {field.default})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """`wgpt prepare`."""
    if args.quiet:
        logging.getLogger().setLevel(logging.WARNING)
    if not (args.audio or args.valid or args.test):
        raise ConfigError("name at least one folder, audio file or list: wgpt prepare AUDIO ...")
    names = [f.name for f in dataclasses.fields(MelConfig) if hasattr(args, f"mel_{f.name}")]
    try:
        manifest = prepare(
            args.audio,
            args.out,
            valid=args.valid,
            test=args.test,
            codec=args.codec,
            mel=MelConfig(**{name: getattr(args, f"mel_{name}") for name in names}),
            mel_sources=tuple(args.mel_sources) if args.mel_sources else None,
            mel_bits=args.mel_bits,
            split_by=args.split_by,
            valid_fraction=args.valid_fraction,
            test_fraction=args.test_fraction,
            keep_silence=args.keep_silence,
            keep_loudness=args.keep_loudness,
            jobs=args.jobs,
            max_seconds=args.max_seconds,
            download=args.download,
            overwrite=args.overwrite,
            progress=not args.quiet,
            shard=shard_of(args.shard) if args.shard else None,
            engine=args.engine,
            parts=args.parts,
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command resumes where this one stopped") from None
    if args.shard:
        i, n = manifest["shard"]
        n_files = len(manifest["entries"]) + len(manifest["unreadable_files"])
        n_skipped = len(manifest["reasons"]) + len(manifest["unreadable_files"])
        if args.json:
            part = {"out": args.out, "shard": [i, n], "files": n_files, "skipped": n_skipped}
            sys.stdout.write(json.dumps(part) + "\n")
        else:
            sys.stdout.write(
                f"part {i} of {n}: {n_files} files, {n_skipped} skipped; when all parts are done: "
                "wgpt merge PART ... --out DATA\n"
            )
        return 0
    if args.json:
        shown = ("account", "totals", "split_by", "report")
        line = {"out": str(args.out), "skipped": len(manifest["skipped"])}
        line |= {name: manifest[name] for name in shown}
        sys.stdout.write(json.dumps(line) + "\n")
        return 0
    lines = [*report_lines(manifest), f"listen and look: {args.out}/report.html"]
    sys.stdout.write("\n".join(map(one_line, lines)) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
