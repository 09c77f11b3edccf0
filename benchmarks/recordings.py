"""Real speech and real instruments, from Debian packages, as one folder and one table.

    python benchmarks/recordings.py --out RECORDINGS [--sets speech music all]

Needs a Debian or Ubuntu with its package index (`apt-get update`), and no root: packages are
downloaded and unpacked, not installed. RECORDINGS then holds the unpacked sound of every package,
the packages' copyright files, and recordings.csv, one row a file, which `wgpt prepare` and
`wgpt codec-train` take as they are.

Some recordings are held out: nothing in this repository is trained on them, and the figures of
the codec and of the models are measured on them. They are all of fillets-ng-data-nl (other actors
and another language than the Czech package), ktuberling's Danish, Ukrainian, English and German,
every fourth track of Wesnoth and every fourth sample of Sonic Pi. A file whose bytes also occur
among the held-out ones is held out as well.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import soundfile

from wgpt.files import sha256_of, write_atomically

TABLE = "recordings.csv"
COLUMNS = (
    "path", "sha256", "seconds", "rate_hz", "kind", "group", "split", "package", "licence",
)  # fmt: skip
SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3".split())


@dataclass(frozen=True)
class Package:
    """A Debian package with recordings.

    Attributes:
        name: of the package.
        kind: "speech" or "music".
        root: folder of the sound inside the package; what lies elsewhere is left out.
        licence: of the recordings, as the package's copyright file says.
        group: what belongs together (a speaker, a scene, a language, a track) by the path below
            `root`: a split must not part it.
        held_out: which files, by their path below `root` and their rank in the sorted list.
    """

    name: str
    kind: str
    root: str
    licence: str
    group: Callable[[PurePosixPath], str]
    held_out: Callable[[PurePosixPath, int], bool] = lambda path, rank: False


def _top(path: PurePosixPath) -> str:
    return path.parts[0]


def _stamp_language(path: PurePosixPath) -> str:
    """Language of one of Tux Paint's stamps: dolphin_desc_ca.ogg is Catalan."""
    return path.stem.rpartition("_desc_")[2] if "_desc_" in path.stem else "en-or-effect"


HELD_OUT_LANGUAGES = ("da", "uk", "en", "de")  # of ktuberling

PACKAGES = (
    Package("fillets-ng-data-cs", "speech", "usr/share/games/fillets-ng/sound", "GPL-2+", _top),
    Package(
        "fillets-ng-data-nl", "speech", "usr/share/games/fillets-ng/sound", "GPL-2+", _top,
        held_out=lambda path, rank: True,
    ),
    Package("klettres-data", "speech", "usr/share/klettres", "GPL-2+", _top),
    Package(
        "ktuberling-data", "speech", "usr/share/ktuberling/sounds", "GPL-2+", _top,
        held_out=lambda path, rank: path.parts[0] in HELD_OUT_LANGUAGES,
    ),
    Package(
        "tuxpaint-stamps-default", "speech", "usr/share/tuxpaint/stamps", "GPL-2+",
        _stamp_language,
    ),
    Package(
        "gcin-voice", "speech", "usr/share/gcin-voice/ogg",
        "GPL-3 or LGPL-3 (3.ogg), CC-BY-3.0 (5.ogg)", lambda path: path.stem,
    ),
    Package(
        "festvox-ru", "speech", "usr/share/festival/voices/russian/msu_ru_nsh_clunits/wav",
        "BSD-like (Shmyrev 2005)", lambda path: "nsh",
    ),
    Package(
        "hedgewars-data", "speech", "usr/share/games/hedgewars/Data/Sounds/voices", "GFDL-1.3",
        _top,
    ),
    Package(
        "asterisk-core-sounds-en-wav", "speech", "usr/share/asterisk/sounds", "CC-BY-SA-3.0",
        lambda path: "one voice",
    ),
    Package(
        "wesnoth-1.16-music", "music", "usr/share/games/wesnoth/1.16/data/core/music", "GPL-2+",
        lambda path: path.stem, held_out=lambda path, rank: rank % 4 == 3,
    ),
    Package(
        "sonic-pi-samples", "music", "usr/share/sonic-pi/samples", "CC0-1.0 (by file), else MIT",
        lambda path: path.stem.partition("_")[0], held_out=lambda path, rank: rank % 4 == 3,
    ),
    Package("asc-music", "music", "usr/share", "GPL-2+", lambda path: path.stem),
    Package("colobot-common-sounds", "music", "usr/share/games/colobot", "GPL-3+", _top),
)  # fmt: skip


