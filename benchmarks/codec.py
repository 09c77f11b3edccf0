"""What does mini keep of people and instruments it never heard, beside Opus and the old mini?

    python benchmarks/recordings.py --out RECORDINGS
    python benchmarks/codec.py --recordings RECORDINGS --out benchmarks/results/codec-mini.json \
        [--pictures DIR] [--codecs mini mini-v1 FOLDER] [--clips 40]

Forty clips of at most 8 s of each held-out set of recordings.py, and of the espeak-ng voices that
no training hears, chosen by their hashes: the same ones on every machine. SI-SDR and STOI of 1 and
of 8 codebooks (0.75 and 6 kbit/s), of latents that no codebook rounds (what encoder and decoder
alone lose), and of Opus at 6 and 12 kbit/s (opusenc and opusdec of opus-tools). Where the packages
are installed: PESQ (pesq), the cosine of the speaker embeddings of original and copy (resemblyzer),
and the share of the words heard in the original that pocketsphinx also hears in the copy, for the
English clips. What is missing is left out and named.

The training's loss holds an envelope correlation like STOI's; PESQ, embedding and recogniser had
no part in it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from spectrograms import draw_spectrograms

from wgpt import audio, codec
from wgpt.codec import weights as codec_weights
from wgpt.codec.layers import Network
from wgpt.codec.training import synth
from wgpt.codec.training.score import pesq, si_sdr_db, stoi
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ
from wgpt.evaluation.listeners import PACKAGES, Listeners
from wgpt.files import write_atomically

MAX_CLIP_S, MIN_CLIP_S = 8.0, 1.0
SETS = {
    "fillets-nl": "fillets-ng-data-nl",
    "ktuberling": "ktuberling-data",
    "wesnoth": "wesnoth-1.16-music",
    "sonic-pi": "sonic-pi-samples",
}
ENGLISH = "ktuberling English"  # judged by the words that are recognised
SPEECH = ("fillets-nl", "ktuberling", "espeak")
OPUS_KBITS = (6, 12)

Wave = np.ndarray  # float32 (L,), 24 kHz
Copies = dict[str, Callable[[Wave], Wave]]  # what is compared, by name: a wave to its copy


@dataclass
class Clip:
    """A piece of a held-out recording."""

    set: str
    name: str
    wave: Wave = field(repr=False)


def held_out_clips(table: Path, name: str, n: int) -> list[Clip]:
    """n clips of a set, by the files' hashes; long files give several, evenly spaced."""
    with open(table, newline="") as file:
        rows = [
            row for row in csv.DictReader(file)
            if row["package"] == SETS[name] and row["split"] == "held-out"
            and float(row["seconds"]) >= MIN_CLIP_S
        ]  # fmt: skip
    rows.sort(key=lambda row: row["sha256"])
    n_rounds = max(1, min(math.ceil(n / len(rows)), 8))
    clips: list[Clip] = []
    for i in range(min(n, n_rounds * len(rows))):
        row, turn = rows[i % len(rows)], i // len(rows)
        wave = audio.read(table.parent / row["path"], SAMPLE_RATE_HZ)
        n_samples = min(len(wave), round(MAX_CLIP_S * SAMPLE_RATE_HZ)) // HOP_SAMPLES * HOP_SAMPLES
        start = 0
        if turn or n_rounds > 1:
            start = (len(wave) - n_samples) * (2 * turn + 1) // (2 * n_rounds)
        piece = wave[start : start + n_samples]
        if turn and n_samples < round(MAX_CLIP_S * SAMPLE_RATE_HZ) // HOP_SAMPLES * HOP_SAMPLES:
            continue  # a short file gives itself once
        if float(np.square(piece).mean()) > 1e-7:
            clips.append(Clip(name, f"{row['path']}@{start}", np.ascontiguousarray(piece)))
    return clips


