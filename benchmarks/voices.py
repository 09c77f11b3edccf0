"""What becomes of a person's own recordings? README's commands, on voices nobody trained on.

    python benchmarks/recordings.py --out RECORDINGS
    python benchmarks/voices.py --recordings RECORDINGS --work WORK [--cases CASE ...] \
        [--out benchmarks/results/voices.json] [--threads 2]

Each case lays out a folder of recordings of a held-out set of recordings.py and runs
`wgpt prepare`, `train`, `eval` and `generate` on it with no other flag than README's:

    15min     15 minutes of Dutch dialogue, whole scenes, and seven odd files among them
    95min     all scenes but those held out
    one-file  the same, joined to a single WAV
    actor     15 minutes of one of the two actors
    music     held-out orchestral tracks
    starter   no training: the packaged model, or --models, on 3 s of 16 clips of speech, of music
              and of English words

Judged are continuations of 4 s, by 16 clips of scenes (or tracks) that no case trains on, the whole
clip and its first 2 s as the prompt, beside the true recordings and the codec's own round trip:
share of silent 100 ms frames, periodicity (wgpt/evaluation/frechet.py), the cosine of
resemblyzer's speaker embeddings to the whole clip, and the Frechet distance of log-mel slices to
other real clips. Recordings are treated as prepare treats them (silence cut, -18 LUFS).

The case `starter` adds a Frechet audio distance on the embeddings of a music tagger (tagger.py; 16
clips give 64 embeddings of 128 numbers, so the row of real recordings is far from 0), and how sure
a recogniser of English is of the words it hears, and how many they are, in Dutch and after prompts
of ktuberling's English words, joined in the order of their names.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from spectrograms import draw_spectrograms
from tagger import Tagger, is_installed

import wgpt
from wgpt import audio
from wgpt.audio import Recording
from wgpt.audio.mel import MelFrontend
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ
from wgpt.data.treatment import PIECE_SECONDS, Plan, Treatment, measure
from wgpt.errors import AudioError
from wgpt.evaluation.codec_ceiling import DB_PER_NEPER
from wgpt.evaluation.frechet import (
    Statistics,
    frechet_db,
    periodicity,
    squared_frechet,
    statistics,
)
from wgpt.evaluation.listeners import Listeners
from wgpt.files import write_atomically
from wgpt.generation import AudioGenerator, Sampling
from wgpt.generation.listener import silent_share
from wgpt.generation.sampling import FINE_TEMPERATURE

CASES = ("15min", "95min", "one-file", "actor", "music", "starter")
SETS = {"music": "wesnoth-1.16-music"}
SPEECH = "fillets-ng-data-nl"
HELD_OUT_GROUPS = {SPEECH: 12, "wesnoth-1.16-music": 2}
N_CLIPS, N_REFERENCE = 16, 64
CLIP_S = (2.5, 8.0)  # of the clips that prompt
CONTINUE_S = 4.0
SHORT = 2 * SAMPLE_RATE_HZ  # samples of a short prompt
COMPARED = {"speech": (SPEECH,), "music": ("wesnoth-1.16-music", "sonic-pi-samples")}
ENGLISH = "ktuberling-data/en"  # a group: single words
SPOKEN, ACTOR = re.compile(r"-[mv]-[^/]*$"), re.compile(r"-m-[^/]*$")  # names say who speaks

Wave = np.ndarray  # float32 (L,), 24 kHz


# ------------------------------------------------------------------ recordings


def rows_of(table: Path, package: str) -> list[dict[str, str]]:
    """The rows of a held-out set, in an order that hashes give."""
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if row["package"] == package and row["split"] == "held-out"]  # fmt: skip
    return sorted(rows, key=lambda row: row["sha256"])


def held_out_groups(rows: list[dict[str, str]], n: int) -> set[str]:
    """The n groups that no case trains on."""
    groups = {row["group"] for row in rows}
    return set(sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())[:n])


def treated(path: Path) -> list[Wave]:
    """A recording as prepare would encode it, in pieces; none where it refuses it."""
    recording = Recording(path)
    try:
        plan = Plan(measure(recording), Treatment(), HOP_SAMPLES, PIECE_SECONDS * SAMPLE_RATE_HZ)
        return list(plan.pieces(recording))
    except AudioError:
        return []


def clips_of(table: Path, rows: list[dict[str, str]], n: int) -> list[Wave]:
    """n clips of at most CLIP_S[1] s: of short files the whole, of long ones several places."""
    clips: list[Wave] = []
    shortest, longest = (round(s * SAMPLE_RATE_HZ) // HOP_SAMPLES * HOP_SAMPLES for s in CLIP_S)
    for row in rows:
        for piece in treated(table.parent / row["path"]):
            for start in range(0, max(len(piece) - shortest, 0), 3 * longest):
                clips.append(piece[start : start + longest])
    keep = [i * len(clips) // n for i in range(min(n, len(clips)))]
    return [clips[i] for i in keep]


def lay_out(case: str, table: Path, rows: list[dict[str, str]], folder: Path) -> None:
    """The recordings of a case: a folder for each scene, as a person would have them."""
    shutil.rmtree(folder, ignore_errors=True)
    if case == "actor":
        rows = [row for row in rows if ACTOR.search(row["path"])]
    limit_s = 15 * 60 if case in ("15min", "actor") else np.inf
    by_scene = sorted(rows, key=lambda row: (hashlib.sha256(row["group"].encode()).digest(),
                                             row["path"]))  # fmt: skip
    chosen, total_s = [], 0.0
    for row in by_scene:
        if total_s >= limit_s:
            break
        chosen.append(row)
        total_s += float(row["seconds"])
    sources = [table.parent / row["path"] for row in chosen]
    if case == "one-file":
        folder.mkdir(parents=True)
        waves = [audio.read(source, SAMPLE_RATE_HZ)
                 for row, source in zip(chosen, sources, strict=True)
                 if float(row["seconds"]) > 0]  # fmt: skip
        soundfile.write(folder / "all.wav", np.concatenate(waves), SAMPLE_RATE_HZ)
        return
    for row, source in zip(chosen, sources, strict=True):
        target = folder / row["group"].rpartition("/")[2] / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    if case == "15min":
        add_odd_files(folder / "odd", table, rows_of(table, SPEECH))


def add_odd_files(folder: Path, table: Path, rows: list[dict[str, str]]) -> None:
    """What real folders also hold: files that are broken, empty, joined, cancelling, silent."""
    folder.mkdir()
    whole = [table.parent / row["path"] for row in rows if float(row["seconds"]) > 3][:3]
    (folder / "broken.ogg").write_bytes(whole[0].read_bytes()[:900])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "chained.ogg").write_bytes(whole[0].read_bytes() + whole[1].read_bytes())
    wave = audio.read(whole[2], SAMPLE_RATE_HZ)
    soundfile.write(folder / "antiphase.wav", np.stack([wave, -wave], 1), SAMPLE_RATE_HZ)
    soundfile.write(folder / "silent.wav", np.zeros(72_000), SAMPLE_RATE_HZ)
    (folder / "notes.txt").write_text("where and when\n")
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        print("no m4a among them: ffmpeg is not installed", file=sys.stderr)
        return
    subprocess.run([ffmpeg, "-v", "error", "-i", whole[2], folder / "interview.m4a"], check=True)


# ------------------------------------------------------------------ commands


class Commands:
    """Runs wgpt's commands as a user would, and keeps their seconds."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.seconds = folder, dict[str, float]()
        self.env = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def __call__(self, *words: str | Path) -> str:
        """Stdout of `wgpt WORDS`; what it says on stderr goes to FOLDER/log.txt."""
        command = [sys.executable, "-m", "wgpt", *map(str, words)]
        began = time.monotonic()
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"\n$ wgpt {' '.join(map(str, words))}\n")
            log.flush()
            done = subprocess.run(
                command, env=self.env, stdout=subprocess.PIPE, stderr=log, text=True, check=True
            )
            log.write(done.stdout)
        self.seconds[str(words[0])] = round(time.monotonic() - began, 1)
        return done.stdout


