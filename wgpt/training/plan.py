"""What to train from how much audio: the default of `wgpt train`, decided from a few facts.

    audio and codec -> start from the packaged model, or a size -> windows, steps, rates -> minutes

Pure: the same facts give the same plan. Its constants follow the packaged model's recipe (the card
in wgpt/assets/starter); no sweep stands behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from wgpt.config import STEP_RATE_HZ, ModelConfig, TrainConfig
from wgpt.model import HybridModel

BATCH_SIZE = 8
JOIN_S = 60.0  # a model of single clips of 2 s learns little but to end them
CONTEXT_STEPS = 512  # twice the attention window of the presets for one's own recordings
N_VALIDATIONS = 20
WORTH_IT_S = 480.0  # time that a training may always take, and more with more audio:
WAIT_PER_AUDIO = 0.5  # half as long as what is trained on
LARGE_FROM_HOURS = 3.0  # of training audio, for voice instead of voice-xs


@dataclass(frozen=True)
class Facts:
    """What a plan depends on.

    train_steps, valid_steps: audio of the splits, in steps of 1/75 s.
    n_codebooks: of the data; mel_sources: those it was prepared with.
    start: the packaged model, if the data's codec and mel are its own; else empty.
    start_mel_source: which mel that model reads.
    """

    train_steps: int
    valid_steps: int
    n_codebooks: int
    mel_sources: tuple[str, ...]
    start: str = ""
    start_mel_source: str = ""

    @property
    def hours(self) -> float:
        """Training audio, hours."""
        return self.train_steps / STEP_RATE_HZ / 3600


@dataclass(frozen=True)
class Plan:
    """What `wgpt train` does when it is not told: a preset or a start, and settings."""

    why: str
    preset: str | None  # None: the shape of settings["init"]
    model: dict[str, Any] = field(default_factory=dict)  # ModelConfig fields to change
    settings: dict[str, Any] = field(default_factory=dict)  # TrainConfig fields


def shape_for(facts: Facts, wants_shape: bool = False) -> Plan:
    """Where to begin; `steps_for` adds how long.

    wants_shape: the user changes what the packaged model cannot, so it is no start.
    """
    spoken = f"decoded-{facts.n_codebooks}"  # the mel that a model with all codebooks makes
    hours = facts.hours
    common = {"batch_size": BATCH_SIZE, "context_s": CONTEXT_STEPS / STEP_RATE_HZ,
              "join_s": JOIN_S, "eval_audio_s": 180.0,
              "fine_weight": 1.0, "fine_share": 0.25}  # fmt: skip
    # Little audio is soon known by heart.
    model: dict[str, Any] = {"dropout": 0.2 if hours < 1 else 0.1, "end_of_clip": True}
    if facts.start and facts.start_mel_source in facts.mel_sources and not wants_shape:
        settings = {**common, "init": facts.start, "mel_source": facts.start_mel_source, "lr": 1e-3}
        return Plan(f"from {facts.start}, which knows this codec", None, model, settings)
    if facts.start and wants_shape:
        why = f"from scratch: the flags ask for another shape than that of {facts.start}"
    elif facts.start:
        why = (
            f"from scratch: {facts.start} wants the mel source {facts.start_mel_source} "
            f"(prepare with --mel-sources {facts.start_mel_source})"
        )
    else:
        why = "from scratch: no model in the package knows this codec"
    large = hours >= LARGE_FROM_HOURS
    if facts.n_codebooks == 1:
        model |= {"n_fine": 0, "latent_steps": 0}
    else:
        model["n_fine"] = facts.n_codebooks - 1
    source = spoken if spoken in facts.mel_sources else facts.mel_sources[0]
    settings = {**common, "mel_source": source, "lr": 1e-3 if large else 2e-3}
    return Plan(why, "voice" if large else "voice-xs", model, settings)


def steps_for(
    plan: Plan, facts: Facts, given: dict[str, Any], step_s: float | None
) -> dict[str, Any]:
    """All settings of the plan, those `given` by the user among them.

    Passes over the audio fall with the square root of its length: 24 for 15 minutes from a trained
    model, 4 for 10 hours, and twice as many from scratch; never more than the machine does in
    WORTH_IT_S, or in WAIT_PER_AUDIO of the audio's length.

    step_s: seconds that a training step takes here; None where that was not measured.
    """
    settings = {**plan.settings, **given}
    if "max_steps" not in settings:
        epochs = min(max(12 / math.sqrt(max(facts.hours, 1e-6)), 2), 40)
        if plan.preset is not None:
            epochs *= 2
        n_steps = epochs * steps_per_epoch(facts.train_steps, settings)
        if step_s:
            audio_s = facts.train_steps / STEP_RATE_HZ
            n_steps = min(n_steps, max(WORTH_IT_S, WAIT_PER_AUDIO * audio_s) / step_s)
        settings["max_steps"] = max(int(n_steps) // 10 * 10, 10)
    often = max(settings["max_steps"] // N_VALIDATIONS, 1)
    share = 20 if plan.preset is None else 10
    return {
        "warmup_steps": min(max(settings["max_steps"] // share, 1), 200),
        "eval_every": often,
        "save_every": often,
        **settings,
    }


def steps_per_epoch(train_steps: int, settings: dict[str, Any]) -> float:
    """Optimizer steps of one pass over the audio."""
    whole = {f: settings.get(f, getattr(TrainConfig, f)) for f in ("batch_size", "context_s")}
    return train_steps / (whole["batch_size"] * round(whole["context_s"] * STEP_RATE_HZ))


def describe(
    facts: Facts, why: str, model: ModelConfig, settings: TrainConfig, step_s: float | None
) -> str:
    """The plan in a few lines, for people."""
    epochs = settings.max_steps / steps_per_epoch(facts.train_steps, vars(settings))
    minutes = "" if step_s is None else (
        f", about {max(settings.max_steps * step_s / 60, 0.1):.2g} minutes on this machine"
    )  # fmt: skip
    patience = (
        f"ends early after {settings.patience} validations without gain"
        if settings.patience and facts.valid_steps
        else "runs to its last step"
    )
    window = (
        f"{model.window_steps / STEP_RATE_HZ:.1f} s" if model.window_steps else "the whole past"
    )
    return (
        f"audio: {audio_length(facts.train_steps)} to train on, "
        f"{audio_length(facts.valid_steps)} to validate\n"
        f"start: {why}\n"
        f"model: {n_parameters(model) / 1e6:.2f} M parameters, predicts {1 + model.n_fine} "
        f"codebooks, attends to {window}, dropout {model.dropout:g}\n"
        f"training: {settings.max_steps} steps of {settings.batch_size} windows of "
        f"{settings.context_s:.1f} s = {epochs:.1f} passes over the audio{minutes}\n"
        f"it {patience}; the best model by validation is kept"
    )


def n_parameters(model: ModelConfig) -> int:
    """Trained parameters of a shape, without making them."""
    with torch.device("meta"):
        return HybridModel(model).n_parameters()


def audio_length(steps: int) -> str:
    """A length of audio in words."""
    seconds = steps / STEP_RATE_HZ
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def doubts(settings: TrainConfig, facts: Facts) -> list[str]:
    """What cannot work well in these settings, each with what to do about it."""
    found = []
    if settings.warmup_steps >= settings.max_steps:
        found.append(
            f"--warmup-steps {settings.warmup_steps} is no shorter than the run of "
            f"{settings.max_steps} steps, so the rate never reaches --lr {settings.lr:g}; "
            f"--warmup-steps {min(max(settings.max_steps // 10, 1), settings.max_steps - 1)} would"
        )
    if not facts.valid_steps:
        found.append(
            "there are no validation data: nothing tells the best model or ends the training; "
            "prepare with a larger --valid-fraction"
        )
    epochs = settings.max_steps / steps_per_epoch(facts.train_steps, vars(settings))
    if epochs > 100:
        found.append(
            f"{settings.max_steps} steps pass over the {audio_length(facts.train_steps)} of audio "
            f"{epochs:.0f} times; a model knows them by heart long before"
        )
    return found
