"""Committed steps of a run: everything that a step is, behind one rename.

    RUN/checkpoints/step-00000250/model.safetensors, config.json, README.md     a model folder
                                  optimizer.safetensors     AdamW state, by parameter
                                  metrics.csv    the rows up to this step
                                  state.json     step, progress, settings, data, environment, and
                                                 the sha256 of the files; sealed

A folder appears under its final name only when every byte of it is on disk, so whatever a kill
leaves behind is either a committed step or an ignored temporary folder. All else in RUN is derived
from what is committed, and made again where it is missing.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wgpt.errors import CheckpointError, TrainError
from wgpt.files import read_json, sha256_of, sync_folder, write_atomically, write_sealed
from wgpt.model import HybridModel

_MODEL_FOLDER = ("model.safetensors", "config.json", "README.md")  # of save_pretrained
_FILES = (*_MODEL_FOLDER, "optimizer.safetensors", "metrics.csv")
_ALWAYS = ("model.safetensors", "optimizer.safetensors")  # version 0.1 kept nothing else
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def commit(
    folder: Path,
    step: int,
    model: HybridModel,
    optimizer: torch.optim.Optimizer,
    *,
    metrics: bytes,
    state: dict[str, Any],
    card: str = "",
    facts: dict[str, Any] | None = None,
) -> Path:
    """Writes folder/step-N atomically and returns it.

    Args:
        metrics: content of metrics.csv up to this step.
        state: JSON values for `state_of` to give back.
        card, facts: as HybridModel.save_pretrained's card and extra.

    Raises TrainError where a weight is not finite; OSError, before anything is written where the
    disk has no room.
    """
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise TrainError(f"step {step}: {bad[0]} is not finite; the step is not committed")
    tensors = _optimizer_tensors(model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    weights = list(model.state_dict().values())  # twice: RUN/model may follow
    _check_room(path_of(folder, step), [*weights, *weights, *tensors.values()], metrics)
    target = path_of(folder, step)
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        model.save_pretrained(temporary, card, facts)
        _write_tensors(temporary / "optimizer.safetensors", tensors)
        write_atomically(temporary / "metrics.csv", metrics)
        sums = {name: sha256_of(temporary / name) for name in _FILES}
        write_sealed(temporary / "state.json", {"step": step, **state, "sha256": sums})
        remove(target)
        os.rename(temporary, target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def newest_step(folder: Path) -> int | None:
    """The last committed step, or None."""
    found = list_steps(folder)
    return int(found[-1].name.removeprefix("step-")) if found else None


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; a kill leaves all of it, or a folder that remove_leftovers knows."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old")
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden)


def prune(folder: Path, keep: int, best: int) -> None:
    """Deletes all checkpoints but the `keep` newest and that of the step `best`."""
    for old in list_steps(folder)[:-keep]:
        if old != path_of(folder, best):
            remove(old)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed `commit` or `remove` left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def copy_model(checkpoint: Path, target: Path) -> None:
    """Makes `target` the model folder of a checkpoint, unless it is already.

    Weights are replaced before the config.json that holds their sha256: after a kill in between
    the two differ, and the next call does the rest.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in _MODEL_FOLDER:
        content = (checkpoint / name).read_bytes()
        if not (target / name).is_file() or (target / name).read_bytes() != content:
            write_atomically(target / name, content)


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint, every file of it compared with its sha256.

    Raises CheckpointError when there is none, or when the newest is damaged: the message names the
    newest whole one, since going back further than asked must be the user's own decision.
    """
    found = list_steps(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no checkpoint to resume from")
    problem = damage(found[-1])
    if problem:
        good = next((p for p in reversed(found[:-1]) if not damage(p)), None)
        advice = (
            f"the newest whole one is {good}; delete the later ones to resume from it"
            if good
            else f"no whole one is left; delete {folder}, and --resume starts at step 0"
        )
        raise CheckpointError(f"{problem}; {advice}")
    return found[-1]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What `commit` was given as state, and the step. Raises CheckpointError."""
    path = checkpoint / "state.json"
    try:
        state = read_json(path, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    step, sums = state.get("step"), state.get("sha256")
    if type(step) is not int or path_of(checkpoint.parent, step) != checkpoint:
        raise CheckpointError(f"{path}: step must be that of {checkpoint.name}, got {step}")
    wanted = _FILES if "run" in state else _ALWAYS
    if not isinstance(sums, dict) or not set(wanted) <= set(sums) <= set(_FILES):
        raise CheckpointError(f"{path}: must hold the sha256 of {', '.join(wanted)}")
    return state


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder, or the empty string."""
    try:
        sums = state_of(checkpoint)["sha256"]
    except CheckpointError as error:
        return str(error)
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path}: is missing"
        got = sha256_of(path)
        if got != expected:
            return f"{path}: sha256 must be {expected}, got {got}"
    return ""


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer. Raises CheckpointError where they are of another model."""
    path = checkpoint / "model.safetensors"
    device = str(next(model.parameters()).device)
    try:
        model.load_state_dict(safetensors.torch.load_file(path, device=device))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is of another model: {error}") from None
    _restore_optimizer(checkpoint / "optimizer.safetensors", model, optimizer)


def _check_room(target: Path, tensors: list[Tensor], metrics: bytes) -> None:
    """Raises OSError where the disk has no room for the tensors, with 1 MiB to spare."""
    needed = sum(t.numel() * t.element_size() for t in tensors) + len(metrics) + (1 << 20)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        what = f"needs {needed} bytes, and the disk has {free} left"
        raise OSError(errno.ENOSPC, what, str(target))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = torch.as_tensor(value)
    return tensors


def _restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = safetensors.torch.load_file(path)
    if not tensors:  # saved before the first step
        return
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state: dict[str, Tensor] = {}
        for key in _MOMENTS:
            value = tensors.pop(f"{key}:{name}", None)
            if value is None:
                raise CheckpointError(f"{path}: has no {key} for {name}")
            state[key] = value.to(parameter.device) if key != "step" else value.clone()
        if optimizer.defaults.get("fused"):
            state["step"] = state["step"].to(parameter.device)
        optimizer.state[parameter] = state
    if tensors:
        raise CheckpointError(f"{path}: holds {sorted(tensors)[0]}, which this model has not")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(whole, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
