"""Starts or resumes a run: which model, from which weights, on which data."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import safetensors
import torch

from wgpt import codec, commits
from wgpt.config import ModelConfig, TrainConfig, to_json
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, DataError, TrainError, WgptError
from wgpt.files import locked
from wgpt.model.presets import preset as preset_shape
from wgpt.runs.loggers import check_loggers
from wgpt.runs.pretrained import NAME
from wgpt.runs.run import Run, facts_of
from wgpt.training import plan as plans
from wgpt.training.distributed import ProcessGroup
from wgpt.training.initial_weights import CHANGEABLE_FIELDS, InitialWeights
from wgpt.training.resume import resume_command, with_changes
from wgpt.training.trainer import Trainer

log = logging.getLogger(__name__)


def check_fit(model: ModelConfig, settings: TrainConfig, data: Dataset) -> None:
    """Raises ConfigError or DataError where model, settings and data do not go together."""
    check_loggers(settings.loggers)
    if data.split("train").n_steps == 0:
        raise DataError(f"{data.path}: the training split is empty; there is nothing to learn from")
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


@dataclasses.dataclass(frozen=True)
class Job:
    """A training that can begin: the run, its data, what it starts from, who takes part."""

    run: Run
    data: Dataset
    warm: InitialWeights | None
    processes: ProcessGroup
    facts: plans.Facts
    why: str  # of the plan: where it begins
    committed: Path | None = None  # the checkpoint to resume from
    step_s: float | None = None  # what a step takes here, where that was measured
    is_changed: bool = False  # by --resume: config.json must be written

    def describe(self) -> str:
        """The plan in a few lines."""
        return plans.describe(self.facts, self.why, self.run.model, self.run.config, self.step_s)


def train(
    data: str | Path | None,
    out: str | Path,
    preset: str | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains (or resumes) a run and returns its summary.

    Without a preset and `init`, training.plan chooses what suits the data and the machine; what is
    given here goes before it.

    Args:
        data: prepared data folder; on resume None for the one the run was started on.
        out: run folder; must not hold a committed step yet unless `resume`.
        resume: goes on from the newest committed step and makes whatever is missing; a run
            without one starts afresh.
        preset: a name of model.presets.
        dry_run: only say what would be done: {plan, run, preset, model, train, step_s}.
        model: ModelConfig fields to change from the preset, or from the shape of `init`.
        settings: TrainConfig fields. On resume those of the run's config.json hold but for what
            is given here, from the next step on; it is recorded there (Run.changes).

    Raises ConfigError, DataError, CheckpointError, Interrupted, and TrainError, also where the
    disk is full or fails.
    """
    resume = resume and (data is None or Run.exists(Path(out)))
    if resume:
        job = _resumed(data, Path(out), preset, model or {}, settings)
    else:
        job = _begun(data, Path(out), preset, model or {}, settings)
    run, processes = job.run, job.processes
    is_first = processes.rank == 0
    try:
        if dry_run:
            if job.step_s is None:
                job = dataclasses.replace(job, step_s=_time_steps(job)[0])
            return {
                "plan": job.describe(),
                "run": str(run.folder),
                "preset": run.preset,
                "model": to_json(run.model),
                "train": to_json(run.config),
                "step_s": job.step_s,
            }
        if is_first:
            run.folder.mkdir(parents=True, exist_ok=True)
        with locked(run.folder, "trained") if is_first else contextlib.nullcontext():
            if is_first:
                if not resume:
                    run.create()
                job.data.verify()
                if job.is_changed:
                    run.write()
                for line in job.describe().splitlines():
                    log.info(line)
                for doubt in plans.doubts(run.config, job.facts):
                    log.warning(doubt)
            return _trainer(job).fit(job.committed)
    except (OSError, safetensors.SafetensorError) as error:
        command = resume_command(run)
        problem = commits.unwritten(run.checkpoints, str(run.folder), error, command)
        processes.tell(problem)
        raise TrainError(problem) from error
    except WgptError as error:
        processes.tell(error)
        raise
    finally:
        processes.leave()