def english_clips(table: Path) -> list[Clip]:
    """Every English recording of ktuberling: single words."""
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "ktuberling-data/en"]
    waves = (audio.read(table.parent / row["path"], SAMPLE_RATE_HZ) for row in rows)
    return [
        Clip(
            ENGLISH,
            row["path"],
            np.ascontiguousarray(wave[: len(wave) // HOP_SAMPLES * HOP_SAMPLES]),
        )
        for row, wave in zip(rows, waves, strict=True)
    ]


def espeak_clips(n: int) -> list[Clip]:
    """n clips of the synthetic voices that no training hears."""
    clips = []
    for i in range(n):
        voice = synth.HELD_OUT_VOICES[i % len(synth.HELD_OUT_VOICES)]
        wave, _ = synth.speech_clip(np.random.default_rng([5, i]), voice, MAX_CLIP_S)
        n_samples = min(len(wave), round(MAX_CLIP_S * SAMPLE_RATE_HZ)) // HOP_SAMPLES * HOP_SAMPLES
        clips.append(Clip("espeak", f"{voice.name} {i}", wave[:n_samples]))
    return clips


# ------------------------------------------------------------------ contestants


def opus_copy(wave: Wave, kbits: int) -> Wave:
    """The wave after opusenc and opusdec at a bit rate."""
    with tempfile.TemporaryDirectory() as folder:
        original, coded, copy = (str(Path(folder) / n) for n in ("a.wav", "a.opus", "b.wav"))
        soundfile.write(original, wave, SAMPLE_RATE_HZ, subtype="FLOAT")
        encode = ["opusenc", "--quiet", "--bitrate", str(kbits), original, coded]
        subprocess.run(encode, check=True)
        decode = ["opusdec", "--quiet", "--rate", str(SAMPLE_RATE_HZ), "--float", coded, copy]
        subprocess.run(decode, check=True)
        decoded, _ = soundfile.read(copy, dtype="float32")
    return np.pad(decoded[: len(wave)], (0, max(0, len(wave) - len(decoded))))


def unquantized(source: str) -> Callable[[Wave], Wave]:
    """The network of a codec alone: its decoder gets the latents as the encoder gives them."""
    weights = codec_weights.read(source)
    network = Network(weights.architecture, weights.tensors)

    @torch.no_grad()
    def copy(wave: Wave) -> Wave:
        x = torch.from_numpy(wave)[None, :, None]
        for layer in (*network.encoder, *network.decoder):
            x, _ = layer.step(x, layer.start(x))
        return x[0, :, 0].numpy()

    return copy


def contestants(codecs: dict[str, codec.Codec]) -> Copies:
    """The codecs with 1 and 8 codebooks and without quantiser, and Opus."""

    def copy(one: codec.Codec, k: int) -> Callable[[Wave], Wave]:
        return lambda wave: one.decode(one.encode(torch.from_numpy(wave))[:k]).numpy()

    found = {f"{name}, {k} codebook{'s' * (k > 1)}": copy(one, k)
             for name, one in codecs.items() for k in (1, 8)}  # fmt: skip
    found |= {f"{name}, not quantised": unquantized(one.source) for name, one in codecs.items()}
    if shutil.which("opusenc") and shutil.which("opusdec"):
        for kbits in OPUS_KBITS:
            found[f"Opus, {kbits} kbit/s"] = lambda wave, kbits=kbits: opus_copy(wave, kbits)
    return found


# ------------------------------------------------------------------ measures


def measure(clips: list[Clip], copy: Callable[[Wave], Wave], listeners: Listeners) -> dict:
    """Means over the clips of a set of what applies to it."""
    values: dict[str, list[float]] = {}
    for clip in clips:
        decoded = copy(clip.wave)
        row: dict[str, float | None] = {"si_sdr_db": si_sdr_db(decoded, clip.wave)}
        if clip.set in SPEECH:
            row["stoi"] = stoi(decoded, clip.wave, SAMPLE_RATE_HZ)
            row["pesq"] = pesq(decoded, clip.wave, SAMPLE_RATE_HZ)
            row["speaker"] = listeners.speaker(decoded, clip.wave)
        if clip.set == ENGLISH:
            row = {"words": listeners.words(decoded, clip.wave)}
        for name, value in row.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    means = {name: round(float(np.mean(found)), 3) for name, found in values.items()}
    if "si_sdr_db" in values:
        means["si_sdr_median_db"] = round(float(np.median(values["si_sdr_db"])), 3)
    return means


def entries_used(one: codec.Codec, table: Path, minutes: float = 20) -> dict[str, Any]:
    """How many entries of each codebook held-out speech and music use."""
    used = [torch.zeros(one.codebook_size, dtype=torch.int64) for _ in range(one.n_codebooks)]
    total_s = 0.0
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "held-out"]
    for row in sorted(rows, key=lambda row: row["sha256"]):
        wave = torch.from_numpy(audio.read(table.parent / row["path"], SAMPLE_RATE_HZ))
        for k, tokens in enumerate(one.encode(wave[: 30 * SAMPLE_RATE_HZ])):
            used[k] += tokens.bincount(minlength=one.codebook_size)
        total_s += min(len(wave) / SAMPLE_RATE_HZ, 30)
        if total_s > minutes * 60:
            break
    share = torch.stack(used).double()
    share = share / share.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1)
    return {
        "minutes": round(total_s / 60, 1),
        "used": [int((counts > 0).sum()) for counts in used],
        "perplexity": [round(float(e)) for e in entropy.exp()],
    }


