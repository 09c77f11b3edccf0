"""Checkpoints: model, optimizer and progress; safetensors and JSON, atomic, checked by sha256.

    RUN/checkpoints/step-00000250/model.safetensors, config.json, README.md     a model folder
                                  optimizer.safetensors     AdamW state, by parameter
                                  state.json     step, progress, sha256 of both; written last

A folder appears under its final name only when every byte of it is on disk, so whatever a kill
leaves behind is either a whole checkpoint or an ignored temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wgpt.errors import CheckpointError
from wgpt.files import sha256_of, sync_folder, write_atomically
from wgpt.model import HybridModel

_FILES = ("model.safetensors", "optimizer.safetensors")
_MODEL_FOLDER = ("model.safetensors", "config.json", "README.md")  # of save_pretrained
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: Path,
    step: int,
    model: HybridModel,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    best: int | None = None,
    progress: dict[str, Any] | None = None,
    card: str = "",
    facts: dict[str, Any] | None = None,
) -> Path:
    """Writes folder/step-N atomically and returns it.

    Args:
        keep: newest checkpoints that stay; older ones are deleted.
        best: step of a checkpoint that stays whatever its age.
        progress: JSON values for `load_newest` to give back.
        card, facts: as HybridModel.save_pretrained's card and extra.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = path_of(folder, step)
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        model.save_pretrained(temporary, card, facts)
        _write_tensors(temporary / _FILES[1], _optimizer_tensors(model, optimizer))
        sums = {name: sha256_of(temporary / name) for name in _FILES}
        state = {"step": step, "progress": progress or {}, "sha256": sums}
        write_atomically(temporary / "state.json", json.dumps(state, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_steps(folder)[:-keep]:
        if best is None or old != path_of(folder, best):
            shutil.rmtree(old)
    return target


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary folders of a killed `save`."""
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


def load_newest(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Restores the newest checkpoint and returns its step and progress.

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
    state = json.loads((found[-1] / "state.json").read_text())
    device = str(next(model.parameters()).device)
    try:
        model.load_state_dict(safetensors.torch.load_file(found[-1] / _FILES[0], device=device))
    except RuntimeError as error:
        raise CheckpointError(f"{found[-1] / _FILES[0]}: is of another model: {error}") from None
    _restore_optimizer(found[-1] / _FILES[1], model, optimizer)
    return int(state["step"]), dict(state.get("progress", {}))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder, or the empty string."""
    state_path = checkpoint / "state.json"
    try:
        state: Any = json.loads(state_path.read_text())
        sums = state["sha256"]
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{state_path}: cannot be read: {error!r}"
    for name in _FILES:
        path = checkpoint / name
        if not path.is_file():
            return f"{path}: is missing"
        got = sha256_of(path)
        if got != sums.get(name):
            return f"{path}: sha256 must be {sums.get(name)}, got {got}"
    return ""


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
