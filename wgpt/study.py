"""The paper's comparison with its controls: each arm trained on the same data in the same order.

An arm is a model shape and the mel it reads. What each is for:

    tokens         the token-only twin: what the mel slices are compared with
    hybrid         tokens and mel of the true audio
    decoded-1      control: mel of the audio decoded from codebook 0, which the tokens imply, so it
                   holds no information that the twin lacks
    decoded-K      mel of the audio decoded from K codebooks: as much as a codec-only system has
    leaky-W        centred window of W samples: sees the future; shows what a leak is worth
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from wgpt import evaluate, plots
from wgpt.config import ConfigError
from wgpt.data.shards import Dataset
from wgpt.model import HybridModel
from wgpt.train import train

log = logging.getLogger(__name__)

# size: (token-only preset, hybrid preset)
SIZES = {"xs": ("gpt-xs", "hybrid-xs"), "s": ("gpt-s-matched", "hybrid")}


def arm_names(data: Dataset) -> list[str]:
    """The arms this data was prepared for: the twin, the hybrid, a control per further source."""
    named = {"wave": "hybrid"}
    return ["tokens", *(named.get(source, source) for source in data.mel_sources)]


def study(
    data: str | Path,
    out: str | Path,
    *,
    size: str = "xs",
    arms: list[str] | None = None,
    device: str = "auto",
    **settings: Any,
) -> dict[str, Any]:
    """Trains every arm into OUT/<arm>, scores it on the whole validation split, writes the table.

    Args:
        data: prepared folder; its mel sources decide which arms there are.
        out: folder for the runs, study.json, study.md and loss.png.
        size: a key of SIZES.
        arms: some of arm_names(data); all by default.
        settings: TrainConfig fields, the same for each arm.

    Returns {rows, gaps, arms: summary of each training run}, as in study.json.
    """
    if size not in SIZES:
        raise ConfigError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    dataset, out = Dataset(data), Path(out)
    known = arm_names(dataset)
    chosen = arms or known
    for arm in chosen:
        if arm not in known:
            raise ConfigError(
                f"arms must be some of {', '.join(known)}, got {arm!r}; another mel source is "
                "prepared with `wgpt prepare --mel-sources`"
            )
    split = dataset.split("valid")
    if split.n_clips == 0:
        raise ConfigError(f"{dataset.path}: the validation split is empty, nothing to compare on")
    scores = evaluate.baselines(dataset.split("train"), split)
    summaries, runs = {}, []
    for arm in chosen:
        source = {"tokens": None, "hybrid": "wave"}.get(arm, arm)
        options = {**settings, "device": device, **({"mel_source": source} if source else {})}
        folder = out / arm
        summaries[arm] = train(data, folder, SIZES[size][source is not None], **options)
        model = HybridModel.from_pretrained(folder / "model", "cpu")
        context = summaries[arm]["context_steps"]
        scores.append(evaluate.score(arm, model, split, context_steps=context, mel_source=source))
        runs.append(folder)
    plots.loss_curves(runs[0], out / "loss.png", runs[1:])
    by_name = {score.name: score for score in scores}
    result = {
        "data": str(dataset.path),
        "size": size,
        "settings": settings,
        "arms": summaries,
        "rows": [row for score in scores for row in score.rows()],
        "gaps": _gaps(by_name),
    }
    (out / "study.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "study.md").write_text(as_markdown(result) + "\n")
    return result


def _gaps(scores: dict[str, evaluate.Score]) -> list[dict[str, Any]]:
    """Every arm minus the token-only twin, per group, with its bootstrap interval."""
    gaps: list[dict[str, Any]] = []
    if "tokens" not in scores:
        return gaps
    twin = scores["tokens"]
    groups = sorted(set(twin.groups))
    for name, score in scores.items():
        if name in ("tokens", "uniform", "unigram", "bigram"):
            continue
        for group in [None, *groups] if len(groups) > 1 else [None]:
            gap, low, high = evaluate.paired_difference(score, twin, group)
            gaps.append(
                {"arm": name, "group": group or "all", "nll_nats": gap, "low": low, "high": high}
            )
    return gaps


def as_markdown(result: dict[str, Any]) -> str:
    """The table and the gaps of a study."""
    lines = [evaluate.table(result["rows"]), ""]
    if result["gaps"]:
        lines += [
            "NLL minus that of the token-only twin (95 % bootstrap interval over clips):",
            "",
            "| arm | group | difference (nats) | interval |",
            "|---|---|---:|---|",
        ]
        for gap in result["gaps"]:
            lines.append(
                f"| {gap['arm']} | {gap['group']} | {gap['nll_nats']:+.3f} "
                f"| {gap['low']:+.3f} to {gap['high']:+.3f} |"
            )
    return "\n".join(lines)


# -- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt study`."""
    parser.add_argument("data", metavar="DATA", help="folder written by `wgpt prepare`")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--size", default="xs", choices=tuple(SIZES))
    parser.add_argument("--arms", nargs="+", help="default: all that the data allow")
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-s", type=float, default=10.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt study`."""
    result = study(
        args.data,
        args.out,
        size=args.size,
        arms=args.arms,
        device=args.device,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        context_s=args.context_s,
        lr=args.lr,
        seed=args.seed,
    )
    sys.stdout.write((json.dumps(result) if args.json else as_markdown(result)) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