def decode_ms(one: codec.Codec) -> float:
    """Median CPU time of one frame of a stream of tokens, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    codes = torch.randint(0, one.codebook_size, (one.n_codebooks, 300))
    decoder, times = one.stream_decoder(), []
    for frame in codes.split(1, 1):
        start = time.thread_time()
        decoder.push(frame)
        times.append(time.thread_time() - start)
    torch.set_num_threads(before)
    return round(1e3 * float(np.median(times[20:])), 3)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the card."""
    heads = {
        "stoi": "STOI",
        "si_sdr_db": "SI-SDR, dB",
        "si_sdr_median_db": "median",
        "pesq": "PESQ",
        "speaker": "speaker",
        "words": "words",
    }
    lines = [
        f"| held-out set | | {' | '.join(heads.values())} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for row in rows:
        cells = [f"{row[name]:.2f}" if name in row and "db" in name
                 else f"{row[name]:.3f}" if name in row else "" for name in heads]  # fmt: skip
        lines.append(f"| {row['set']} ({row['n']}) | {row['codec']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(folder: Path, clips: dict[str, list[Clip]], compared: Copies) -> None:
    """Spectrograms of a voice, of instruments, and of a crowd of both: the loudest clips."""
    folder.mkdir(parents=True, exist_ok=True)
    n = 4 * SAMPLE_RATE_HZ
    voice, tune = (
        max((clip.wave[:n] for clip in clips[name]), key=lambda wave: float(np.square(wave).sum()))
        for name in ("fillets-nl", "wesnoth")
    )
    n = min(len(voice), len(tune))
    voice, tune = voice[:n], tune[:n]
    left_out = ("mini-v1", "12", "not quantised")
    names = [name for name in compared if not any(word in name for word in left_out)]
    for title, wave in (("voice", voice), ("instruments", tune), ("crowd", (voice + tune) / 2)):
        panels = [(f"{title}: original", wave)]
        panels += [(name, compared[name](wave)) for name in names]
        draw_spectrograms(folder / f"{title}.png", panels, SAMPLE_RATE_HZ)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table to stderr and the JSON to stdout; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of recordings.py")
    parser.add_argument("--codecs", nargs="+", default=["mini", "mini-v1"])
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--out", type=Path, help="file of results to write")
    parser.add_argument("--pictures", type=Path, help="folder for spectrograms")
    args = parser.parse_args(argv)
    table = args.recordings / "recordings.csv"
    codecs = {Path(name).name: codec.load(name) for name in args.codecs}
    listeners, compared = Listeners(), contestants(codecs)
    clips = {name: held_out_clips(table, name, args.clips) for name in SETS}
    if shutil.which("espeak-ng"):
        clips["espeak"] = espeak_clips(args.clips)
    if "confidence" not in listeners.missing:
        clips[ENGLISH] = english_clips(table)
    packages = ("pystoi", "pesq", *(package for package, _ in PACKAGES.values()))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    rows = []
    for set_name, found in clips.items():
        for name, copy in compared.items():
            row = {"set": set_name, "n": len(found), "codec": name}
            rows.append(row | measure(found, copy, listeners))
            print(json.dumps(rows[-1]), file=sys.stderr)
    result = {
        "codecs": {
            name: {
                "sha256": one.identity["sha256"],
                "decode_ms_per_frame": decode_ms(one),
                "held_out_entries": entries_used(one, table),
            }
            for name, one in codecs.items()
        },
        "rows": rows,
        "missing": missing + ["opus-tools"] * ("Opus, 6 kbit/s" not in compared),
    }
    print(markdown(rows), file=sys.stderr)
    if args.pictures:
        draw(args.pictures, clips, compared)
    if args.out:
        write_atomically(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
