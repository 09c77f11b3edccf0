"""`wgpt prepare`: turn a folder of recordings into tokens and mel slices."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys

from wgpt import audio
from wgpt.config import MelConfig, mel_source_name
from wgpt.data import prepare
from wgpt.errors import Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, so that a larger command line can mount it."""
    parser.usage = "%(prog)s AUDIO_DIR --out DATA [flags]"
    add = parser.add_argument_group("data").add_argument
    add("audio_dir", metavar="AUDIO_DIR", help="folder of audio files, walked recursively")
    add("--codec", default="mini", help="codec name or path (default: mini)")
    add(
        "--mel-sources", nargs="+", default=["wave"], metavar="SOURCE", type=mel_source_name,
        help="wave, decoded-K (audio of the first K codebooks), leaky-W (centred window of W "
        "samples, sees the future); default: wave",
    )  # fmt: skip
    add("--valid-fraction", type=float, default=0.1, help="share of files (default: 0.1)")
    add("--jobs", type=int, default=1, metavar="N", help="worker processes (default: 1)")
    add(
        "--max-seconds", type=float, default=audio.MAX_SECONDS,
        help=f"skip longer files (default: {audio.MAX_SECONDS:g})",
    )  # fmt: skip
    add("--download", action="store_true", help="let the codec's weights be downloaded")
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, metavar="DATA", help="folder to write")
    add("--overwrite", action="store_true", help="replace a finished folder that differs")
    add("--json", action="store_true", help="print the totals as one line of JSON")
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
    names = [f.name for f in dataclasses.fields(MelConfig) if hasattr(args, f"mel_{f.name}")]
    try:
        manifest = prepare(
            args.audio_dir,
            args.out,
            codec=args.codec,
            mel=MelConfig(**{name: getattr(args, f"mel_{name}") for name in names}),
            mel_sources=tuple(args.mel_sources),
            valid_fraction=args.valid_fraction,
            jobs=args.jobs,
            max_seconds=args.max_seconds,
            download=args.download,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command resumes where this one stopped") from None
    totals, n_skipped = manifest["totals"], len(manifest["skipped"])
    if args.json:
        line = json.dumps({"out": str(args.out), "totals": totals, "skipped": n_skipped})
        sys.stdout.write(line + "\n")
        return 0
    for split, total in totals.items():
        sys.stdout.write(
            f"{split}: {total['files']} files, {total['clips']} clips, {total['steps']} steps, "
            f"{total['seconds']:.1f} s\n"
        )
    if n_skipped:
        sys.stdout.write(f"skipped: {n_skipped} files, reasons in {args.out}/manifest.json\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
