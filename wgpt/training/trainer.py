"""The training loop of one run: steps, and when to validate, save and stop."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wgpt.data.augment import MelAugment, scored_steps
from wgpt.data.batches import Batch, TrainingBatches, prefetch
from wgpt.data.dataset import Dataset
from wgpt.errors import Interrupted, TrainError
from wgpt.model import HybridModel
from wgpt.runs import checkpoint, plots
from wgpt.runs.run import Run
from wgpt.training.distributed import ProcessGroup
from wgpt.training.optimizer import learning_rate, make_optimizer
from wgpt.training.progress import Progress
from wgpt.training.record import RunRecord
from wgpt.training.resume import resume_command

log = logging.getLogger(__name__)


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
        self.progress = Progress()
        self.record: RunRecord | None = None  # of the first process

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
        """Trains to max_steps or until validation stops improving.

        Returns the summary that `wgpt train --json` prints. Raises TrainError when the loss is not
        finite, Interrupted after Ctrl-C or SIGTERM.
        """
        start, is_new = 0, not (resume and checkpoint.list_steps(self.run.checkpoints))
        if not is_new:
            start, saved = checkpoint.load_newest(self.run.checkpoints, self.model, self.optimizer)
            self.progress = Progress(**saved)
            if any(change["from_step"] == start for change in self.run.changes):
                self.progress.n_worse = 0  # other settings: a new hope
            log.info("resumed from step %d", start)
        if self.processes.rank == 0:
            self.record = RunRecord(
                self.run,
                self.data,
                self.model,
                self.optimizer,
                self.progress,
                -1 if is_new else start,
            )
        began = time.monotonic()
        try:
            with self._signals():
                if is_new and self.record:
                    self.record.validate(0, 0.0)
                    self.record.save(0)
                end = self._loop(start)
        finally:
            if self.record:
                self.record.close()
        if self.record:
            plots.loss_curves(self.run.folder)
        seconds = time.monotonic() - began
        n_tokens = (end - start) * self.settings.batch_size * self.settings.context_steps
        return {
            "run": str(self.run.folder),
            "preset": self.run.preset,
            "n_parameters": self.model.n_parameters(),
            "steps": end,
            "ended": "max_steps" if end >= self.settings.max_steps else "patience",
            "context_steps": self.settings.context_steps,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(n_tokens / max(seconds, 1e-9), 1),
            "best_step": self.progress.best_step,
            "best": self.progress.best,
            "valid": self.progress.newest,
        }

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after a save; only the main thread can be told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True

    def _loop(self, start: int) -> int:
        """Trains from step `start` on; returns the last step."""
        settings, record = self.settings, self.record
        if self._is_exhausted():
            log.info(
                "ended at step %d for want of improvement; to continue, more patience: %s",
                start,
                resume_command(self.run, patience=2 * settings.patience),
            )
            return start
        bar = tqdm(
            prefetch(self.batches.batch, start, settings.max_steps),
            initial=start,
            total=settings.max_steps,
            unit="step",
            disable=None if self.processes.rank == 0 else True,
            file=sys.stderr,
        )
        began, step = time.monotonic(), start
        for step, batch in enumerate(bar, start + 1):
            values = self._step(step, batch)
            if record:
                record.metrics.add(step=step, epoch=self.epoch(step), split="train", **values)
            seen = (step - start) * settings.batch_size * settings.context_steps
            speed = seen / (time.monotonic() - began)
            bar.set_postfix_str(
                f"nll {values['nll_nats']:.3f}, {speed:.0f} tokens/s", refresh=False
            )
            last, improved = step == settings.max_steps, False
            if last or (settings.eval_every and step % settings.eval_every == 0):
                improved = record is not None and record.validate(step, self.epoch(step))
                last = last or self._is_exhausted()
            stop = self.processes.any(self.interrupted)
            due = settings.save_every and step % settings.save_every == 0
            if record and (last or stop or improved or due):
                record.save(step)
            if last:
                break
            if record and settings.sample_every and step % settings.sample_every == 0:
                record.sample(step)
            if stop:
                bar.close()
                raise Interrupted(
                    f"stopped at step {step} of {settings.max_steps}, everything is saved; go on "
                    f"with: {resume_command(self.run)}"
                )
        bar.close()
        if record:
            record.sample_best()
        if record and step < settings.max_steps:
            log.info(
                "ended at step %d of %d: %d validations in a row brought nothing better than "
                "step %d; to continue, more patience: %s",
                step, settings.max_steps, self.progress.n_worse, self.progress.best_step,
                resume_command(self.run, patience=2 * settings.patience),
            )  # fmt: skip
        return step

    def _is_exhausted(self) -> bool:
        """Whether validation has not improved for too long, as the first process sees it."""
        return self.processes.any(self.progress.is_exhausted(self.settings.patience))

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
            command = resume_command(self.run, lr=float(f"{settings.lr / 3:.1g}"))
            raise TrainError(
                f"step {step}: loss {facts[0]}, gradient norm {norm.item()}: not finite; the batch "
                f"was (clip, first step) {rows} of {self.data.path}. Go on from the last "
                f"checkpoint at a lower rate: {command}"
            )
        self.optimizer.step()
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"nll_nats": facts[0], "accuracy": facts[1], "lr": rate, "grad_norm": norm.item()}
        return row if batch.codes is None else {**row, "fine_nll_nats": facts[2]}

    def _fine_nll(self, step: int, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean NLL of the residual codebooks on some steps of each row, this process's share of it.

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
