"""What the first process of a training keeps: validations, checkpoints, the model, samples."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from wgpt import audio, commits, config
from wgpt.audio.mel import MelFrontend
from wgpt.config import STEP_RATE_HZ
from wgpt.data.dataset import Dataset, Split
from wgpt.errors import TrainError
from wgpt.evaluation.baselines import baselines
from wgpt.evaluation.scores import codebook_scores
from wgpt.files import remove_leftovers
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.model import HybridModel
from wgpt.ops.runtime import environment
from wgpt.runs import checkpoint
from wgpt.runs.loggers import open_loggers
from wgpt.runs.metrics import Metrics, rows_until
from wgpt.runs.run import Run
from wgpt.training.progress import Progress

log = logging.getLogger(__name__)

_SAMPLE_PROMPT_S = 3.0


class RunRecord:
    """Writes into a run's folder while its model is trained. `close` it at the end."""

    def __init__(
        self,
        run: Run,
        data: Dataset,
        model: HybridModel,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        committed: Path | None,
        write_shards: Callable[[Path], None] | None = None,
    ) -> None:
        """committed: the checkpoint that the run goes on from; what is derived becomes as it says,
        and what was done after it is done again.
        write_shards: writes the optimizer's state, once it has some, where that is sharded."""
        self.run, self.data, self.model, self.optimizer = run, data, model, optimizer
        self.write_shards = write_shards
        self.progress = progress
        for folder in (".", "model", "samples", "plots"):
            remove_leftovers(run.folder / folder)
        commits.remove_leftovers(run.checkpoints)
        split = data.split("valid")
        self.clips = spread_clips(split, run.config.eval_audio_s)
        self.bigram_nll_nats: float | None = None  # of the clips that validations score
        if split.n_clips:
            *_, bigram = baselines(data.split("train"), split, self.clips)
            self.bigram_nll_nats = bigram.row()["nll_nats"]
        after_step = commits.state_of(committed)["step"] if committed else -1
        rows = committed / "metrics.csv" if committed else None
        if rows and rows.is_file():
            kept = rows.read_bytes()
        else:  # a new run, or a checkpoint of version 0.1
            kept = rows_until(run.folder / "metrics.csv", after_step)
        self.metrics = Metrics(run.folder / "metrics.csv", kept)
        shown = {**config.to_json(run.model), **config.to_json(run.config)}
        self.loggers = open_loggers(run.config.loggers, run.folder, shown, max(after_step, 0))
        if committed:
            self._derive()

    @property
    def mel_source(self) -> str | None:
        """The mel that the model reads."""
        return self.run.config.mel_source if self.run.model.mel_dim else None

    def close(self) -> None:
        """Flushes and closes metrics.csv and the loggers."""
        self.metrics.close()
        for logger in self.loggers:
            logger.close()

    def add(self, step: int, epoch: float, split: str, figures: dict[str, float]) -> None:
        """A row of metrics.csv, and what the loggers make of it."""
        self.metrics.add(step=step, epoch=epoch, split=split, **figures)
        for logger in self.loggers:
            logger.add(step, split, figures)

    def validate(self, step: int, epoch: float) -> bool:
        """Scores the validation split, if there is one; True if the NLL is the lowest so far.

        Raises TrainError for figures that are not finite.
        """
        split, settings = self.data.split("valid"), self.run.config
        if split.n_clips == 0:
            return False
        result, *residual = codebook_scores(
            self.run.preset,
            self.model,
            split,
            context_steps=settings.context_steps,
            mel_source=self.mel_source,
            clips=self.clips,
            dtype=settings.dtype,
        )
        row = result.row()
        figures = {name: row[name] for name in ("nll_nats", "accuracy", "perplexity")}
        fine = [score.row()["nll_nats"] for score in residual]
        if fine:
            figures["fine_nll_nats"] = sum(fine) / len(fine)
        self.add(step, epoch, "valid", {n: v for n, v in figures.items() if n != "perplexity"})
        self.metrics.flush()
        # A perplexity overflows above 709 nats; it is left out then.
        figures = {n: v for n, v in figures.items() if n != "perplexity" or v < math.inf}
        if not all(map(math.isfinite, figures.values())):
            raise TrainError(
                f"step {step}: validation gives {figures}, not finite; the step is not committed"
            )
        improved = self.progress.add_validation(step, figures)
        log.info(
            "step %d: validation NLL %.4f, accuracy %.4f%s",
            step, row["nll_nats"], row["accuracy"], ", the best so far" if improved else "",
        )  # fmt: skip
        if step and figures["nll_nats"] > math.log(split.codebook_size) + 0.5:
            log.warning(
                "step %d: the validation NLL is above %.2f, that of knowing nothing: training "
                "diverges; begin again at a lower --lr",
                step, math.log(split.codebook_size),
            )  # fmt: skip
        return improved

    def warn_if_behind(self) -> None:
        """In the end: is the best model better than pairs of tokens?"""
        best, bigram = self.progress.best.get("nll_nats"), self.bigram_nll_nats
        if best is not None and bigram is not None and best > bigram:
            log.warning(
                "the best validation NLL, %.3f nats at step %d, is behind that of a bigram, %.3f: "
                "the model has learnt less than pairs of tokens tell. More steps, more audio or a "
                "start from a trained model (--init) would help",
                best, self.progress.best_step, bigram,
            )  # fmt: skip

    def save(self, step: int) -> None:
        """Commits the step, and makes RUN/model follow. Raises TrainError for weights that are not
        finite, OSError."""
        progress = self.progress
        if self.data.split("valid").n_clips == 0:
            progress.best_step = step
        self.metrics.flush()
        checkpoint.commit(
            self.run.checkpoints,
            step,
            self.model,
            self.optimizer,
            metrics=(self.run.folder / "metrics.csv").read_bytes(),
            state={
                "progress": dataclasses.asdict(progress),
                "run": self.run.description(),
                "environment": environment(),
            },
            card=self._card(step),
            facts={
                "preset": self.run.preset,
                "step": step,
                "mel": config.to_json(self.data.mel_config),
                "mel_source": self.mel_source,
                "context_steps": self.run.config.context_steps,
                "codec": self.run.data["codec"],
                "treatment": self.data.treatment,
            },
            write_shards=self.write_shards if self.optimizer.state else None,
        )
        self._derive()

    def sample(self, step: int) -> None:
        """A continuation of the first validation clip by the model as it is."""
        self._sample(self.model, step)

    def has_sample(self, step: int) -> bool:
        """Whether it was made."""
        return sample_path(self.run, step).is_file()

    def sample_best(self) -> None:
        """The same by RUN/model."""
        device = next(self.model.parameters()).device
        best = HybridModel.from_pretrained(self.run.model_folder, str(device))
        self._sample(best, self.progress.best_step)

    def _sample(self, model: HybridModel, step: int) -> None:
        if self.run.config.sample_s and self.data.split("valid").n_clips:
            sample_into(self.run, model, self.data, step)

    def _derive(self) -> None:
        """Brings RUN/model and the checkpoints kept to what the newest one says."""
        best = commits.path_of(self.run.checkpoints, self.progress.best_step)
        if (best / "config.json").is_file():  # not in checkpoints of version 0.1
            checkpoint.copy_model(best, self.run.model_folder)
        keep = self.run.config.keep_checkpoints
        commits.prune(self.run.checkpoints, keep, self.progress.best_step)

    def _card(self, step: int) -> str:
        progress = self.progress
        if not progress.best:
            chosen = "There are no validation data to judge it by."
        elif progress.best_step == step:
            chosen = f"The lowest validation NLL up to there: {_figures(progress.best)}."
        else:
            chosen = (
                f"Not the best of its run: step {progress.best_step} had {_figures(progress.best)}."
            )
        return (
            f"# {self.run.preset}, trained with wgpt\n\n{self.model.describe()}.\n\n"
            f"Step {step} of {self.run.config.max_steps}. {chosen}\n\n"
            f"Codec: `{self.data.codec_identity}`. Mel source: {self.mel_source}.\n\n"
            "Load with `wgpt.load(folder)`.\n"
        )


