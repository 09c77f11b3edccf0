"""One training from recordings to a codec folder: what `wgpt codec-train` runs."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from safetensors.torch import save_file

from wgpt.codec import weights as codec_weights
from wgpt.codec.training.corpus import Corpus, collect, list_recordings
from wgpt.codec.training.trainer import CodecTrainConfig, Trainer, check_init
from wgpt.errors import CheckpointError, Interrupted
from wgpt.files import replacing, sha256_of, write_atomically, write_sealed

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 100


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


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
        work: keeps the decoded corpus and the checkpoint.
        out: becomes config.json and model.safetensors (float16), which `codec.load` takes.
        config: the settings.
        init: codec to start from, whatever `codec.load` takes, of the same architecture; the
            quantiser then runs from the first step. Its sha256 goes into the checkpoint.
        resume: continue from the checkpoint in `work`.

    Returns:
        the number of steps done and the last running means of the loss.

    Raises:
        DataError: no recordings, or a file that is not the listed one.
        CodecError: `init` is missing, damaged or of another architecture.
        CheckpointError: the checkpoint is of other data or other settings, is damaged, or is
            there without `resume`, or missing with it.
        Interrupted: SIGINT or SIGTERM came; the checkpoint was saved.
    """
    weights = None
    if init is not None:
        weights = codec_weights.read(init)
        check_init(weights, config)
        config = replace(config, init_sha256=weights.sha256)
    recordings = list_recordings(data)
    corpus_folder = work / "corpus"
    listed = json.dumps(sorted({r.sha256 for r in recordings}))
    if not (corpus_folder / "corpus.json").exists():
        logger.info("decoding %d recordings", len(recordings))
        collect(recordings, corpus_folder)
        write_atomically(corpus_folder / "listed.json", listed)
    elif (corpus_folder / "listed.json").read_text() != listed:
        raise CheckpointError(
            f"codec-train: {corpus_folder} was made of other recordings than {data} holds now; "
            "pass the same recordings, or another --work"
        )
    corpus = Corpus(corpus_folder)
    logger.info("corpus, minutes: %s", {k: round(v, 1) for k, v in corpus.minutes.items()})
    trainer = Trainer(corpus, config, weights)
    found = trainer.resume(work)
    if found != resume:
        raise CheckpointError(
            f"codec-train: {work} holds a checkpoint; pass --resume to continue it, or another "
            "--work"
            if found
            else f"codec-train: {work} holds no checkpoint to resume"
        )
    with _signals() as caught:
        saved_at = time.monotonic()
        while trainer.step < config.n_steps and not caught:
            trainer.train_step()
            if trainer.step % LOG_EVERY_STEPS == 0:
                shown = " ".join(f"{k} {v:.4g}" for k, v in trainer.log.items())
                logger.info("step %d %s", trainer.step, shown)
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                trainer.save(work)
                saved_at = time.monotonic()
        trainer.save(work)
    if caught:
        raise Interrupted(
            f"codec-train: interrupted after step {trainer.step}; continue with --resume"
        )
    export(trainer, out)
    return {"steps": trainer.step, **trainer.log}


def export(trainer: Trainer, folder: Path) -> None:
    """Write config.json and model.safetensors (float16) as transformers' EncodecModel does."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: v.half().contiguous() for k, v in trainer.weights().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(halves, temporary, metadata={"format": "pt"})
    config = trainer.architecture.to_config()
    write_sealed(
        folder / "config.json", {**config, "sha256": sha256_of(folder / "model.safetensors")}
    )
