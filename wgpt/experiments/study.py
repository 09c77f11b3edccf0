"""The paper's comparison with its controls: each arm trained on the same data in the same order.

    STUDY/plan.json               the settings and the data that hold for all of it; sealed
    STUDY/runs/ARM-SEED/          a run of `wgpt train`, the best checkpoint by validation
    STUDY/scores/ARM-SEED.json    what that model scored, clip by clip; sealed
    STUDY/study.json, .md, .html  made anew from the scores that are there; loss.png

Every (arm, seed) is a run of its own: what was interrupted resumes from its last checkpoint, and
several machines may each do some (`only`) of one folder, or of copies whose runs and scores are
brought together afterwards (`collect`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgpt import codec as codecs
from wgpt.audio.mel import MelFrontend
from wgpt.config import STEP_RATE_HZ, TrainConfig
from wgpt.data.dataset import SHUFFLED, Dataset, Split
from wgpt.errors import ConfigError, Interrupted, TrainError, WgptError, is_out_of_memory
from wgpt.evaluation.codec_ceiling import with_decoded_mel
from wgpt.evaluation.scores import Score, score
from wgpt.experiments import collected
from wgpt.experiments.arms import Arm, Plan, plan_named
from wgpt.experiments.leak_check import leak_check
from wgpt.files import locked, read_json, remove_leftovers, write_sealed
from wgpt.model import HybridModel
from wgpt.model.presets import preset as preset_shape
from wgpt.ops.runtime import resolve_device
from wgpt.runs import plots
from wgpt.runs.run import facts_of
from wgpt.training import train

log = logging.getLogger(__name__)

_FORMAT = "wgpt-study-1"


def study(
    data: str | Path,
    out: str | Path,
    plan: str | Plan = "quick",
    *,
    arms: list[str] | None = None,
    only: list[str] | None = None,
    collect: bool = False,
    dry_run: bool = False,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains every (arm, seed) of a plan that is not done, scores it, and makes the tables.

    Scored is the test split, where there is one, else validation.

    Args:
        data: prepared folder. Arms whose mel source it lacks are left out, and named.
        out: folder of the study, new or begun.
        plan: a name of arms.PLANS, or a plan.
        arms: some of the plan's; all by default.
        only: what is trained here, each `ARM` or `ARM:SEED`; all by default.
        collect: train nothing; make the tables from the scores in the folder.
        dry_run: only say what would be done, and how long it takes here.
        model, settings: ModelConfig and TrainConfig fields, the same for each arm, instead of the
            plan's.

    Returns what collected.collect does, as in study.json; for dry_run {plan, runs}.

    Raises ConfigError, DataError (also where a mel source tells the future, leak_check),
    Interrupted; TrainError when all else is done, where a run failed: it names each, and why.
    """
    if not dry_run:
        plots.require("wgpt study")
    job = _Study(Path(data), Path(out), plan, arms, model or {}, settings)
    chosen = job.runs(only)
    job.compare()
    if not collect:
        times = job.describe(chosen)
        if dry_run:
            return {"plan": job.plan.name, "runs": [f"{arm.name}:{seed}" for arm, seed in chosen],
                    "step_s": times}  # fmt: skip
    try:
        if not collect:
            job.begin()
            job.check_leaks(chosen)
        failed: dict[str, str] = {}
        for arm, seed in [] if collect else chosen:
            try:
                job.run(arm, seed, times)
            except Interrupted:
                raise Interrupted(
                    f"stopped in {arm.name}, seed {seed}; the same `wgpt study` command resumes"
                ) from None
            except (WgptError, MemoryError, RuntimeError) as error:
                if not (isinstance(error, WgptError) or is_out_of_memory(error)):
                    raise
                if isinstance(error.__cause__, OSError):  # the disk: others would fail as well
                    raise
                why = str(error) or "out of memory"
                failed[f"{arm.name}:{seed}"] = why
                log.error("%s, seed %d: failed, others are tried: %s", arm.name, seed, why)
        return job.tables(failed)
    except OSError as error:
        raise TrainError(
            f"{out}: {error}; what is done is kept: the same command resumes"
        ) from error


