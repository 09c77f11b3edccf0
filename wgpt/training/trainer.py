"""The training loop of one run: steps, validation, checkpoints, samples."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wgpt import audio, config
from wgpt.audio.mel import MelFrontend
from wgpt.config import STEP_RATE_HZ
from wgpt.data.augment import MelAugment, scored_steps
from wgpt.data.batches import Batch, TrainingBatches, prefetch
from wgpt.data.dataset import Dataset, Split
from wgpt.errors import Interrupted, TrainError
from wgpt.evaluation.scores import codebook_scores
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.model import HybridModel
from wgpt.runs import checkpoint, plots
from wgpt.runs.metrics import Metrics
from wgpt.runs.run import Run
from wgpt.training.distributed import ProcessGroup
from wgpt.training.optimizer import learning_rate, make_optimizer

log = logging.getLogger(__name__)

_SAMPLE_PROMPT_S = 3.0


class Trainer:
    """One run: model, optimizer, data and files. `fit` does the rest."""

    def __init__(self, run: Run, data: Dataset, processes: ProcessGroup) -> None:
        self.run, self.data, self.processes, self.settings = run, data, processes, run.config
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = HybridModel(run.model)
        self.mel_source = settings.mel_source if run.model.mel_dim else None
        if self.mel_source:
            self.model.set_mel_normalisation(*data.normalisation(self.mel_source))
        if run.model.latent_steps:
            self.model.set_codebooks(run.codec().codebooks())
        self.model.to(processes.device)
        if self.model.latent is not None:
            self.model.latent.noise = settings.latent_noise
        if settings.freeze_trunk:
            self.model.requires_grad_(False)
            assert self.model.fine is not None
            self.model.fine.requires_grad_(True)
        self.optimizer = make_optimizer(self.model, settings)
        self.batches = TrainingBatches(
            data.split("train"),
            batch_size=settings.batch_size,
            context_steps=settings.context_steps,
            seed=settings.seed,
            mel_source=self.mel_source,
            codebooks=self.model.n_codebooks_read,
            n_fine=run.model.n_fine,
            augment=self._augment(),
            rank=processes.rank,
            world_size=processes.size,
        )
        self.interrupted = False
        self.last_validation: dict[str, float] = {}

    def _augment(self) -> MelAugment | None:
        settings = self.settings
        if self.mel_source is None or not (settings.mel_noise or settings.mel_drop):
            return None
        return MelAugment(
            *self.data.normalisation(self.mel_source),
            noise=settings.mel_noise,
            drop=settings.mel_drop,
            drop_span_steps=settings.mel_drop_span_steps,
        )

    def epoch(self, step: int) -> float:
        """Training audio seen after `step` steps, in passes over the split (padding aside)."""
        seen = step * self.settings.batch_size * self.settings.context_steps
        return seen / max(self.data.split("train").n_steps, 1)

    def fit(self, resume: bool) -> dict[str, Any]:
        """Trains to max_steps. Returns the summary that `wgpt train --json` prints.

        Raises TrainError when the loss is not finite, Interrupted after Ctrl-C or SIGTERM.
        """
        start = 0
        if resume:
            start = checkpoint.load_newest(self.run.checkpoints, self.model, self.optimizer)
            log.info("resumed from step %d", start)
        is_first = self.processes.rank == 0
        metrics = Metrics(self.run.folder / "metrics.csv", start) if is_first else None
        old_handlers = {
            s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)
        }
        began = time.monotonic()
        try:
            self._loop(start, metrics)
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            if metrics:
                metrics.close()
        if is_first:
            plots.loss_curves(self.run.folder)
        seconds = time.monotonic() - began
        n_tokens = (self.settings.max_steps - start) * self.settings.batch_size
        n_tokens *= self.settings.context_steps
        return {
            "run": str(self.run.folder),
            "preset": self.run.preset,
            "n_parameters": self.model.n_parameters(),
            "steps": self.settings.max_steps,
            "context_steps": self.settings.context_steps,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(n_tokens / max(seconds, 1e-9), 1),
            "valid": self.last_validation,
        }

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True

    def _loop(self, start: int, metrics: Metrics | None) -> None:
        settings = self.settings
        if start == 0:
            self._validate(0, metrics)
        bar = tqdm(
            prefetch(self.batches.batch, start, settings.max_steps),
            initial=start,
            total=settings.max_steps,
            unit="step",
            disable=None if self.processes.rank == 0 else True,
            file=sys.stderr,
        )
        began = time.monotonic()
        for step, batch in enumerate(bar, start + 1):
            values = self._step(step, batch)
            if metrics:
                metrics.add(step=step, epoch=self.epoch(step), split="train", **values)
            seen = (step - start) * settings.batch_size * settings.context_steps
            speed = seen / (time.monotonic() - began)
            bar.set_postfix_str(
                f"nll {values['nll_nats']:.3f}, {speed:.0f} tokens/s", refresh=False
            )
            last = step == settings.max_steps
            if last or (settings.eval_every and step % settings.eval_every == 0):
                self._validate(step, metrics)
            stop = self.processes.any(self.interrupted)
            if last or stop or (settings.save_every and step % settings.save_every == 0):
                self._save(step, metrics)
            if last or (settings.sample_every and step % settings.sample_every == 0):
                self._sample(step)
            if stop and not last:
                bar.close()
                raise Interrupted(
                    f"stopped at step {step} of {settings.max_steps}, everything is saved; go on "
                    f"with: wgpt train --out {self.run.folder} --resume"
                )

    def _step(self, step: int, batch: Batch) -> dict[str, float]:
        """One optimizer step; `step` counts from 1."""
        settings, device = self.settings, self.processes.device
        if self.run.model.dropout or settings.latent_noise:  # by the step: a resumed run repeats it
            torch.manual_seed(
                (settings.seed << 32) + step * self.processes.size + self.processes.rank
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, settings)
        batch = batch.to(device)
        n_scored = self.processes.sum((batch.targets >= 0).sum())
        if settings.freeze_trunk:  # no dropout but in the head
            for part in self.model.children():
                part.train(part is self.model.fine)
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"),
            torch.set_grad_enabled(not settings.freeze_trunk),
        ):
            hidden = self.model.hidden(batch.tokens, batch.frames)
            losses, correct = self.model.score(hidden, batch.targets)
        loss = losses / n_scored
        total = loss
        if batch.codes is not None:
            fine_nll = self._fine_nll(step, hidden, batch.codes)
            total = loss + settings.fine_weight * fine_nll
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.processes.sum_gradients(parameters)
        limit = settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        parts = [loss.detach(), (correct / n_scored).float()]
        if batch.codes is not None:
            parts.append(fine_nll.detach())
        facts = self.processes.sum(torch.stack(parts)).tolist()
        if not (math.isfinite(facts[0]) and math.isfinite(norm.item())):
            rows = list(zip(batch.clips.tolist(), batch.starts.tolist(), strict=True))
            raise TrainError(
                f"step {step}: loss {facts[0]}, gradient norm {norm.item()}: not finite; the batch "
                f"was (clip, first step) {rows} of {self.data.path}; lower --lr, raise "
                "--warmup-steps, or look at these clips"
            )
        self.optimizer.step()
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"nll_nats": facts[0], "accuracy": facts[1], "lr": rate, "grad_norm": norm.item()}
        return row if batch.codes is None else {**row, "fine_nll_nats": facts[2]}

    def _fine_nll(self, step: int, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean NLL of the finer codebooks on some steps of each row, this process's share of it.

        A depth sequence costs about as much as the trunk's step, and neighbouring steps say much
        the same: an eighth of them (fine_share) teaches the head for a fraction of the time.
        """
        settings, fine = self.settings, self.model.fine
        assert fine is not None
        chosen = scored_steps(
            codes.shape[2], settings.fine_share, settings.seed, step, self.batches.rows
        ).to(codes.device)[:, None]
        codes = codes.gather(2, chosen.expand(-1, codes.shape[1], -1))
        hidden = hidden.gather(1, chosen[:, 0, :, None].expand(-1, -1, hidden.shape[2]))
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
            nll, _ = fine.nll(hidden, codes)
        n_scored = self.processes.sum(fine.known_targets(codes).sum())
        return nll.sum() / n_scored.clamp(min=1)

    def _validate(self, step: int, metrics: Metrics | None) -> None:
        split = self.data.split("valid")
        if metrics is None or split.n_clips == 0:
            return
        result, *finer = codebook_scores(
            self.run.preset,
            self.model,
            split,
            context_steps=self.settings.context_steps,
            mel_source=self.mel_source,
            clips=_spread_clips(split, self.settings.eval_audio_s),
            dtype=self.settings.dtype,
        )
        row = result.row()
        self.last_validation = {k: row[k] for k in ("nll_nats", "accuracy", "perplexity")}
        fine = [score.row()["nll_nats"] for score in finer]
        if fine:
            self.last_validation["fine_nll_nats"] = sum(fine) / len(fine)
        metrics.add(
            step=step,
            epoch=self.epoch(step),
            split="valid",
            nll_nats=row["nll_nats"],
            accuracy=row["accuracy"],
            lr="",
            grad_norm="",
            fine_nll_nats=self.last_validation.get("fine_nll_nats", ""),
        )
        metrics.flush()
        log.info(
            "step %d: validation NLL %.4f, accuracy %.4f", step, row["nll_nats"], row["accuracy"]
        )

    def _save(self, step: int, metrics: Metrics | None) -> None:
        if metrics is None:
            return
        metrics.flush()
        checkpoint.save(
            self.run.checkpoints, step, self.model, self.optimizer, self.settings.keep_checkpoints
        )
        self.model.save_pretrained(
            self.run.model_folder,
            card=self._card(step),
            extra={
                "preset": self.run.preset,
                "step": step,
                "mel": config.to_json(self.data.mel_config),
                "mel_source": self.mel_source,
                "codec": self.run.data["codec"],
            },
        )

    def _sample(self, step: int) -> None:
        if (
            self.processes.rank
            or not self.settings.sample_s
            or not self.data.split("valid").n_clips
        ):
            return
        sample_into(self.run, self.model, self.data, step)

    def _card(self, step: int) -> str:
        validation = ", ".join(f"{k} {v:.4f}" for k, v in self.last_validation.items())
        return (
            f"# {self.run.preset}, trained with wgpt\n\n{self.model.describe()}.\n\n"
            f"Step {step} of {self.settings.max_steps}; validation: {validation or 'none'}.\n\n"
            f"Codec: `{self.data.codec_identity}`. Mel source: {self.mel_source}.\n\n"
            "Load with `wgpt.model.HybridModel.from_pretrained(folder)`.\n"
        )


def _spread_clips(split: Split, audio_s: float) -> list[int] | None:
    """Clips spread evenly over the split, about `audio_s` seconds of them; None for all."""
    total_s = split.n_steps / STEP_RATE_HZ
    if not audio_s or total_s <= audio_s:
        return None
    n_clips = max(1, round(split.n_clips * audio_s / total_s))
    return [i * split.n_clips // n_clips for i in range(n_clips)]


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
    path = run.folder / "samples" / f"step-{step:08d}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, np.concatenate([prompt.cpu().numpy(), new]))
    return path
