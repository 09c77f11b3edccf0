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

import json
import logging
from pathlib import Path
from typing import Any

from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, did_you_mean
from wgpt.evaluation.baselines import baselines
from wgpt.evaluation.scores import Score, paired_difference, score
from wgpt.evaluation.tables import score_table
from wgpt.model import HybridModel
from wgpt.runs import plots
from wgpt.training import train

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
                f"arms must be some of {', '.join(known)}, got {arm!r}"
                f"{did_you_mean(arm, known)}; another mel source is prepared with "
                "`wgpt prepare --mel-sources`"
            )
    split = dataset.split("valid")
    if split.n_clips == 0:
        raise ConfigError(f"{dataset.path}: the validation split is empty, nothing to compare on")
    scores = baselines(dataset.split("train"), split)
    summaries, runs = {}, {}
    for arm in chosen:
        source = {"tokens": None, "hybrid": "wave"}.get(arm, arm)
        options = {**settings, "device": device, **({"mel_source": source} if source else {})}
        folder = out / arm
        summaries[arm] = train(data, folder, SIZES[size][source is not None], **options)
        model = HybridModel.from_pretrained(folder / "model", "cpu")
        context = summaries[arm]["context_steps"]
        scores.append(score(arm, model, split, context_steps=context, mel_source=source))
        runs[arm] = folder
    plots.save(plots.comparison_figure(runs, "tokens"), out / "loss.png")
    by_name = {one.name: one for one in scores}
    result = {
        "data": str(dataset.path),
        "size": size,
        "settings": settings,
        "arms": summaries,
        "rows": [row for one in scores for row in one.rows()],
        "gaps": gaps(by_name),
    }
    (out / "study.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "study.md").write_text(as_markdown(result) + "\n")
    return result


def gaps(scores: dict[str, Score]) -> list[dict[str, Any]]:
    """Every arm minus the token-only twin, per group, with its bootstrap interval.

    scores: by name, baselines and arms; without `tokens` there is nothing to compare with.

    Returns rows {arm, group, nll_nats, low, high}: negative where the arm is better.
    """
    found: list[dict[str, Any]] = []
    if "tokens" not in scores:
        return found
    twin = scores["tokens"]
    groups = sorted(set(twin.groups))
    for name, arm in scores.items():
        if name in ("tokens", "uniform", "unigram", "bigram"):
            continue
        for group in [None, *groups] if len(groups) > 1 else [None]:
            gap, low, high = paired_difference(arm, twin, group)
            found.append(
                {"arm": name, "group": group or "all", "nll_nats": gap, "low": low, "high": high}
            )
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The table and the gaps of a study."""
    lines = [score_table(result["rows"]), ""]
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
