"""Figures of a trained model: NLL, accuracy, perplexity; baselines; the codec's ceiling."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from wgpt.config import STEP_RATE_HZ
from wgpt.data.loader import windows
from wgpt.data.shards import Split
from wgpt.mel import MelFrontend
from wgpt.model import HybridModel
from wgpt.runs import Run

DB_PER_NEPER = 10 / math.log(10)  # mel values are logarithms of power


@dataclass(frozen=True, eq=False)
class Score:
    """Sums over the scored tokens of each clip.

    nll: float64 (n_clips,), nats; correct, n_tokens: int64 (n_clips,); groups names each clip's.
    """

    name: str
    nll: np.ndarray
    correct: np.ndarray
    n_tokens: np.ndarray
    groups: list[str]

    def row(self, group: str | None = None) -> dict[str, Any]:
        """Figures over one group of clips, or all: nats, share, perplexity, bits per second."""
        of = np.array([group is None or g == group for g in self.groups], dtype=bool)
        n_tokens = int(self.n_tokens[of].sum())
        nll = float(self.nll[of].sum()) / max(n_tokens, 1)
        return {
            "model": self.name,
            "group": group or "all",
            "nll_nats": nll,
            "accuracy": float(self.correct[of].sum()) / max(n_tokens, 1),
            "perplexity": math.exp(nll),
            "bits_per_s": nll / math.log(2) * STEP_RATE_HZ,
            "n_tokens": n_tokens,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row over all clips and, where there are several groups, one for each."""
        names = sorted(set(self.groups))
        return [self.row()] + ([self.row(name) for name in names] if len(names) > 1 else [])


def score(name: str, model: HybridModel, split: Split, **options: Any) -> Score:
    """Teacher-forced score of the coarse codebook; options as in `codebook_scores`."""
    return codebook_scores(name, model, split, **options, with_fine=False)[0]


@torch.inference_mode()
def codebook_scores(
    name: str,
    model: HybridModel,
    split: Split,
    *,
    context_steps: int,
    mel_source: str | None = "wave",
    batch_size: int = 8,
    clips: list[int] | None = None,
    dtype: str = "fp32",
    with_fine: bool = True,
) -> list[Score]:
    """Teacher-forced scores over every token of the clips, by the window rule of data.loader.

    One for codebook 0, then, `with_fine`, one for each of the model's finer codebooks.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    fine = model.fine if with_fine else None
    sums = np.zeros((1 + (model.config.n_fine if fine else 0), 3, split.n_clips))
    source = mel_source if model.config.mel_dim else None
    options: dict[str, Any] = {"batch_size": batch_size, "clips": clips, "n_fine": len(sums) - 1}
    options["codebooks"] = model.n_codebooks_read
    for batch in windows(split, context_steps, source, **options):
        on_device = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            hidden = model.hidden(on_device.tokens, on_device.frames)
            logits = model.head(hidden)
        scored = on_device.targets >= 0
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            on_device.targets.flatten(),
            ignore_index=-1,
            reduction="none",
        )
        losses = losses.view_as(scored).double().sum(1)
        correct = ((logits.argmax(-1) == on_device.targets) & scored).sum(1)
        per_row = torch.stack([losses, correct.double(), scored.sum(1).double()]).cpu().numpy()
        for row, clip in enumerate(batch.clips.tolist()):
            sums[0, :, clip] += per_row[:, row]
            if fine is None:
                continue
            assert on_device.codes is not None
            codes = on_device.codes[row : row + 1]  # row by row: logits of T * n_fine * V
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                nll, hit = fine.nll(hidden[row : row + 1], codes)
            known = fine.known_targets(codes)
            facts = torch.stack([nll.double(), hit.double(), known.double()], 1).sum((0, 3))
            sums[1:, :, clip] += facts.T.cpu().numpy()
    model.train(was_training)
    names = [name, *(f"{name}, codebook {k}" for k in range(1, len(sums)))]
    return [_to_score(n, s, split, clips) for n, s in zip(names, sums, strict=True)]


def _to_score(name: str, sums: np.ndarray, split: Split, clips: list[int] | None = None) -> Score:
    chosen = list(range(split.n_clips)) if clips is None else clips
    return Score(
        name,
        sums[0, chosen],
        sums[1, chosen].astype(np.int64),
        sums[2, chosen].astype(np.int64),
        [split.groups[i] for i in chosen],
    )


# -- baselines ------------------------------------------------------------------------------------


def baselines(train: Split, split: Split) -> list[Score]:
    """Uniform, unigram and bigram models of codebook 0, fitted on `train`, scored on `split`.

    Unigram: add-one counts. Bigram: Witten-Bell interpolation with it, n(h) / (n(h) + d(h)) of the
    weight on the counts after h, d(h) the number of different followers (Witten and Bell, 1991);
    the history of a clip's first token is the begin-of-clip token. Nothing is tuned on `split`.
    """
    size = train.codebook_size
    counts = np.zeros((size + 1, size))
    for previous, token in _pairs(train):
        np.add.at(counts, (previous, token), 1.0)
    unigram = (counts.sum(0) + 1) / (counts.sum() + size)
    n_after = counts.sum(1, keepdims=True)
    n_kinds = (counts > 0).sum(1, keepdims=True)
    bigram = np.where(
        n_after > 0, (counts + n_kinds * unigram) / np.maximum(n_after + n_kinds, 1), unigram
    )
    tables = {
        "uniform": np.full_like(bigram, 1 / size),
        "unigram": np.broadcast_to(unigram, bigram.shape),
        "bigram": bigram,
    }
    scores = []
    for name, table in tables.items():
        sums = np.zeros((3, split.n_clips))
        best = table.argmax(1)
        for clip, (previous, token) in enumerate(_pairs(split)):
            sums[0, clip] = -np.log(table[previous, token]).sum()
            sums[1, clip] = (best[previous] == token).sum()
            sums[2, clip] = len(token)
        scores.append(_to_score(name, sums, split))
    return scores


def _pairs(split: Split) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(history, token) of each clip, int64 (T,) both."""
    for clip in range(split.n_clips):
        token = split.clip(clip)[0][0].numpy()
        yield np.concatenate([[split.codebook_size], token[:-1]]), token


