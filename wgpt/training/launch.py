"""Starts or resumes a run: which model, from which weights, on which data."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

from wgpt import codec
from wgpt.config import ModelConfig, TrainConfig
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.files import locked
from wgpt.model.presets import preset as preset_shape
from wgpt.runs import checkpoint
from wgpt.runs.run import Run, facts_of
from wgpt.training.distributed import ProcessGroup
from wgpt.training.initial_weights import InitialWeights
from wgpt.training.resume import with_changes
from wgpt.training.trainer import Trainer

log = logging.getLogger(__name__)


def check_fit(model: ModelConfig, settings: TrainConfig, data: Dataset) -> None:
    """Raises ConfigError or DataError where model, settings and data do not go together."""
    if data.codebook_size != model.codebook_size:
        raise ConfigError(
            f"model: codebook_size must be the data's {data.codebook_size}, "
            f"got {model.codebook_size}"
        )
    if model.n_fine >= data.n_codebooks:
        raise ConfigError(
            f"--fine-codebooks must lie in [0, {data.n_codebooks - 1}], the data's codec has "
            f"{data.n_codebooks} codebooks, got {model.n_fine}"
        )
    if settings.freeze_trunk and not model.n_fine:
        raise ConfigError("--freeze-trunk trains the residual codebooks: give --fine-codebooks")
    if settings.latent_noise and not model.latent_steps:
        raise ConfigError(
            "latent_noise must be 0 for a model without latents (latent_steps = 0), got "
            f"{settings.latent_noise}"
        )
    if not model.mel_dim:
        if settings.mel_noise or settings.mel_drop:
            raise ConfigError(
                "mel_noise and mel_drop must be 0 for a model without mel (mel_dim = 0), got "
                f"{settings.mel_noise} and {settings.mel_drop}"
            )
        return
    mel = data.mel_config
    if (model.n_mels, model.frames_per_step) != (mel.n_mels, mel.frames_per_step):
        raise ConfigError(
            f"model: n_mels, frames_per_step must be the data's {mel.n_mels}, "
            f"{mel.frames_per_step}, got {model.n_mels}, {model.frames_per_step}"
        )
    data.normalisation(settings.mel_source)


def check_ranks(settings: TrainConfig, processes: ProcessGroup) -> None:
    """Raises ConfigError unless the batch can be dealt to all processes."""
    if settings.batch_size % processes.size:
        raise ConfigError(
            f"--batch-size must be divisible by the {processes.size} processes of torchrun, "
            f"got {settings.batch_size}"
        )


def train(
    data: str | Path | None,
    out: str | Path,
    preset: str | None = None,
    *,
    resume: bool = False,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains (or resumes) a run and returns its summary.

    Args:
        data: prepared data folder; on resume None for the one the run was started on.
        out: run folder; must not hold a run yet unless `resume`.
        preset: a name of config.PRESETS; by default `hybrid`, or that of `init`.
        model: ModelConfig fields to change from the preset, or from the shape of `init`.
        settings: TrainConfig fields. On resume those of the run's config.json hold but for what
            is given here, from the next step on; it is recorded there (Run.changes).

    Raises ConfigError, DataError, CheckpointError, TrainError, Interrupted.
    """
    if resume:
        run = Run.open(out)
        dataset = run.dataset(data)
        kept = checkpoint.list_steps(run.checkpoints)
        step = int(kept[-1].name.removeprefix("step-")) if kept else 0
        changed = with_changes(run, step, preset, model or {}, settings)
        check_fit(changed.model, changed.config, dataset)
        warm = InitialWeights(run.config.init) if run.config.init and not kept else None
        processes = ProcessGroup.join(changed.config.device)
        check_ranks(changed.config, processes)
        is_changed, run = changed is not run, changed
    else:
        if data is None:
            raise ConfigError("data must name a prepared folder; make one with `wgpt prepare`")
        dataset = Dataset(data)
        chosen = TrainConfig(**settings)
        warm = InitialWeights(chosen.init) if chosen.init else None
        if warm is None:
            preset = preset or "hybrid"
            shape = dataclasses.replace(preset_shape(preset), **(model or {}))
        elif preset is None:
            warm.check_data(dataset)
            preset, shape = warm.preset, warm.shape(model or {})
            if chosen.freeze_trunk and shape.latent_steps != warm.model.config.latent_steps:
                raise ConfigError(
                    "--latent-steps adds an input to the trunk, which --freeze-trunk would keep "
                    "from learning it: must be that of --init, "
                    f"{warm.model.config.latent_steps}, got {shape.latent_steps}"
                )
        else:
            raise ConfigError(f"init brings its own shape, {warm.preset}: leave out preset")
        if shape.latent_steps:
            facts = dataset.manifest["codec"]
            loaded = codec.load(facts["source"], sha256=facts["identity"]["sha256"])
            latent_dim = loaded.codebooks().shape[2]
            if shape.latent_dim not in (0, latent_dim):
                raise ConfigError(
                    f"--latent-dim must be that of the data's codec, {latent_dim}, "
                    f"got {shape.latent_dim}"
                )
            shape = dataclasses.replace(shape, latent_dim=latent_dim)
        check_fit(shape, chosen, dataset)
        processes = ProcessGroup.join(chosen.device)
        check_ranks(chosen, processes)
        run, is_changed = Run(Path(out), preset, shape, chosen, facts_of(dataset)), False
        if processes.rank == 0:
            run = Run.create(out, preset, shape, chosen, dataset)
    is_first = processes.rank == 0
    try:
        with locked(run.folder, "trained") if is_first else contextlib.nullcontext():
            if is_first:
                dataset.verify()
                if is_changed:
                    run.write()
            trainer = Trainer(run, dataset, processes)
            if warm is not None:
                warm.load_into(trainer.model)
            log.info("%s: %s", run.preset, trainer.model.describe())
            return trainer.fit(resume)
    finally:
        processes.leave()
