"""Do all codebooks sound better than the first alone? Continuations of what no model ever heard.

Prompts of 3 s: speech of the voices that nothing is trained on (synth.HELD_OUT_VOICES) and music
rendered anew, --prompts of each, one seed a prompt. A continuation of 5 s is compared with real
sound by wgpt/frechet.py: two distances of log-mel statistics to 24 other recordings of the kind,
and periodicity. A model with all codebooks is also heard through its own codebook 0 alone. The
codec's round trip of the true rest is the ceiling.

    wgpt demo --out demo
    python benchmarks/codebooks.py --runs demo/study/runs/hybrid-0 demo/full starter \
        --out benchmarks/results/codebooks.json --doc docs/closed-loop.md --pictures PICTURES

--sampling lists TEMPERATURE/FINE_TEMPERATURE; coarse-only runs take the first. A run and setting
take about two minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from wgpt.codec.training import synth
from wgpt.config import SAMPLE_RATE_HZ
from wgpt.evaluation.frechet import distances
from wgpt.generation import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.runs import plots

PROMPT_S, CONTINUATION_S = 3.0, 5.0
N_REFERENCE = 24
MUSIC_SEED, REFERENCE_SEED, SPEECH_SEED = 50_000, 60_000, 70_000  # apart from every training's
COLUMNS = {"frechet_db": "Frechet, dB", "spectrum_db": "spectrum, dB", "periodicity": "periodicity"}


def sounds(group: str, n: int, seed: int) -> list[np.ndarray]:
    """n sounds of a prompt's and a continuation's length, float32 (L,)."""
    seconds = PROMPT_S + CONTINUATION_S
    if group == "music":
        return [synth.render_music(seconds, seed=seed + i) for i in range(n)]
    n_samples, waves = round(seconds * SAMPLE_RATE_HZ), []
    for i in range(n):
        rng, parts = np.random.default_rng([seed, i]), []
        voice = synth.HELD_OUT_VOICES[i % len(synth.HELD_OUT_VOICES)]
        while sum(map(len, parts)) < n_samples:
            parts.append(synth.speech_clip(rng, voice, 12.0)[0])
        waves.append(np.concatenate(parts)[:n_samples])
    return waves


def measure(
    run: str, generator: AudioGenerator, group: str, how: str, n: int
) -> list[dict[str, Any]]:
    """Rows of one run, one kind of sound and one setting; the first are those of no model."""
    temperature, fine_temperature = map(float, how.split("/"))
    seed = MUSIC_SEED if group == "music" else SPEECH_SEED
    others = sounds(group, N_REFERENCE, REFERENCE_SEED)
    reference = [generator.frontend(torch.from_numpy(wave)).numpy() for wave in others]
    sampling = Sampling(temperature, top_k=100, fine_temperature=fine_temperature)
    found = distances(sounds(group, n, seed), PROMPT_S, {run: generator}, reference, sampling)
    return [
        {
            "run": run,
            "sampling": how,
            "group": group,
            "sound": sound,
            "prompts": n,
            **values,
        }
        for sound, values in found.items()
    ]


def as_markdown(rows: list[dict[str, Any]], codec: str, machine: dict[str, Any]) -> str:
    """One line a sound, both kinds side by side."""
    groups = sorted({row["group"] for row in rows}, reverse=True)
    lines = [
        f"{rows[0]['prompts']} prompts of 3 s of each kind, 5 s of continuation, top k 100; codec "
        f"`{codec}`; {machine['cpu']}, torch {machine['torch']}.",
        "",
        "| sound | temperature / fine | "
        + " | ".join(f"{g}: {title}" for g in groups for title in COLUMNS.values())
        + " |",
        "|---|---|" + "---:|" * (len(groups) * len(COLUMNS)),
    ]
    shown: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        of_model = row["sound"].startswith(row["run"])
        key = (row["sound"], row["sampling"] if of_model else "")
        shown.setdefault(key, {})[row["group"]] = row
    for (sound, how), by_group in shown.items():
        cells = [f"{by_group[g][name]:.2f}" for g in groups for name in COLUMNS]
        title = f"`{sound}`" if how else f"*{sound}*"
        lines.append(f"| {title} | {how.replace('/', ' / ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(generators: dict[str, AudioGenerator], how: str, folder: Path, n: int) -> None:
    """Spectrograms of the first n prompts of each kind, FOLDER/music-0.png and so on."""
    temperature, fine_temperature = map(float, how.split("/"))
    sampling = Sampling(temperature, top_k=100, fine_temperature=fine_temperature)
    n_prompt = round(PROMPT_S * SAMPLE_RATE_HZ)
    for group, seed in (("music", MUSIC_SEED), ("speech", SPEECH_SEED)):
        for i, wave in enumerate(sounds(group, n, seed)):
            first = next(iter(generators.values()))
            codes = first.codec.encode(torch.from_numpy(wave))
            shown = [("real sound", wave)]
            shown += [("codec, all codebooks", first.codec.decode(codes).numpy())]
            for run, generator in generators.items():
                new = generator.generate(wave[:n_prompt], CONTINUATION_S, sampling, seed=i)
                shown.append((f"{run}, from 3 s on", np.concatenate([wave[:n_prompt], new])))
            mels = [(title, first.frontend(torch.from_numpy(w)).numpy()) for title, w in shown]
            plots.spectrograms(mels, folder / f"{group}-{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN")
    parser.add_argument("--sampling", nargs="+", default=["1/0.5"], metavar="T/FINE")
    parser.add_argument("--prompts", type=int, default=18, help="of each kind")
    parser.add_argument("--doc", type=Path, help="write the table between this file's markers")
    parser.add_argument("--pictures", type=Path, help="folder for spectrograms of two of each kind")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.prompts = 3
    torch.set_num_threads(args.threads or 1)
    results = harness.Results(args.out, harness.machine_facts("cpu"), ("run", "sampling", "group"))
    if args.resume:
        results.resume()
    generators = {Path(run).name: AudioGenerator.load(run) for run in args.runs}
    began = time.monotonic()
    for run, generator in generators.items():
        for how in args.sampling if generator.n_codebooks > 1 else args.sampling[:1]:
            for group in ("speech", "music"):
                if results.has(run=run, sampling=how, group=group):
                    continue
                if time.monotonic() - began > args.time_limit:
                    continue
                harness.say(f"-- {run}, {how}, {group}")
                for row in measure(run, generator, group, how, args.prompts):
                    results.add(row)
    codec = next(iter(generators.values())).codec.identity
    name = f"{codec['name']} {codec['sha256'][:12]}"
    table = as_markdown(results.rows, name, results.facts)
    if args.doc:
        harness.write_into(args.doc, Path(__file__).name, table)
    if args.pictures:
        draw(generators, args.sampling[0], args.pictures, 2)
    if not args.json:
        print(table)
    results.print_json()


if __name__ == "__main__":
    main()
