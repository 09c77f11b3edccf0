"""What a study found: scores of all arms and seeds, differences to the twin, curves, tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wgpt.data.dataset import Dataset, Split
from wgpt.errors import ConfigError
from wgpt.evaluation.baselines import baselines
from wgpt.evaluation.scores import Score, paired_difference
from wgpt.experiments.arms import Plan
from wgpt.experiments.study_tables import as_markdown, as_page
from wgpt.files import read_json, write_atomically
from wgpt.runs import plots
from wgpt.runs.metrics import read_metrics
from wgpt.runs.run import facts_of

log = logging.getLogger(__name__)

MOST_GROUPS_SHOWN = 8
TABLES = ("study.json", "study.md", "study.html", "loss.png")  # what `collect` makes


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The run of an arm and a seed."""
    return out / "runs" / f"{arm}-{seed}"


def score_path(out: Path, arm: str, seed: int) -> Path:
    """Its score."""
    return out / "scores" / f"{arm}-{seed}.json"


def collect(out: Path, plan: Plan, data: Dataset, split: Split) -> dict[str, Any]:
    """Makes study.json, study.md, study.html and loss.png from the scores in a study's folder.

    Returns {data, split, plan, rows, gaps, arms, missing, conclusions}: `rows` of Score.row(), mean
    over seeds; `gaps` of gaps(); `arms` by name what each is, scored, and cost; `missing` the runs
    of the plan that are not there; beside them the plan's settings.

    Raises ConfigError where there is no score, or one of other data.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for arm in plan.arms:
        for seed in range(arm.n_seeds):
            path = score_path(out, arm.name, seed)
            if path.exists():
                found.setdefault(arm.name, []).append(_read(path, data, split))
            else:
                missing.append(f"{arm.name}:{seed}")
    if not found:
        raise ConfigError(
            f"{out}: holds no score yet; `wgpt study DATA --out {out}` trains, and resumes from "
            "what is there"
        )
    by_arm = {name: [_score(one, "forced", split) for one in rows] for name, rows in found.items()}
    means = {name: _mean(scores) for name, scores in by_arm.items()}
    base = baselines(data.split("train"), split)
    folders = {name: [run_folder(out, name, one["seed"]) for one in rows]
               for name, rows in found.items()}  # fmt: skip
    step_s = {name: float(np.mean([one["step_s"] for one in rows])) for name, rows in found.items()}
    curves = {name: [_curve(folder) for folder in of] for name, of in folders.items()}
    arms = {
        arm.name: {
            "purpose": arm.purpose,
            "n_parameters": found[arm.name][0]["n_parameters"],
            "flops_per_step": found[arm.name][0]["flops_per_step"],
            "seeds": [one["seed"] for one in found[arm.name]],
            "nll_nats_by_seed": [one.row()["nll_nats"] for one in by_arm[arm.name]],
            "steps": [one["steps"] for one in found[arm.name]],
            "best_step": [one["best_step"] for one in found[arm.name]],
            "minutes": _minutes(found[arm.name], "steps"),
            "minutes_to_best": _minutes(found[arm.name], "best_step"),
            "minutes_to_twin": _reaches(curves, arm.name, plan.twin, step_s[arm.name]),
            "closed_loop_nll_nats": _closed(found[arm.name], split),
            "torch": found[arm.name][0]["torch"],
            "machine": found[arm.name][0]["machine"],
        }
        for arm in plan.arms
        if arm.name in found
    }
    differences = gaps(by_arm, plan.twin)
    shown = [row for one in [*base, *means.values()] for row in _rows(one)]
    result = {
        "data": str(data.path),
        "manifest_sha256": facts_of(data)["manifest_sha256"],
        "split": split.name,
        "plan": plan.name,
        "twin": plan.twin,
        "model": dict(plan.model),
        "train": dict(plan.train),
        "rows": shown,
        "gaps": differences,
        "arms": arms,
        "missing": missing,
        "conclusions": conclusions(differences, plan.twin),
    }
    plots.save(plots.comparison_figure(folders, plan.twin, step_s), out / "loss.png")
    write_atomically(out / "study.json", json.dumps(result, indent=2) + "\n")
    write_atomically(out / "study.md", as_markdown(result) + "\n")
    write_atomically(out / "study.html", as_page(result, (out / "loss.png").read_bytes()))
    for name in missing:
        log.info("not there yet: %s", name)
    return result


def _read(path: Path, data: Dataset, split: Split) -> dict[str, Any]:
    """A score, of these data."""
    found = read_json(path)
    expected = facts_of(data)["manifest_sha256"]
    if (found["manifest_sha256"], found["split"]) != (expected, split.name):
        raise ConfigError(
            f"{path}: is of the {found['split']} split of other data (manifest.json sha256 "
            f"{found['manifest_sha256'][:12]}..., these have {expected[:12]}...); give those data, "
            "or remove the file and its run"
        )
    return found


def _score(found: dict[str, Any], kind: str, split: Split) -> Score:
    arrays = found["scores"][kind]
    return Score(
        found["arm"],
        np.array(arrays["nll"]),
        np.array(arrays["correct"]),
        np.array(arrays["n_tokens"]),
        list(split.groups),
    )


def _mean(scores: Sequence[Score]) -> Score:
    """Of several seeds: sums of each clip, averaged."""
    first = scores[0]
    return Score(
        first.name,
        np.mean([one.nll for one in scores], 0),
        np.mean([one.correct for one in scores], 0),
        first.n_tokens,
        first.groups,
    )


def _rows(one: Score) -> list[dict[str, Any]]:
    rows = one.rows()
    return rows if len(rows) <= 1 + MOST_GROUPS_SHOWN else rows[:1]


def _closed(found: list[dict[str, Any]], split: Split) -> float | None:
    """Mean closed-loop NLL over seeds; None for an arm without a closed loop."""
    scores = [_score(one, "closed", split) for one in found if "closed" in one["scores"]]
    return _mean(scores).row()["nll_nats"] if scores else None


def _minutes(found: list[dict[str, Any]], steps: str) -> float:
    """What so many steps take, mean over seeds."""
    return float(np.mean([one[steps] * one["step_s"] / 60 for one in found]))


def _curve(run: Path) -> list[tuple[int, float]]:
    """(step, validation NLL) of a run."""
    return [
        (int(row["step"]), float(row["nll_nats"]))
        for row in read_metrics(run / "metrics.csv")
        if row["split"] == "valid"
    ]


def _reaches(
    curves: dict[str, list[list[tuple[int, float]]]], arm: str, twin: str, step_s: float
) -> float | None:
    """Minutes until the arm's validation NLL, mean over seeds, is as low as the twin's ever is;
    None if it never is, or there is no twin."""
    if arm == twin or not any(curves.get(twin, ())):
        return None
    goal = float(np.mean([min(nats for _, nats in curve) for curve in curves[twin] if curve]))
    first = [next((step for step, nats in curve if nats <= goal), None) for curve in curves[arm]]
    reached = [step for step in first if step is not None]
    return float(np.mean(reached)) * step_s / 60 if len(reached) == len(first) else None


def gaps(by_arm: dict[str, list[Score]], twin: str) -> list[dict[str, Any]]:
    """Every arm minus the twin, over all clips and in each group, with a 95 % bootstrap interval.

    by_arm: scores of each seed.

    Returns rows {arm, group, ...} of paired_difference; none without the twin.
    """
    if twin not in by_arm:
        return []
    names = sorted(set(by_arm[twin][0].groups))
    shown = [None, *names] if 1 < len(names) <= MOST_GROUPS_SHOWN else [None]
    return [
        {"arm": arm, "group": group or "all", **paired_difference(scores, by_arm[twin], group)}
        for arm, scores in by_arm.items()
        if arm != twin
        for group in shown
    ]


def conclusions(found: list[dict[str, Any]], twin: str) -> list[str]:
    """What the intervals allow to say, one sentence an arm."""
    said = []
    for gap in found:
        if gap["group"] != "all":
            continue
        if gap["low"] is None:
            said.append(f"Too few {gap['drawn']}, {gap['n_drawn']}, to compare {gap['arm']} with "
                        f"{twin}: {gap['nll_nats']:+.3f} nats.")  # fmt: skip
            continue
        size = f"{abs(gap['nll_nats']):.3f} nats ({gap['low']:+.3f} to {gap['high']:+.3f})"
        doubt = "" if min(gap["n_seeds"]) > 1 else "; what another seed would give is not known"
        if gap["high"] < 0:
            said.append(f"{gap['arm']} is better than {twin} by {size}{doubt}.")
        elif gap["low"] > 0:
            said.append(f"{gap['arm']} is worse than {twin} by {size}{doubt}.")
        else:
            said.append(f"Between {gap['arm']} and {twin} no difference is shown: "
                        f"{gap['nll_nats']:+.3f} nats ({gap['low']:+.3f} to "
                        f"{gap['high']:+.3f}).")  # fmt: skip
    return said
