"""One training from recordings to a codec folder: what `wgpt codec-train` runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from wgpt import commits
from wgpt.codec import weights as codec_weights
from wgpt.codec.training.corpus import Corpus, collect, list_recordings, listed
from wgpt.codec.training.trainer import CodecTrainConfig, Trainer, check_init
from wgpt.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    TrainError,
    WgptError,
    is_out_of_memory,
)
from wgpt.files import locked, remove_leftovers, replacing, sha256_of, write_sealed
from wgpt.ops.runtime import StopSignal

logger = logging.getLogger(__name__)

SAVE_EVERY_STEPS = 250
KEPT_STEPS = 2
LOG_EVERY_STEPS = 100


def train_codec(
    data: Path,
    work: Path,
    out: Path,
    config: CodecTrainConfig,
    *,
    init: str | Path | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train a codec and write its folder.

    Args:
        data: a folder of recordings, or a table of them as benchmarks/recordings.py writes.
        work: keeps the decoded corpus and the two newest committed steps.
        out: becomes config.json and model.safetensors (float16), which `codec.load` takes.
        config: the settings.
        init: codec to start from, whatever `codec.load` takes, of the same architecture; the
            quantiser then runs from the first step. Its sha256 goes into the checkpoint.
        resume: go on from the newest committed step in `work` and make whatever is missing;
            where there is none yet, begin.

    Returns:
        the number of steps done and the last running means of the loss.

    Raises:
        ConfigError: `out` is a file, another process trains in `work`, or the steps end before
            the quantiser starts.
        DataError: no recordings, a file that is not the listed one, or a damaged corpus.
        CodecError: `init` is missing, damaged or of another architecture.
        CheckpointError: the checkpoint is of other data or other settings, is damaged, or is
            there without `resume`.
        TrainError: the disk or memory is full or fails, or a weight is not finite.
        Interrupted: a signal of ops.runtime.STOPPING came; the step was committed.
    """
    weights = None
    if init is not None:
        weights = codec_weights.read(init)
        check_init(weights, config)
        config = replace(config, init_sha256=weights.sha256)
    steps = work / "checkpoints"
    for flag, folder in (("--work", work), ("--out", out)):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"codec-train: {flag} must be a folder or new, got the file {folder}")
    if commits.list_steps(steps) and not resume:
        raise CheckpointError(
            f"codec-train: {work} holds a training; add --resume to continue it, or choose another "
            "--work"
        )
    if init is None and config.warmup_steps >= config.n_steps and not commits.list_steps(steps):
        raise ConfigError(
            f"codec-train: --warmup-steps must be below --steps {config.n_steps} (the quantiser "
            f"starts after them), got {config.warmup_steps}"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work, "trained"):
            return _train(data, work, out, config, weights)
    except WgptError:
        raise
    except (OSError, SafetensorError) as error:
        how = "the same command with --resume"
        raise TrainError(commits.unwritten(steps, str(work), error, how)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:100] or "MemoryError"
        raise TrainError(
            f"codec-train: out of memory ({reason}); a smaller --batch, in another --work"
        ) from error


def _train(
    data: Path,
    work: Path,
    out: Path,
    config: CodecTrainConfig,
    init: codec_weights.CodecWeights | None,
) -> dict[str, float]:
    """`train_codec` with `work` locked."""
    steps = work / "checkpoints"
    remove_leftovers(work / "corpus")
    commits.remove_leftovers(steps)
    committed = commits.newest_whole(steps) if commits.list_steps(steps) else None
    trainer = Trainer(_corpus(data, work / "corpus", committed), config, init)
    if committed:
        commits.prune(steps, keep=KEPT_STEPS)  # which a fault may have kept from being done
        trainer.resume(committed)
        logger.info("resumed from step %d", trainer.step)
    with StopSignal() as stop:
        while trainer.step < config.n_steps:
            trainer.train_step()
            if trainer.step % LOG_EVERY_STEPS == 0:
                shown = " ".join(f"{k} {v:.4g}" for k, v in trainer.log.items())
                logger.info("step %d %s", trainer.step, shown)
            last = trainer.step == config.n_steps
            if last or stop.came or trainer.step % SAVE_EVERY_STEPS == 0:
                trainer.commit(steps)
                commits.prune(steps, keep=KEPT_STEPS)
            if stop.came and not last:
                raise Interrupted(
                    f"codec-train: stopped at step {trainer.step} of {config.n_steps}, everything "
                    "is saved; go on with the same command and --resume"
                )
    export(trainer, out)
    return {"steps": trainer.step, **trainer.log}


def _corpus(data: Path, folder: Path, committed: Path | None) -> Corpus:
    """The corpus of `data`, decoded where it is not yet."""
    recordings = list_recordings(data)
    if (folder / "corpus.json").exists():
        corpus = Corpus(folder)
        if corpus.listed == listed(recordings):
            return corpus
        if committed:
            raise CheckpointError(
                f"codec-train: {committed} was trained on other recordings than {data} holds now; "
                "give it the same recordings, or choose another --work"
            )
        logger.info("%s: is of other recordings, and no step is committed: made again", folder)
    logger.info("decoding %d recordings", len(recordings))
    collect(recordings, folder)
    corpus = Corpus(folder)
    logger.info("corpus, minutes: %s", {k: round(v, 1) for k, v in corpus.minutes.items()})
    return corpus


def export(trainer: Trainer, folder: Path) -> None:
    """Write config.json and model.safetensors (float16) as transformers' EncodecModel does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        remove_leftovers(folder, name)
    halves = {k: v.half().contiguous() for k, v in trainer.weights().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(halves, temporary, metadata={"format": "pt"})
    config = trainer.architecture.to_config()
    write_sealed(
        folder / "config.json", {**config, "sha256": sha256_of(folder / "model.safetensors")}
    )
