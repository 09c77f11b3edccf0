"""Which training keeps a model that reads its own output closest to real sound? Arms and one table.

While sampling, the mel slices come from decoded tokens, not from a recording. Each arm is a small
model trained on the demo's audio with the same seed, steps and batches; only the mel it reads while
training differs. Each is scored on the validation split: NLL on the mel it was trained on (teacher-
forced), NLL on mel of decoded true tokens (closed loop), and the drift of its own rollouts from
real sound (wgpt/evaluation/drift.py), whose floor is what as much real sound shows.

    python benchmarks/closed_loop.py --work WORK --out benchmarks/results/closed-loop.json \
        --doc docs/closed-loop.md

WORK keeps the data and the runs; with --resume, arms that --out already holds are not done again.
Two cores need about two minutes an arm.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: on a shared machine idle threads that spin slow the others down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import harness
import torch

from wgpt.config import HOP_SAMPLES
from wgpt.data.dataset import Dataset
from wgpt.data.pipeline import prepare
from wgpt.evaluation import evaluate
from wgpt.experiments.demo import SETTINGS, gather_audio
from wgpt.training import train

SOURCES = ("wave", "decoded-1", "decoded-8")
ROUGH: dict[str, Any] = {"mel_drop": 0.3, "mel_drop_span_steps": 8}
# arm: (preset, fields of the model, settings of the training)
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tokens only": ("gpt-xs", {}, {}),
    "wave": ("hybrid-xs", {}, {}),
    "wave, noise 0.3": ("hybrid-xs", {}, {"mel_noise": 0.3}),
    "wave, noise 1": ("hybrid-xs", {}, {"mel_noise": 1.0}),
    "wave, drop 0.3": ("hybrid-xs", {}, ROUGH),
    "decoded-1": ("hybrid-xs", {}, {"mel_source": "decoded-1"}),
    "decoded-1, drop 0.3": ("hybrid-xs", {}, {"mel_source": "decoded-1", **ROUGH}),
    "decoded-8": ("hybrid-xs", {}, {"mel_source": "decoded-8"}),
    "wave, all codebooks": ("hybrid-xs", {"n_fine": 7}, {}),
    "decoded-8, all codebooks": ("hybrid-xs", {"n_fine": 7}, {"mel_source": "decoded-8"}),
}


def measure(name: str, data: Path, runs: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains an arm and evaluates it."""
    preset, shape, more = ARMS[name]
    folder = runs / name.replace(",", "").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)  # of a measurement that was cut short
    settings = {**SETTINGS, "max_steps": args.steps, "seed": args.seed, "device": "cpu", **more}
    settings |= {"eval_every": 0, "warmup_steps": min(SETTINGS["warmup_steps"], args.steps // 4)}
    began = time.monotonic()
    summary = train(data, folder, preset, model=shape, **settings)
    trained_s = time.monotonic() - began
    found = evaluate(folder, rollout_s=args.rollout_s, rollout_clips=args.rollout_clips)
    scores: dict[str, dict[str, float]] = {}  # what is read -> group -> NLL
    for row in found["rows"]:
        model = row["model"]
        if not model.startswith(preset):
            continue
        read = "own"
        if "closed loop" in model:
            read = "decoded-8" if "8 codebooks" in model else "decoded-1"
        scores.setdefault(read, {})[row["group"]] = row["nll_nats"]
    finer = [r["nll_nats"] for r in found["codebooks"] if r["codebook"] and r["group"] == "all"]
    return {
        "arm": name,
        "preset": preset,
        "settings": more,
        "steps": args.steps,
        "seed": args.seed,
        "n_fine": shape.get("n_fine", 0),
        "n_parameters": summary["n_parameters"],
        "train_s": round(trained_s, 1),
        "eval_s": round(time.monotonic() - began - trained_s, 1),
        "nll_nats": scores,
        "fine_nll_nats": sum(finer) / len(finer) if finer else None,
        "rollout": found["rollout"],
    }


def loop_nll(row: dict[str, Any], group: str) -> float:
    """NLL on the mel the arm reads while sampling: of as many codebooks as it predicts."""
    scores = row["nll_nats"]
    source = "decoded-8" if row["n_fine"] else "decoded-1"
    return float(scores.get(source, scores["own"])[group])


def drift(row: dict[str, Any], name: str) -> tuple[float, float, float]:
    """First second, mean and last second of a distance."""
    values = [second[name] for second in row["rollout"]["seconds"]]
    return values[0], sum(values) / len(values), values[-1]


def as_markdown(results: dict[str, Any], facts: dict[str, Any]) -> str:
    """Two tables (NLL; drift) and which arm is lowest in what."""
    rows = results["rows"]
    groups = sorted(rows[0]["nll_nats"]["own"], key=lambda g: (g != "speech", g))
    groups = [g for g in groups if g != "all"] or ["all"]
    seconds, n = len(rows[0]["rollout"]["seconds"]), rows[0]["rollout"]["n_rollouts"]
    lines = [
        f"{facts['minutes']:.0f} minutes of audio, {rows[0]['steps']} steps of 8 windows of 3.4 s, "
        f"seed {rows[0]['seed']}; codec `{facts['codec']}`; {results['machine']['cpu']}, "
        f"torch {results['machine']['torch']}.",
        "",
        "NLL of the coarse codebook, nats: *own* reads the mel it was trained on, the others mel "
        "of decoded true tokens. Bold: what the arm reads while sampling.",
        "",
        "| trained on | "
        + " | ".join(f"{g}: own | 1 codebook | 8 codebooks" for g in groups)
        + " | residual, mean |",
        "|---|" + "---:|" * (3 * len(groups) + 1),
    ]
    for row in rows:
        cells = []
        for group in groups:
            for read in ("own", "decoded-1", "decoded-8"):
                value = row["nll_nats"].get(read, {}).get(group)
                own = read == ("decoded-8" if row["n_fine"] else "decoded-1")
                mark = "**" if own else ""
                cells.append("" if value is None else f"{mark}{value:.3f}{mark}")
        fine = row["fine_nll_nats"]
        cells.append("" if fine is None else f"{fine:.3f}")
        lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Drift of {n} rollouts of {seconds} s: distance to real sound in the first second, on "
        "average, and in the last second.",
        "",
        "| trained on | log-mel, dB: first | mean | last | tokens, TV: first | mean | last |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mel, tokens = drift(row, "log_mel_db"), drift(row, "token_tv")
        cells = [*(f"{v:.2f}" for v in mel), *(f"{v:.3f}" for v in tokens)]
        lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    scales = {1 + row["n_fine"]: row["rollout"] for row in rows}
    named = [("real sound", next(iter(scales.values()))["floor"])]
    named += [(f"real sound, {k} codebook(s)", scale["codec"]) for k, scale in scales.items()]
    for title, distance in named:
        lines.append(
            f"| *{title}* | | {distance['log_mel_db']:.2f} | | | {distance['token_tv']:.3f} | |"
        )
    lines.append("")
    hybrids = [row for row in rows if row["preset"] != "gpt-xs"]
    for group in groups if hybrids else []:
        best = min(hybrids, key=lambda row: loop_nll(row, group))
        lines.append(
            f"- Lowest NLL on what is read while sampling, {group}: *{best['arm']}*, "
            f"{loop_nll(best, group):.3f}."
        )
    for name, title, unit in (("log_mel_db", "log-mel", " dB"), ("token_tv", "token", "")):
        best = min(rows, key=lambda row: drift(row, name)[1])
        lines.append(
            f"- Least {title} drift on average: *{best['arm']}*, {drift(best, name)[1]:.3f}{unit}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data and the runs")
    parser.add_argument("--steps", type=int, default=400, help="training steps of an arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollout-s", type=int, default=10, help="seconds of a rollout")
    parser.add_argument("--rollout-clips", type=int, default=16, help="rollouts of an arm")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--doc", type=Path, help="write the tables between this file's markers")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rollout_s, args.rollout_clips = 4, 1, 2
    if args.threads:
        torch.set_num_threads(args.threads)
    data = args.work / "data"
    if not (args.work / "audio").exists():
        gathering = args.work / "audio.partial"
        shutil.rmtree(gathering, ignore_errors=True)
        gather_audio(gathering)
        gathering.rename(args.work / "audio")
    # A fifth for validation: drift compares histograms, which need sound to be smooth.
    prepare(args.work / "audio", data, mel_sources=SOURCES, valid_fraction=0.2,
            jobs=os.cpu_count() or 1)  # fmt: skip
    results = harness.Results(args.out, harness.machine_facts("cpu"), ("arm",))
    if args.resume:
        results.resume()
    began = time.monotonic()
    for name in args.arms:
        if results.has(arm=name) or time.monotonic() - began > args.time_limit:
            continue
        harness.say(f"-- {name}")
        results.add(measure(name, data, args.work / "runs", args))
    dataset = Dataset(data)
    n_steps = sum(total["steps"] for total in dataset.manifest["totals"].values())
    facts = {
        "minutes": n_steps * HOP_SAMPLES / dataset.mel_config.sample_rate_hz / 60,
        "codec": f"{dataset.codec_identity['name']} {dataset.codec_identity['sha256'][:12]}",
    }
    table = as_markdown(results.as_dict(), facts)
    if args.doc:
        harness.write_into(args.doc, Path(__file__).name, table)
    if not args.json:
        print(table)
    results.print_json()


if __name__ == "__main__":
    main()