class RecordingsError(Exception):
    """What stands in the way, and what to do about it."""


def fetch(package: Package, folder: Path) -> None:
    """Download and unpack a package's sound and its copyright file, unless they are there."""
    target = folder / package.name
    if target.is_dir():
        return
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise RecordingsError(
                f"recordings: {program} is not on PATH; this needs Debian or Ubuntu. Elsewhere "
                f"unpack the package {package.name} of Debian 12 into {target}"
            )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        process = subprocess.run(
            ["apt-get", "download", package.name], cwd=temporary, capture_output=True, text=True
        )
        found = list(Path(temporary).glob("*.deb"))
        if process.returncode or len(found) != 1:
            reason = (process.stderr.strip().splitlines() or ["no file came"])[-1]
            raise RecordingsError(
                f"recordings: apt-get could not download {package.name}: {reason}; run "
                "`apt-get update` first, and check that the distribution has this package"
            )
        unpacked = Path(temporary) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", found[0], unpacked], check=True)
        copyright_file = unpacked / "usr/share/doc" / package.name / "copyright"
        sound = unpacked / package.root
        if not sound.is_dir():
            raise RecordingsError(
                f"recordings: {found[0].name} has no folder {package.root}; expected the package "
                "as in Debian 12"
            )
        staged = Path(temporary) / "staged"
        _keep_sound(sound, staged / "sound")
        shutil.copyfile(copyright_file, staged / "copyright")
        staged.rename(target)


def _keep_sound(source: Path, target: Path) -> None:
    """Move the audio files, and neither links nor anything else, to the same place in target."""
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)


def table(packages: Iterable[Package], folder: Path) -> list[dict[str, object]]:
    """One row a readable file, sorted by path; columns as in COLUMNS."""
    rows: list[dict[str, object]] = []
    for package in packages:
        root = folder / package.name / "sound"
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        for rank, path in enumerate(paths):
            below = PurePosixPath(path.relative_to(root))
            try:
                info = soundfile.info(str(path))
            except soundfile.LibsndfileError as error:
                print(f"recordings: left out {path}: {error}", file=sys.stderr)
                continue
            rows.append(
                {
                    "path": str(PurePosixPath(path.relative_to(folder))),
                    "sha256": sha256_of(path),
                    "seconds": round(info.duration, 3),
                    "rate_hz": info.samplerate,
                    "kind": package.kind,
                    "group": f"{package.name}/{package.group(below)}",
                    "split": "held-out" if package.held_out(below, rank) else "train",
                    "package": package.name,
                    "licence": package.licence,
                }
            )
    held_out = {row["sha256"] for row in rows if row["split"] == "held-out"}
    for row in rows:
        if row["sha256"] in held_out:
            row["split"] = "held-out"
    return sorted(rows, key=lambda row: str(row["path"]))


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    """The table as CSV, whole or not at all."""
    with tempfile.TemporaryFile("w+", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.seek(0)
        write_atomically(path, file.read())


def summary(rows: list[dict[str, object]]) -> dict[str, object]:
    """Files and minutes by package and split, and the hash of all hashes."""
    packages: dict[str, dict[str, float]] = {}
    for row in rows:
        entry = packages.setdefault(f"{row['package']} {row['split']}", {"files": 0, "minutes": 0})
        entry["files"] += 1
        entry["minutes"] += float(str(row["seconds"])) / 60
    for entry in packages.values():
        entry["minutes"] = round(entry["minutes"], 1)
    hashes = "\n".join(sorted(str(row["sha256"]) for row in rows))
    return {"packages": packages, "sha256": hashlib.sha256(hashes.encode()).hexdigest()}


def main(argv: list[str] | None = None) -> int:
    """Fetch, list, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="RECORDINGS")
    parser.add_argument("--sets", nargs="+", choices=["speech", "music", "all"], default=["all"])
    args = parser.parse_args(argv)
    packages = [p for p in PACKAGES if "all" in args.sets or p.kind in args.sets]
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for package in packages:
            print(f"recordings: {package.name}", file=sys.stderr)
            fetch(package, args.out)
    except RecordingsError as error:
        print(error, file=sys.stderr)
        return 1
    rows = table(packages, args.out)
    write_table(args.out / TABLE, rows)
    report = summary(rows)
    for name, entry in report["packages"].items():  # type: ignore[attr-defined]
        print(f"{name:40} {entry['files']:6} files {entry['minutes']:7.1f} min", file=sys.stderr)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
