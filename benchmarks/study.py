"""Does mel help on recordings of people and of instruments? `wgpt study` on real recordings.

    python benchmarks/recordings.py --out RECORDINGS
    python benchmarks/study.py --recordings RECORDINGS --work WORK [--plan quick|paper] \
        [--corpora speech music] [--out benchmarks/results/study.json]

speech is dialogue of the game Fish Fillets in Czech and Dutch (quick: Dutch alone), for the plan
paper also the letters and words of KLettres and KTuberling in many languages; music is that of
Wesnoth, for the plan paper also Sonic Pi's samples and the songs of two other games. Scenes,
languages and tracks are held out whole: one group in six each for validation and for the test, by
the hash of its name. Both prepare and study resume where they were interrupted; other flags go to
`wgpt study` (`--only hybrid:1`, `--dtype bf16`, `--dry-run`).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from wgpt.files import write_atomically

CORPORA = {
    "quick": {"speech": ("fillets-ng-data-nl",), "music": ("wesnoth-1.16-music",)},
    "paper": {
        "speech": ("fillets-ng-data-cs", "fillets-ng-data-nl", "klettres-data", "ktuberling-data"),
        "music": ("wesnoth-1.16-music", "sonic-pi-samples", "asc-music", "hedgewars-data"),
    },
}
MEL_SOURCES = {
    "quick": ("wave", "decoded-1", "decoded-8"),
    "paper": ("wave", "decoded-1", "decoded-8", "leaky-1024", "leaky-2048"),
}


def side_of(group: str) -> str:
    """Split of a group, by the hash of its last name: one scene is on one side in all languages."""
    number = hashlib.sha256(group.rpartition("/")[2].encode()).digest()[0] % 6
    return {0: "valid", 1: "test"}.get(number, "train")


def list_corpus(recordings: Path, packages: tuple[str, ...], out: Path) -> None:
    """Writes a CSV for `wgpt prepare`: path, group, split."""
    with open(recordings / "recordings.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["package"] in packages]
    lines = [("path", "group", "split")]
    for row in rows:
        path = (recordings / row["path"]).resolve()
        lines.append((str(path), row["group"], side_of(row["group"])))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        csv.writer(file).writerows(lines)


def wgpt(*words: str | Path) -> str:
    """Stdout of a command of wgpt; its log goes to stderr."""
    command = [sys.executable, "-m", "wgpt", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Prepares and studies each corpus; JSON on stdout. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of recordings.py")
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--plan", choices=tuple(CORPORA), default="quick")
    parser.add_argument("--corpora", nargs="+", choices=("speech", "music"),
                        default=["speech", "music"])  # fmt: skip
    parser.add_argument("--out", type=Path, help="file of results to write or to add to")
    args, more = parser.parse_known_args(argv)
    results = {}
    for corpus in args.corpora:
        folder = args.work / f"{corpus}-{args.plan}"
        data = folder / "data"
        list_corpus(args.recordings, CORPORA[args.plan][corpus], folder / "recordings.csv")
        wgpt("prepare", folder / "recordings.csv", "--out", data,
             "--mel-sources", *MEL_SOURCES[args.plan])  # fmt: skip
        found = json.loads(wgpt("study", data, "--out", folder / "study", "--plan", args.plan,
                                "--json", *more))  # fmt: skip
        found["data"] = f"{corpus}: {', '.join(CORPORA[args.plan][corpus])}"
        results[f"{corpus}, {args.plan}"] = found
        if args.out and "arms" in found:  # beside what another machine has written by now
            others = json.loads(args.out.read_text()) if args.out.exists() else {}
            write_atomically(args.out, json.dumps({**others, **results}, indent=1) + "\n")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