def run_case(folder: Path, prompt: Wave, threads: int) -> dict[str, Any]:
    """README's four commands on FOLDER/recordings. Returns what they say."""
    for old in ("data", "run"):
        shutil.rmtree(folder / old, ignore_errors=True)
    (folder / "log.txt").unlink(missing_ok=True)
    wgpt_ = Commands(folder, threads)
    data, run = folder / "data", folder / "run"
    wgpt_("prepare", folder / "recordings", "--out", data)
    trained = json.loads(wgpt_("train", "--data", data, "--out", run, "--json"))
    rows = json.loads(wgpt_("eval", run, "--json"))["rows"]
    audio.write(folder / "x.wav", prompt)
    wgpt_("generate", run, "--prompt", folder / "x.wav", "--seconds", "10",
          "--out", folder / "y.wav")  # fmt: skip
    manifest = json.loads((data / "manifest.json").read_text())
    whole = {row["model"]: row["nll_nats"] for row in rows if row["group"] == "all"}
    return {
        "account": manifest["account"],
        "minutes": {name: round(part["seconds"] / 60, 1) if "seconds" in part
                    else round(part["steps"] / 75 / 60, 1)
                    for name, part in manifest["totals"].items() if part},
        "seconds": wgpt_.seconds,
        "steps": trained["steps"],
        "best_step": trained["best_step"],
        "nll_nats": whole,
    }  # fmt: skip