def paired_difference(
    a: Score, b: Score, group: str | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """NLL of a minus b in nats per token with a 95 % bootstrap interval over clips (2000 draws)."""
    of = np.array([group is None or g == group for g in a.groups], dtype=bool)
    gap, n_tokens = (a.nll - b.nll)[of], a.n_tokens[of]
    draws = np.random.default_rng(seed).integers(0, len(gap), (2000, len(gap)))
    means = gap[draws].sum(1) / n_tokens[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gap.sum() / n_tokens.sum()), float(low), float(high)


# -- the codec ------------------------------------------------------------------------------------


def with_decoded_mel(split: Split, codec: Any, frontend: MelFrontend, n_codebooks: int) -> Split:
    """The split with mel source `decoded-k`: slices of the audio decoded from k codebooks."""
    source = f"decoded-{n_codebooks}"
    if source in split.mel:
        return split
    parts = []
    for clip in range(split.n_clips):
        wave = codec.decode(split.clip(clip)[0][:n_codebooks])
        parts.append(frontend(wave).cpu().numpy().astype(np.float16))
    return replace(split, mel={**split.mel, source: np.concatenate(parts)})


def codec_ceiling(split: Split, codec: Any, frontend: MelFrontend) -> list[dict[str, Any]]:
    """Mean |log-mel error| in dB of audio decoded from 1 and from all codebooks: what no model of
    the tokens can go below. Compared with the stored mel of the true audio."""
    rows = []
    for k in (1, codec.n_codebooks):
        decoded = with_decoded_mel(split, codec, frontend, k)
        error = np.abs(
            decoded.mel[f"decoded-{k}"].astype(np.float32) - split.mel["wave"].astype(np.float32)
        )
        rows.append({"codebooks": k, "log_mel_error_db": float(error.mean()) * DB_PER_NEPER})
    return rows


# -- the table and the command --------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of Score.row() as a markdown table."""
    lines = [
        "| model | group | NLL (nats) | accuracy | perplexity | bits/s | tokens |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['group']} | {row['nll_nats']:.3f} "
            f"| {100 * row['accuracy']:.2f} % | {row['perplexity']:.2f} "
            f"| {row['bits_per_s']:.0f} | {row['n_tokens']} |"
        )
    return "\n".join(lines)


def codebook_table(rows: list[dict[str, Any]]) -> str:
    """Rows of Score.row() with a `codebook` as a markdown table."""
    lines = [
        "| codebook | group | NLL (nats) | accuracy | perplexity |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['codebook']} | {row['group']} | {row['nll_nats']:.3f} "
            f"| {100 * row['accuracy']:.2f} % | {row['perplexity']:.2f} |"
        )
    return "\n".join(lines)


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    split_name: str = "valid",
    device: str = "cpu",
    rollout_s: int = 0,
    rollout_clips: int = 8,
) -> dict[str, Any]:
    """All figures of a trained run.

    Returns {rows, codebooks, codec, rollout, context_steps, mel_source, data, split}: `codebooks`
    are teacher-forced rows of every codebook that the model predicts, none of a coarse one;
    `rollout` is rollout.drift over rollout_s seconds, None for 0.

    The closed loop reads mel of audio decoded from the true codes: from codebook 0, from as many
    as the model predicts, and from those that `decoded-k` sources of the data were prepared for.

    Raises ConfigError, DataError or CodecError naming the file at fault.
    """
    trained = Run.open(run)
    dataset = trained.dataset(data)
    dataset.verify()
    model = HybridModel.from_pretrained(trained.model_folder, device)
    split = dataset.split(split_name)
    source = trained.config.mel_source
    codec = trained.codec(device)
    frontend = MelFrontend(dataset.mel_config)
    options: dict[str, Any] = {"context_steps": trained.config.context_steps}
    scores = baselines(dataset.split("train"), split)
    name = trained.preset
    forced = f"{name} (teacher-forced)" if model.config.mel_dim else name
    by_codebook = codebook_scores(forced, model, split, mel_source=source, **options)
    scores.append(by_codebook[0])
    if model.config.mel_dim:
        prepared = {int(s.removeprefix("decoded-")) for s in split.mel if s.startswith("decoded-")}
        for k in sorted({1, 1 + model.config.n_fine} | prepared):
            split = with_decoded_mel(split, codec, frontend, k)
            title = f"{name} (closed loop{f', {k} codebooks' if k > 1 else ''})"
            scores.append(score(title, model, split, mel_source=f"decoded-{k}", **options))
    rollout = None
    if rollout_s:
        from wgpt import rollout as rollouts
        from wgpt.speaker import Speaker

        speaker = Speaker.open(trained.model_folder, device)
        rollout = rollouts.drift(speaker, split, rollout_s, rollout_clips)
    return {
        "run": str(run),
        "data": str(dataset.path),
        "split": split_name,
        "mel_source": source if model.config.mel_dim else None,
        **options,
        "rows": [row for one in scores for row in one.rows()],
        "codebooks": [
            {"codebook": k, **row}
            for k, one in enumerate(by_codebook)
            for row in one.rows()
            if model.fine is not None
        ],
        "rollout": rollout,
        "codec": codec_ceiling(split, codec, frontend) if "wave" in split.mel else [],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt eval`."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument("--data", help="prepared data folder (default: the one it was trained on)")
    parser.add_argument("--split", default="valid", choices=("valid", "train"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--rollout-s",
        type=int,
        default=0,
        metavar="S",
        help="also let the model go on for S seconds, and say how far its sound drifts (default 0)",
    )
    parser.add_argument("--rollout-clips", type=int, default=8, help="rollouts (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt eval`: prints the table, or JSON."""
    result = evaluate(
        args.run, args.data, args.split, args.device, args.rollout_s, args.rollout_clips
    )
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    sys.stdout.write(table(result["rows"]) + "\n")
    if result["codebooks"]:
        sys.stdout.write("\n" + codebook_table(result["codebooks"]) + "\n\n")
    if result["rollout"]:
        from wgpt import rollout

        sys.stdout.write("\n" + rollout.table(result["rollout"]) + "\n\n")
    for row in result["codec"]:
        sys.stdout.write(
            f"codec ceiling, {row['codebooks']} codebook(s): log-mel error "
            f"{row['log_mel_error_db']:.2f} dB\n"
        )
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