def _figures(validation: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in validation.items())


def spread_clips(split: Split, audio_s: float) -> list[int] | None:
    """Clips spread evenly over the split, about `audio_s` seconds of them; None for all."""
    total_s = split.n_steps / STEP_RATE_HZ
    if not audio_s or total_s <= audio_s:
        return None
    n_clips = max(1, round(split.n_clips * audio_s / total_s))
    return [i * split.n_clips // n_clips for i in range(n_clips)]


def sample_path(run: Run, step: int) -> Path:
    """RUN/samples/step-N.wav."""
    return run.folder / "samples" / f"step-{step:08d}.wav"


def sample_into(run: Run, model: HybridModel, data: Dataset, step: int) -> Path:
    """Writes RUN/samples/step-N.wav: decoded validation prompt, then the model's continuation."""
    loaded = run.codec(str(next(model.parameters()).device))
    prompt = loaded.decode(
        data.split("valid").clip(0)[0][:, : round(_SAMPLE_PROMPT_S * STEP_RATE_HZ)]
    )
    source = run.config.mel_source if model.config.mel_dim else None
    was_training = model.training
    generator = AudioGenerator(model.eval(), loaded, MelFrontend(data.mel_config), source)
    new = generator.generate(prompt, run.config.sample_s, Sampling(top_k=100), seed=step)
    model.train(was_training)
    path = sample_path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, np.concatenate([prompt.cpu().numpy(), new]))
    return path