# ------------------------------------------------------------------ judging


class Judge:
    """Measures what follows prompts of some clips, against other real sound of the same kind.

    clips: what is judged stands for; reference: other real clips; frontend: of the log-mel slices.
    """

    def __init__(self, clips: list[Wave], reference: list[Wave], frontend: MelFrontend) -> None:
        self.clips, self.frontend, self.listeners = clips, frontend, Listeners()
        mels = [self.mel(wave) for wave in reference]
        # Relative to the first 2 s of a clip, as those that are judged.
        self.real = statistics(mels, SHORT // HOP_SAMPLES, skip_prompt=False)

    def mel(self, wave: Wave) -> np.ndarray:
        """(T, M), natural logarithm."""
        return self.frontend(torch.from_numpy(np.ascontiguousarray(wave))).numpy()

    def row(
        self, prompts: list[Wave], rests: list[Wave], alike: list[Wave] | None = None
    ) -> dict[str, float]:
        """alike: what is compared with the whole clips by speaker."""
        pairs = list(zip(prompts, rests, strict=True))
        mels = [self.mel(np.concatenate([prompt[-SHORT:], rest])) for prompt, rest in pairs]
        heard = [periodicity(np.concatenate(pair), len(pair[0])) for pair in pairs]
        found = {
            "silent": float(np.mean([silent_share(rest) for rest in rests])),
            "periodicity": float(np.mean(heard)),
            "frechet_db": frechet_db(statistics(mels, SHORT // HOP_SAMPLES, True), self.real),
        }
        return found | self.speaker(alike)

    def speaker(self, waves: list[Wave] | None) -> dict[str, float]:
        """Cosine of the speaker embeddings of waves and clips; none without resemblyzer."""
        if not waves or "speaker" in self.listeners.missing:
            return {}
        pairs = zip(waves, self.clips[: len(waves)], strict=True)
        return {"speaker": float(np.mean([self.listeners.speaker(*pair) for pair in pairs]))}


class TaggerDistance:
    """Frechet audio distance to other real clips, on the embeddings of a music tagger."""

    def __init__(self, reference: list[Wave]) -> None:
        self._tagger = Tagger()
        self._real = self._statistics(reference)

    def _statistics(self, waves: list[Wave]) -> Statistics:
        rows = np.concatenate([self._tagger.embed(wave) for wave in waves]).astype(np.float64)
        return Statistics(rows.mean(0), np.cov(rows.T))

    def __call__(self, waves: list[Wave]) -> float:
        return squared_frechet(self._statistics(waves), self._real)


def sureness(waves: list[Wave], listeners: Listeners) -> dict[str, float]:
    """Confidence and words/s of a recogniser of English, means; none without pocketsphinx."""
    heard = [pair for wave in waves if (pair := listeners.confidence(wave)) is not None]
    if not heard:
        return {}
    confidence, words_per_s = np.mean(heard, axis=0)
    return {"confidence": float(confidence), "words_per_s": float(words_per_s)}


def round_trip(generator: AudioGenerator, wave: Wave) -> Wave:
    """The wave through the codec, all codebooks."""
    wave = wave[: len(wave) // HOP_SAMPLES * HOP_SAMPLES]
    codes = generator.codec.encode(torch.from_numpy(wave.copy()))
    return generator.codec.decode(codes[: generator.n_codebooks]).cpu().numpy()


def continued(generator: AudioGenerator, prompts: list[Wave], sampling: Sampling) -> list[Wave]:
    """4 s after each prompt, without the prompt; a clip does not end before."""
    n_steps = round(CONTINUE_S * SAMPLE_RATE_HZ) // HOP_SAMPLES
    batches = list(generator.steps_batch(prompts, n_steps, sampling, range(len(prompts))))
    return [np.concatenate([batch[i].wave for batch in batches]) for i in range(len(prompts))]


def judge(
    generator: AudioGenerator,
    clips: list[Wave],
    reference: list[Wave],
    sampling: Sampling,
    has_speaker: bool,
) -> tuple[dict[str, dict[str, float]], list[tuple[str, Wave]]]:
    """The measures by kind of sound, and some sounds to look at; has_speaker: of one voice each."""
    judges = Judge(clips, reference, generator.frontend)
    copies = [round_trip(generator, clip) for clip in clips]
    table = {
        "real recordings": judges.row([c[:SHORT] for c in clips], [c[SHORT:] for c in clips]),
        "codec's round trip": judges.row(
            [c[:SHORT] for c in copies], [c[SHORT:] for c in copies], copies * has_speaker
        ),
        "other real clips": judges.speaker(reference[: len(clips)] * has_speaker),
    }
    for name, waves in (("real recordings", clips), ("codec's round trip", copies)):
        table[name]["silent"] = float(np.mean([silent_share(wave) for wave in waves]))  # whole
    shown: list[tuple[str, Wave]] = []
    for title, prompts in (
        ("after the whole clip", clips),
        ("after 2 s", [clip[:SHORT] for clip in clips]),
    ):
        rests = continued(generator, prompts, sampling)
        table[title] = judges.row(prompts, rests, rests * has_speaker)
        shown += [(f"{title}, clip {i + 1}", np.concatenate([prompts[i], rests[i]]))
                  for i in range(2)]  # fmt: skip
    return table, shown


def compare(models: list[str], table: Path, sampling: Sampling) -> dict[str, dict[str, float]]:
    """The measures of models that know neither set: 4 s after 3 s of 16 clips of each kind."""
    n_prompt = round(3.0 * SAMPLE_RATE_HZ)
    n_whole = n_prompt + round(CONTINUE_S * SAMPLE_RATE_HZ) // HOP_SAMPLES * HOP_SAMPLES
    found = {}
    for kind, packages in COMPARED.items():
        clips: list[Wave] = []
        reference: list[Wave] = []
        for package in packages:
            rows = [row for row in rows_of(table, package) if float(row["seconds"]) > 3
                    and (package != SPEECH or SPOKEN.search(row["path"]))]  # fmt: skip
            pieces = clips_of(table, rows, 400)
            long = [c[:n_whole] for c in pieces if len(c) >= n_whole]
            chosen = long[:: max(len(long) * len(packages) // N_CLIPS, 1)]
            clips += chosen[: N_CLIPS // len(packages)]
            reference += [c for c in pieces if not any(np.shares_memory(c, d) for d in clips)]
        distance = TaggerDistance(reference) if is_installed() else None
        for name in models:
            generator = wgpt.load(name)
            judges = Judge(clips, reference, generator.frontend)
            prompts = [clip[:n_prompt] for clip in clips]
            copies = [round_trip(generator, clip) for clip in clips]
            for title, waves_of in (
                (f"{kind}, real recordings", [clip[n_prompt:] for clip in clips]),
                (f"{kind}, codec of {name}", [copy[n_prompt:] for copy in copies]),
                (f"{kind}, {name}", continued(generator, prompts, sampling)),
            ):
                alike = waves_of if kind == "speech" and "real" not in title else None
                found[title] = judges.row(prompts, waves_of, alike)
                spectra = [np.abs(judges.mel(a).mean(0) - judges.mel(b[n_prompt:]).mean(0)).mean()
                           for a, b in zip(waves_of, clips, strict=True)]  # fmt: skip
                found[title]["spectrum_db"] = float(DB_PER_NEPER * np.mean(spectra))
                if kind == "speech":
                    found[title] |= sureness(waves_of, judges.listeners)
                if distance is not None:
                    found[title]["tagger_fad"] = distance(waves_of)
    return found


def english_clips(table: Path, folder: Path, n_samples: int) -> list[Wave]:
    """16 clips that overlap, of ktuberling's English words one after the other."""
    with open(table, newline="") as file:
        rows = sorted(row["path"] for row in csv.DictReader(file) if row["group"] == ENGLISH)
    waves = [audio.read(table.parent / path, SAMPLE_RATE_HZ) for path in rows]
    folder.mkdir(parents=True, exist_ok=True)
    audio.write(folder / "english.wav", np.concatenate(waves))
    joined = np.concatenate(treated(folder / "english.wav"))
    starts = [(len(joined) - n_samples) * i // (N_CLIPS - 1) for i in range(N_CLIPS)]
    return [joined[start : start + n_samples] for start in starts]


def recognised(
    models: list[str], table: Path, folder: Path, sampling: Sampling
) -> dict[str, dict[str, float]]:
    """What pocketsphinx makes of 4 s after 3 s of English words."""
    n_prompt = round(3.0 * SAMPLE_RATE_HZ)
    n_rest = round(CONTINUE_S * SAMPLE_RATE_HZ) // HOP_SAMPLES * HOP_SAMPLES
    clips, listeners = english_clips(table, folder, n_prompt + n_rest), Listeners()
    sounds = {"English, real recordings": [clip[n_prompt:] for clip in clips]}
    for name in models:
        generator = wgpt.load(name)
        copies = [round_trip(generator, clip) for clip in clips]
        sounds[f"English, codec of {name}"] = [copy[n_prompt:] for copy in copies]
        prompts = [clip[:n_prompt] for clip in clips]
        sounds[f"English, {name}"] = continued(generator, prompts, sampling)
    return {title: sureness(waves, listeners) for title, waves in sounds.items()}


def markdown(results: dict[str, Any]) -> str:
    """Two tables: what the commands gave, and what is heard."""
    lines = ["| case | minutes | prepare, train, eval, generate, s | steps, best | bigram, nats "
             "| model | behind the bigram by |",
             "|---|---:|---|---|---:|---:|---:|"]  # fmt: skip
    for case, found in results.items():
        if "nll_nats" not in found:
            continue
        nll = found["nll_nats"]
        model = next(value for name, value in nll.items() if "teacher-forced" in name)
        times = ", ".join(f"{s:.0f}" for s in found["seconds"].values())
        lines.append(
            f"| {case} | {found['minutes']['train']} | {times} | {found['steps']}, "
            f"{found['best_step']} | {nll['bigram']:.2f} | {model:.2f} | "
            f"{nll['bigram'] - model:.2f} |"
        )
    lines += ["", "| case | sound | silent | periodicity | speaker | Frechet, dB | spectrum, dB "
              "| FAD of a tagger | confidence | words/s |",
              "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for case, found in results.items():
        for name, row in found["heard"].items():
            cells = (f"{row[key]:{form}}" if key in row else "" for key, form in (
                ("silent", ".0%"), ("periodicity", ".2f"), ("speaker", ".3f"),
                ("frechet_db", ".2f"), ("spectrum_db", ".2f"), ("tagger_fad", ".2f"),
                ("confidence", ".2f"), ("words_per_s", ".1f")))  # fmt: skip
            lines.append(f"| {case} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def own_recordings(
    case: str, table: Path, folder: Path, threads: int, sampling: Sampling
) -> dict[str, Any]:
    """Lays out a case's recordings, runs the commands, and judges what the run says."""
    package = SETS.get(case, SPEECH)
    rows = rows_of(table, package)
    groups = held_out_groups(rows, HELD_OUT_GROUPS[package])
    judged = [row for row in rows if row["group"] in groups]
    if package == SPEECH:
        speaks = ACTOR if case == "actor" else SPOKEN
        judged = [row for row in judged if speaks.search(row["path"])]
    waves = clips_of(table, judged, N_CLIPS + N_REFERENCE)
    clips = waves[:: len(waves) // N_CLIPS][:N_CLIPS]
    reference = [wave for wave in waves if not any(wave is clip for clip in clips)]
    folder.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows if row["group"] not in groups]
    lay_out(case, table, kept, folder / "recordings")
    found = run_case(folder, clips[0], threads)
    found["heard"], shown = judge(
        wgpt.load(folder / "run"), clips, reference, sampling, package == SPEECH
    )
    if case == "actor":
        found["heard"] |= {f"starter, {name}": row for name, row in judge(
            wgpt.load("starter"), clips, reference, sampling, True)[0].items()
            if name.startswith("after")}  # fmt: skip
    for i, (title, wave) in enumerate(shown):
        audio.write(folder / f"{i} {title}.wav", wave)
    draw_spectrograms(folder / "heard.png", shown, SAMPLE_RATE_HZ)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the cases, print the tables to stderr and JSON to stdout; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of recordings.py")
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--models", nargs="+", default=["starter"], help="of the case `starter`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--fine-temperature", type=float, default=FINE_TEMPERATURE)
    parser.add_argument("--out", type=Path, help="file of results to write or to add to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sampling = Sampling(args.temperature, fine_temperature=args.fine_temperature, end_of_clip=False)
    table = args.recordings / "recordings.csv"
    results: dict[str, Any] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    for case in args.cases:
        if case == "starter":
            found = {"heard": compare(args.models, table, sampling)}
            found["heard"] |= recognised(args.models, table, args.work / case, sampling)
        else:
            found = own_recordings(case, table, args.work / case, args.threads, sampling)
        results[case] = found
        if args.out:
            write_atomically(args.out, json.dumps(results, indent=1) + "\n")
        print(markdown({case: found}), file=sys.stderr)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
