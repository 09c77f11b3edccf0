"""What a resumed run may change: the way it trains, from its next step on, but not its model."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from wgpt.config import STEP_RATE_HZ, ModelConfig, TrainConfig, flag_of
from wgpt.data.dataset import Split
from wgpt.errors import ConfigError
from wgpt.runs.run import Run
from wgpt.training.initial_weights import CHANGEABLE_FIELDS

# What the weights so far mean, or came from: another value makes another run, begun from this one.
_FIXED = ("seed", "mel_source", "join_s", "init", "freeze_trunk")
_FIELDS = {f.name: f for kind in (TrainConfig, ModelConfig) for f in dataclasses.fields(kind)}


def resume_command(run: Run, **settings: Any) -> str:
    """The command line that resumes a run, with other settings if given."""
    return f"wgpt train --out {shlex.quote(str(run.folder))} --resume{flags_of(settings)}"


def with_changes(
    run: Run, step: int, preset: str | None, model: dict[str, Any], settings: dict[str, Any]
) -> Run:
    """The run with other settings from `step` on, recorded in Run.changes; not yet written.

    Args:
        step: steps done.
        preset: must be the run's own, or None.
        model: ModelConfig fields; only dropout may differ from the run's.
        settings: TrainConfig fields.

    Raises ConfigError, with a command that does what was asked, for what would be another model.
    """
    if preset not in (None, run.preset):
        raise ConfigError(
            f"--resume continues {run.folder}, a {run.preset}; another preset is another run: "
            f"wgpt train --data {_data(run)} --preset {preset} --out NEW"
        )
    now = {**vars(run.model), **vars(run.config)}
    # TrainConfig gives its values one spelling: decoded:8 is decoded-8.
    given = {**model, **{n: getattr(TrainConfig(**_legal(n, v)), n) for n, v in settings.items()}}
    changed = {n: [now[n], value] for n, value in given.items() if now[n] != value}
    for name, (old, new) in changed.items():
        if name in _FIXED or (name in model and name != "dropout"):
            raise ConfigError(_refusal(run, name, old, new))
    if not changed:
        return run
    other = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **{n: given[n] for n in changed if n in model}),
        config=dataclasses.replace(run.config, **{n: given[n] for n in changed if n in settings}),
        changes=(*run.changes, {"from_step": step, "changed": changed}),
    )
    if other.config.max_steps < step:
        raise ConfigError(
            f"--max-steps must be at least {step}, the steps that {run.folder} has done, "
            f"got {other.config.max_steps}"
        )
    return other


def batches_begin(run: Run, split: Split) -> tuple[int, int]:
    """Step and window (data.packing) from which on the run has its batch size and context.

    Another batch size takes the next windows; other windows begin with the next epoch.
    """
    total = split.n_steps + split.n_clips * run.model.end_of_clip
    size, context = run.config.batch_size, run.config.context_s
    for change in reversed(run.changes):  # those it began with
        size = change["changed"].get("batch_size", [size])[0]
        context = change["changed"].get("context_s", [context])[0]
    step = window = 0
    for change in run.changes:
        window += (change["from_step"] - step) * size
        step = change["from_step"]
        size = change["changed"].get("batch_size", [size])[-1]
        if "context_s" in change["changed"]:
            before, context = context, change["changed"]["context_s"][1]
            epoch = -(-window // _n_windows(total, before))
            window = epoch * _n_windows(total, context)
    return step, window


def _n_windows(n_total: int, context_s: float) -> int:
    return -(-n_total // round(context_s * STEP_RATE_HZ))


def _legal(name: str, value: Any) -> dict[str, Any]:
    """Arguments of a TrainConfig that sets one field; freeze_trunk goes with init alone."""
    return {name: value, **({"init": "-"} if name == "freeze_trunk" else {})}


def _refusal(run: Run, name: str, old: Any, new: Any) -> str:
    flag = flag_of(_FIELDS[name])
    start = f"wgpt train --data {_data(run)}"
    if name == "init":
        begin = f"{start} --out NEW{flags_of({name: new})}"
    elif name in _FIXED or name in CHANGEABLE_FIELDS:
        begin = f"{start} --init {shlex.quote(str(run.folder))} --out NEW{flags_of({name: new})}"
    else:
        begin = f"{start} --preset {run.preset} --out NEW{flags_of({name: new})}"
    return (
        f"--resume cannot change {flag} from {'nothing' if old == '' else old} to {new}: it would "
        "be another model. "
        f"Begin one: {begin}"
    )


def _data(run: Run) -> str:
    return shlex.quote(str(run.data["path"]))


def flags_of(settings: dict[str, Any]) -> str:
    """Settings as flags of `wgpt train`, each with a blank in front."""
    parts = []
    for name, value in settings.items():
        flag = flag_of(_FIELDS[name])
        parts.append(f" {flag}" if value is True else f" {flag} {shlex.quote(str(value))}")
    return "".join(parts)