class _Study:
    """A study's folder, plan and data."""

    def __init__(
        self,
        data: Path,
        out: Path,
        plan: str | Plan,
        arms: list[str] | None,
        model: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        whole = plan_named(plan) if isinstance(plan, str) else plan
        whole = whole.only(arms) if arms else whole
        # Before any work: what is out of range, and a device that is not here.
        TrainConfig(**{**whole.train, **settings})
        resolve_device(settings.get("device", "auto"))
        for arm in whole.arms:
            dataclasses.replace(preset_shape(arm.preset), **{**whole.model, **model, **arm.model})
        self.data, self.out = Dataset(data), out
        for name in ("train", "valid"):
            if self.data.split(name).n_clips == 0:
                raise ConfigError(
                    f"{data}: the {name} split is empty, and a study needs one to train on and "
                    "one to stop by; prepare the recordings with --valid-fraction"
                )
        self.plan = dataclasses.replace(
            whole.served(self.data),
            model={**whole.model, **model},
            train={**whole.train, **settings},
        )
        self.left_out = [arm for arm in whole.arms if arm not in self.plan.arms]
        if not self.plan.arms:
            needed = sorted({str(arm.mel_source) for arm in self.left_out})
            raise ConfigError(f"{data}: no arm can be trained; prepare it with --mel-sources "
                              f"{' '.join(needed)}")  # fmt: skip
        self.split = self.data.split("test" if self.data.split("test").n_clips else "valid")
        self._codec: Any = None

    def runs(self, only: list[str] | None) -> list[tuple[Arm, int]]:
        """(arm, seed) pairs in the plan's order; those of `only`."""
        pairs = [(arm, seed) for arm in self.plan.arms for seed in range(arm.n_seeds)]
        if not only:
            return pairs
        for name in only:
            arm, _, seed = name.partition(":")
            if not any(a.name == arm and seed in ("", str(s)) for a, s in pairs):
                known = ", ".join(f"{a.name}:{s}" for a, s in pairs)
                raise ConfigError(f"--only must be some of {known}, got {name!r}")
        return [(a, s) for a, s in pairs if {a.name, f"{a.name}:{s}"} & set(only)]

    def options(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Arguments of `train`."""
        # Resumed or begun: whichever the folder asks for.
        source = {"mel_source": arm.mel_source} if arm.mel_source else {}
        return {
            "preset": arm.preset,
            "model": {**self.plan.model, **arm.model},
            "resume": True,
            **{**self.plan.train, **arm.train, **source, "seed": seed},
        }

    def describe(self, chosen: Sequence[tuple[Arm, int]]) -> dict[str, float]:
        """Logs what is trained here, and for how long at most; returns seconds a step by arm."""
        times: dict[str, float] = {}
        total_s = 0.0
        for arm, seed in chosen:
            is_done = collected.score_path(self.out, arm.name, seed).exists()
            if not is_done and arm.name not in times:
                folder = self.out / "runs" / f".timed-{os.getpid()}"
                said = train(self.data.path, folder, dry_run=True, **self.options(arm, 0))
                times[arm.name] = said["step_s"]
            seconds = 0.0 if is_done else self.plan.train["max_steps"] * times[arm.name]
            total_s += seconds
            log.info(
                "%s, seed %d: %s; %s", arm.name, seed, arm.purpose,
                "done" if is_done else f"at most {seconds / 60:.0f} min",
            )  # fmt: skip
        for arm in self.left_out:
            log.info(
                "%s: left out; prepare the data with --mel-sources ... %s, and study them in a new "
                "--out, to have it",
                arm.name, arm.mel_source,
            )  # fmt: skip
        log.info(
            "%d runs of at most %d steps, each until validation stops improving: at most %.1f h "
            "on this machine",
            len(chosen), self.plan.train["max_steps"], total_s / 3600,
        )  # fmt: skip
        return times

    def facts(self) -> dict[str, Any]:
        """What holds for the whole study."""
        facts = {
            "format": _FORMAT,
            "plan": self.plan.name,
            "model": dict(self.plan.model),
            "train": {k: v for k, v in self.plan.train.items() if k != "device"},
            "manifest_sha256": facts_of(self.data)["manifest_sha256"],
        }
        return dict(json.loads(json.dumps(facts)))

    def begin(self) -> None:
        """Writes plan.json, if there is none."""
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out, "begun", wait=True):
            remove_leftovers(self.out, "plan.json")
            self.compare()  # again: another process may have begun another plan
            if not (self.out / "plan.json").exists():
                write_sealed(self.out / "plan.json", self.facts())

    def tables(self, failed: Mapping[str, str]) -> dict[str, Any]:
        """collected.collect; TrainError, if runs `failed` (`ARM:SEED`: why) and nobody did them."""
        result: dict[str, Any] = {}
        if not failed or any((self.out / "scores").glob("*.json")):
            is_there = self.out.is_dir()
            with locked(self.out, "collected", wait=True) if is_there else contextlib.nullcontext():
                for name in collected.TABLES:
                    remove_leftovers(self.out, name)
                result = collected.collect(self.out, self.plan, self.data, self.split)
            failed = {name: why for name, why in failed.items() if name in result["missing"]}
        if failed:
            raise TrainError(
                f"{len(failed)} runs failed, all others are done; the same command tries again. "
                + "; ".join(f"{name}: {why}" for name, why in failed.items())
            )
        return result

    def compare(self) -> None:
        """Raises ConfigError where the folder holds a study of another plan, or of other data."""
        if not (self.out / "plan.json").exists():
            return
        kept = read_json(self.out / "plan.json")
        for name, new in self.facts().items():
            if kept.get(name) != new:
                raise ConfigError(
                    f"{self.out}: holds a study whose {name} is {kept.get(name)}, this one's is "
                    f"{new}; give the same, or name another --out"
                )

    def check_leaks(self, chosen: Sequence[tuple[Arm, int]]) -> None:
        """leak_check of every mel that is about to be trained on and says to be causal."""
        sources = {arm.mel_source for arm, _ in chosen if arm.mel_source}
        frontend = MelFrontend(self.data.mel_config)
        context_steps = round(self.plan.train["context_s"] * STEP_RATE_HZ)
        for source in sorted(sources):
            if source != SHUFFLED and not source.startswith("leaky"):
                found = leak_check(
                    self.data.split("valid"), source, self.codec(), frontend, context_steps
                )
                log.info("leak check: mel %s stands beside its own steps (%s)", source, ", ".join(
                    f"lag {lag:+d}: {nats:.2f}" for lag, nats in found.items() if abs(lag) < 2
                ))  # fmt: skip

    def codec(self) -> Any:
        """That of the data."""
        if self._codec is None:
            facts = self.data.manifest["codec"]
            self._codec = codecs.load(facts["source"], sha256=facts["identity"]["sha256"])
        return self._codec

    def run(self, arm: Arm, seed: int, times: dict[str, float]) -> None:
        """Trains and scores, if that is not done."""
        path = collected.score_path(self.out, arm.name, seed)
        if path.exists():
            return
        log.info("%s, seed %d: %s", arm.name, seed, arm.purpose)
        folder = collected.run_folder(self.out, arm.name, seed)
        summary = train(self.data.path, folder, **self.options(arm, seed))
        device = resolve_device(self.plan.train.get("device", "auto"))
        model = HybridModel.from_pretrained(folder / "model", device)
        began = time.monotonic()
        options = {"context_steps": summary["context_steps"]}
        rows = {"forced": score(arm.name, model, self.split, mel_source=arm.mel_source, **options)}
        if model.config.mel_dim and arm.mel_source != SHUFFLED and not arm.reads_latents:
            split = self._closed()
            rows["closed"] = score(arm.name, model, split, mel_source="decoded-1", **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "format": _FORMAT,
            "arm": arm.name,
            "seed": seed,
            "split": self.split.name,
            "manifest_sha256": facts_of(self.data)["manifest_sha256"],
            "best_step": summary["best_step"],
            "steps": summary["steps"],
            "ended": summary["ended"],
            "n_parameters": summary["n_parameters"],
            "flops_per_step": model.flops_per_step(summary["context_steps"]),
            "step_s": times[arm.name],
            "scored_s": round(time.monotonic() - began, 1),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "scores": {name: _to_json(one) for name, one in rows.items()},
        }
        with locked(path.parent, "written", wait=True):  # other processes may score other arms
            remove_leftovers(path.parent, path.name)
            write_sealed(path, found)

    def _closed(self) -> Split:
        """The scored split with the mel that a model of codebook 0 hears of itself."""
        self.split = with_decoded_mel(
            self.split, self.codec(), MelFrontend(self.data.mel_config), 1
        )
        return self.split


def _to_json(one: Score) -> dict[str, list[Any]]:
    arrays: dict[str, np.ndarray] = {
        "nll": one.nll, "correct": one.correct, "n_tokens": one.n_tokens
    }  # fmt: skip
    return {name: array.tolist() for name, array in arrays.items()}
