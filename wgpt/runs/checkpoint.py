"""Committed steps of a run: everything that a step is, behind one rename.

    RUN/checkpoints/step-00000250/model.safetensors, config.json, README.md     a model folder
                                  optimizer.safetensors     AdamW state, by parameter; of a sharded
                                                 model optimizer-00001-of-00008.safetensors ...
                                  metrics.csv    the rows up to this step
                                  state.json     step, progress, settings, data, environment, and
                                                 the sha256 of the files; sealed

All else in RUN is derived from what is committed, and made again where it is missing.
wgpt.commits has what these folders share with those of `wgpt codec-train`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wgpt.commits import committing, path_of
from wgpt.errors import CheckpointError, TrainError
from wgpt.files import write_atomically
from wgpt.model import HybridModel
from wgpt.runs import shards

_MODEL_FOLDER = ("model.safetensors", "config.json", "README.md")  # of save_pretrained
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
    write_shards: Callable[[Path], None] | None = None,
) -> Path:
    """Writes folder/step-N atomically and returns it.

    Args:
        metrics: content of metrics.csv up to this step.
        state: JSON values for `state_of` to give back.
        card, facts: as HybridModel.save_pretrained's card and extra.
        write_shards: writes the optimizer's state instead, where that is sharded.

    Raises TrainError where a weight is not finite; OSError, before anything is written where the
    disk has no room.
    """
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise TrainError(f"step {step}: {bad[0]} is not finite; the step is not committed")
    tensors = {} if write_shards else optimizer_tensors(model, optimizer)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    weights = list(model.state_dict().values())  # twice: RUN/model may follow
    n_bytes = sum(t.nbytes for t in [*weights, *weights, *tensors.values()]) + len(metrics)
    if write_shards:
        n_bytes += 2 * sum(p.nbytes for p in model.parameters())
    with committing(folder, step, state, n_bytes) as temporary:
        model.save_pretrained(temporary, card, facts)
        if write_shards:
            write_shards(temporary)
        else:
            safetensors.torch.save_file(tensors, temporary / "optimizer.safetensors")
        write_atomically(temporary / "metrics.csv", metrics)
    return path_of(folder, step)


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


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer, whole or sharded, from a checkpoint of either kind.

    Raises CheckpointError where they are of another model.
    """
    if _is_sharded(model) or not (checkpoint / "optimizer.safetensors").is_file():
        _load_parts(checkpoint, model, optimizer)
        return
    path = checkpoint / "model.safetensors"
    device = str(next(model.parameters()).device)
    try:
        model.load_state_dict(safetensors.torch.load_file(path, device=device))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is of another model: {error}") from None
    _restore_optimizer(checkpoint / "optimizer.safetensors", model, optimizer)


def _is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are DTensors, without an import that takes a second."""
    return any(hasattr(p, "device_mesh") for p in model.parameters())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer by what it is and the parameter's name: `exp_avg:head.weight`."""
    return {
        f"{key}:{name}": torch.as_tensor(value).detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_parts(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`load` where the model is sharded, or the optimizer's state in several files."""
    tensors = dict(model.state_dict())
    states: dict[Tensor, dict[str, Tensor]] = {}
    begun = any(":" in name for name in shards.names_in(checkpoint))  # past the first step
    for name, parameter in model.named_parameters():
        if begun and parameter.requires_grad:
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            states[parameter] = {"step": torch.zeros((), device=device)}
            for key in _MOMENTS[1:]:
                states[parameter][key] = torch.zeros_like(parameter.detach())
            tensors |= {f"{key}:{name}": states[parameter][key] for key in _MOMENTS}
    shards.read(checkpoint, tensors)
    optimizer.state.update(states)


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