def _begun(
    data: str | Path | None,
    out: Path,
    preset: str | None,
    model: dict[str, Any],
    given: dict[str, Any],
) -> Job:
    """A new run, planned where no preset and no start are given."""
    if data is None:
        raise ConfigError("data must name a prepared folder; make one with `wgpt prepare`")
    Run.refuse_existing(out)
    dataset = Dataset(data)
    if preset is not None or given.get("init"):
        why = f"from {given['init']}" if given.get("init") else f"from scratch, preset {preset}"
        return _resolved(dataset, out, preset, model, TrainConfig(**given), why)
    facts = facts_about(dataset)
    plan = plans.shape_for(facts, any(name not in CHANGEABLE_FIELDS for name in model))
    model = {**plan.model, **model}
    settings = TrainConfig(**plans.steps_for(plan, facts, given, None))
    job = _resolved(dataset, out, plan.preset, model, settings, plan.why)
    step_s, n_parts = _time_steps(job)
    given = {**given, "accumulate": n_parts, "dtype": job.run.config.dtype}
    settings = TrainConfig(**plans.steps_for(plan, facts, given, step_s))
    return dataclasses.replace(
        job, run=dataclasses.replace(job.run, config=settings), step_s=step_s
    )


def _resolved(
    dataset: Dataset,
    out: Path,
    preset: str | None,
    model: dict[str, Any],
    settings: TrainConfig,
    why: str,
) -> Job:
    """The job of a preset or a start, checked against the data."""
    warm = InitialWeights(settings.init) if settings.init else None
    if warm is None:
        assert preset is not None
        shape = dataclasses.replace(preset_shape(preset), **model)
    elif preset is None:
        warm.check_data(dataset)
        preset, shape = warm.preset, warm.shape(model)
        if settings.freeze_trunk and shape.latent_steps != warm.model.config.latent_steps:
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
        if model.get("latent_dim", 0) not in (0, latent_dim):
            raise ConfigError(
                f"--latent-dim must be that of the data's codec, {latent_dim}, "
                f"got {shape.latent_dim}"
            )
        shape = dataclasses.replace(shape, latent_dim=latent_dim)
    check_fit(shape, settings, dataset)
    processes = ProcessGroup.join(settings.device)
    check_ranks(settings, processes)
    settings = dataclasses.replace(settings, dtype=arithmetic(settings.dtype, processes.device))
    run = Run(out, preset, shape, settings, facts_of(dataset))
    return Job(run, dataset.joined(settings.join_s), warm, processes, facts_about(dataset), why)


def _resumed(
    data: str | Path | None,
    out: Path,
    preset: str | None,
    model: dict[str, Any],
    given: dict[str, Any],
) -> Job:
    """A run that exists, with the settings given changed."""
    run = Run.open(out)
    dataset = run.dataset(data)
    run.check_same_data(dataset)
    kept = commits.list_steps(run.checkpoints)
    committed = commits.newest_whole(run.checkpoints) if kept else None
    step = commits.state_of(committed)["step"] if committed else 0
    given = {n: value for n, value in given.items() if (n, value) != ("dtype", "auto")}  # its own
    changed = with_changes(run, step, preset, model, given)
    check_fit(changed.model, changed.config, dataset)
    warm = InitialWeights(run.config.init) if run.config.init and not committed else None
    processes = ProcessGroup.join(changed.config.device)
    check_ranks(changed.config, processes)
    why = f"from step {step} of {out}"
    facts = facts_about(dataset)
    return Job(
        changed, dataset, warm, processes, facts, why,
        committed=committed, is_changed=changed is not run or not (out / "config.json").exists(),
    )  # fmt: skip


def arithmetic(dtype: str, device: torch.device) -> str:
    """fp32 or bf16: what `--dtype auto` means on a device. A run keeps it, wherever it resumes."""
    if dtype != "auto":
        return dtype
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def _trainer(job: Job) -> Trainer:
    return Trainer(job.run, job.data, job.processes, job.warm)


def _time_steps(job: Job) -> tuple[float, int]:
    """Seconds of a step by a trainer of its own, and in how many parts a batch fits in memory."""
    trainer = _trainer(job)
    with trainer.peers():
        return trainer.seconds_per_step(), trainer.step.n_parts


def facts_about(data: Dataset) -> plans.Facts:
    """What a plan needs to know of prepared data."""
    start, source = NAME, ""
    try:
        packaged = InitialWeights(NAME)
        packaged.check_data(data)
        source = str(packaged.facts["mel_source"])
    except ConfigError:  # another codec, or another mel
        start = ""
    return plans.Facts(
        train_steps=data.split("train").n_steps,
        valid_steps=data.split("valid").n_steps,
        n_codebooks=data.n_codebooks,
        mel_sources=data.mel_sources,
        start=start,
        start_mel_source=source,
    )
