"""The training loop of one run: steps, and when to validate, save and stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from wgpt import commits
from wgpt.data.augment import MelAugment
from wgpt.data.batches import Batch, TrainingBatches, prefetch
from wgpt.data.dataset import Dataset
from wgpt.errors import Interrupted, NotFiniteError, TrainError, WgptError, is_out_of_memory
from wgpt.model import HybridModel
from wgpt.ops.runtime import StopSignal, warn_of_changes
from wgpt.runs import checkpoint, plots
from wgpt.runs.run import Run
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import training_step
from wgpt.training.initial_weights import InitialWeights
from wgpt.training.progress import Progress
from wgpt.training.record import RunRecord
from wgpt.training.report import Report
from wgpt.training.resume import batches_begin, flags_of, resume_command
from wgpt.training.step import Finished

log = logging.getLogger(__name__)


class Trainer:
    """One run: model, optimizer, data and files. `fit` does the rest."""

    def __init__(
        self,
        run: Run,
        data: Dataset,
        processes: ProcessGroup,
        warm: InitialWeights | None = None,
    ) -> None:
        """warm: what the weights start from, if not from scratch."""
        self.run, self.data, self.processes, self.settings = run, data, processes, run.config
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = HybridModel(run.model)
        self.mel_source = settings.mel_source if run.model.mel_dim else None
        if self.mel_source:
            self.model.set_mel_normalisation(*data.normalisation(self.mel_source))
        if run.model.latent_steps:
            self.model.set_codebooks(run.codec().codebooks())
        if warm is not None:
            warm.load_into(self.model)
        self.model.to(processes.device)
        if self.model.latent is not None:
            self.model.latent.noise = settings.latent_noise
        split = data.split("train")
        first_step, first_window = batches_begin(run, split)
        self.batches = TrainingBatches(
            split,
            batch_size=settings.batch_size,
            context_steps=settings.context_steps,
            seed=settings.seed,
            mel_source=self.mel_source,
            codebooks=self.model.n_codebooks_read,
            n_fine=run.model.n_fine,
            end_of_clip=run.model.end_of_clip,
            augment=self._augment(),
            mel_dtype=self._mel_dtype(),
            first_step=first_step,
            first_window=first_window,
            rank=processes.rank,
            world_size=processes.size,
        )
        self.step = training_step(self.model, settings, processes, self.batches.rows)
        self._gathered = -1  # the last step of which the first process had the whole model
        self.stop = StopSignal()
        self.progress = Progress()
        self.record: RunRecord | None = None  # of the first process
        self.report: Report | None = None

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

    def _mel_dtype(self) -> torch.dtype:
        """Of frames in batches. A GPU reads them as they are stored, half the bytes, unless they
        are changed; the CPU's ops take float32."""
        changed = self._augment() is not None or self.run.model.mel_context_frames
        is_gpu = self.processes.device.type == "cuda"
        return torch.float16 if is_gpu and not changed else torch.float32

    def _batch(self, step: int) -> Batch:
        """The batch of a step, where the device copies it from without a wait."""
        batch = self.batches.batch(step)
        return batch.pin_memory() if self.processes.device.type == "cuda" else batch

    def seconds_per_step(self) -> float:
        """What a step takes here, the fastest but for the first. It moves the weights: a trainer
        that was timed is of no other use but to say in how many parts a batch fits in memory."""
        times = []
        batch = self._batch(self.batches.first_step)
        for step in range(1, self.step.n_timed + 1):
            began = time.monotonic()
            self._step(step, batch)
            self._note(step, self.step.settle)
            times.append(time.monotonic() - began)
        slowest = torch.tensor(min(times[1:]), dtype=torch.float64, device=self.processes.device)
        return float(self.processes.sum(slowest)) / self.processes.size

    def fit(self, committed: Path | None = None) -> dict[str, Any]:
        """Trains to max_steps or until validation stops improving.

        committed: the checkpoint to go on from, of the run; None to begin.

        Returns the summary that `wgpt train --json` prints. Raises TrainError when the loss is not
        finite or memory runs out, Interrupted after a signal.
        """
        start = 0
        if committed:
            state = commits.state_of(committed)
            checkpoint.load(committed, self.model, self.step.optimizer)
            start, self.progress = state["step"], Progress(**state.get("progress", {}))
            if any(change["from_step"] == start for change in self.run.changes):
                self.progress.n_worse = 0  # other settings: a new hope
            if self.processes.rank == 0:
                log.info("resumed from step %d", start)
                warn_of_changes(state.get("environment", {}), start)
        sharded = self.step.sharded
        self._gather(start)
        if self.processes.rank == 0:
            self.record = RunRecord(
                self.run,
                self.data,
                self.model if sharded is None else cast(HybridModel, sharded.whole),
                self.step.optimizer,
                self.progress,
                committed,
                None if sharded is None else partial(sharded.write, self.step.optimizer),
            )
        report = Report(start, self.settings.max_steps, self.processes.rank == 0)
        self.report = report
        began = time.monotonic()
        try:
            with self.stop, self.peers():
                if self.record and not committed:
                    with self._way_on():
                        self.record.validate(0, 0.0)
                        self.record.save(0)
                end = self._loop(start)
                if self.record:
                    self.record.sample_best()
        finally:
            report.close()
            if self.record:
                self.record.close()
        if self.record:
            self.record.warn_if_behind()
            if plots.can_draw():
                plots.loss_curves(self.run.folder)
            else:
                log.info("no picture of the losses, without matplotlib: pip install 'wgpt[plots]'")
        seconds = time.monotonic() - began
        return {
            "run": str(self.run.folder),
            "preset": self.run.preset,
            "n_parameters": self.model.n_parameters(),
            "steps": end,
            "ended": "max_steps" if end >= self.settings.max_steps else "patience",
            "context_steps": self.settings.context_steps,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(report.n_tokens / max(seconds, 1e-9), 1),
            "best_step": self.progress.best_step,
            "best": self.progress.best,
            "valid": self.progress.newest,
            "bigram_nll_nats": self.record.bigram_nll_nats if self.record else None,
        }

    @contextlib.contextmanager
    def peers(self) -> Iterator[None]:
        """What ends one process ends all: this one leaves word of its error, and says which other
        ended instead of the torch error that this causes."""
        try:
            yield
        except Interrupted:
            raise
        except WgptError as error:
            self.processes.tell(error)
            raise
        except RuntimeError as error:
            why = self.processes.explain(error)
            if why is None:
                self.processes.tell(error)
                raise
            has_begun = (self.run.folder / "config.json").exists()
            is_said = "--resume" in why  # by the process that told
            safe = f". What is committed is safe: {resume_command(self.run)}"
            safe = safe if has_begun and not is_said else ""
            raise TrainError(f"{why}{safe}") from error

    @contextlib.contextmanager
    def _way_on(self) -> Iterator[None]:
        """Adds to a TrainError the command that goes on from before it."""
        try:
            yield
        except TrainError as error:
            command = self._command(lr=float(f"{self.settings.lr / 3:.1g}"))
            raise TrainError(
                f"{error}. Go on from the last checkpoint at a lower rate: {command}"
            ) from None

    def _loop(self, start: int) -> int:
        """Trains from step `start` on; returns the last step."""
        settings, record, epoch = self.settings, self.record, self.batches.epoch
        more = resume_command(self.run, patience=2 * settings.patience)
        if self._is_exhausted():
            if record:
                log.info("ended at step %d for want of improvement; more patience: %s", start, more)
            return start
        if record and start and start < settings.max_steps and self._sample_is_due(start):
            if not record.has_sample(start):  # a kill came between the commit and the sample
                record.sample(start)
        step = start
        # A GPU step of a small model takes batches faster than one thread makes them.
        workers = 2 if self.processes.device.type == "cuda" else 1
        ahead = prefetch(self._batch, start, settings.max_steps, workers=workers)
        for step, batch in enumerate(ahead, start + 1):
            self._step(step, batch)
            last, improved = step == settings.max_steps, False
            if last or (settings.eval_every and step % settings.eval_every == 0):
                self._settle(step)
                with self._way_on():
                    improved = record is not None and record.validate(step, epoch(step))
                improved = self.processes.any(improved)
                last = last or self._is_exhausted()
            stop = self.processes.any(self.stop.came)
            due = settings.save_every and step % settings.save_every == 0
            if stop or due or self._sample_is_due(step):
                self._settle(step)
            if last or stop or improved or due:
                self._save(step)
            if last:
                break
            if record and self._sample_is_due(step):
                record.sample(step)
            if stop:
                raise Interrupted(
                    f"stopped at step {step} of {settings.max_steps}, everything is saved; go on "
                    f"with: {resume_command(self.run)}"
                )
        if record and step < settings.max_steps:
            log.info(
                "ended at step %d of %d: %d validations in a row brought nothing better than step "
                "%d; more patience: %s",
                step, settings.max_steps, self.progress.n_worse, self.progress.best_step, more,
            )  # fmt: skip
        return step

    def _step(self, step: int, batch: Batch) -> None:
        self._note(step, lambda: self.step.run(step, batch))

    def _settle(self, step: int) -> None:
        """What follows must see, or keep, the steps up to this one."""
        self._note(step, self.step.settle)
        self._gather(step)

    def _gather(self, step: int) -> None:
        """Brings the first process's whole copy of a sharded model to this step."""
        if self.step.sharded is not None and self._gathered != step:
            self.step.sharded.gather()
            self._gathered = step

    def _save(self, step: int) -> None:
        """The first process commits the step; all write what they hold of a sharded optimizer."""
        with self._way_on():
            if self.record:
                self.record.save(step)
            elif self.step.sharded is not None:
                self.step.sharded.write(self.step.optimizer)

    def _note(self, step: int, made: Callable[[], list[Finished]]) -> None:
        """Records the steps that `made` brings, with a way on where it fails at `step`."""
        try:
            with self._way_on():
                try:
                    finished = made()
                except NotFiniteError as error:
                    self._record(error.finished)
                    where = f"(clip, first step) {_segments(error.batch)} of {self.data.path}"
                    raise TrainError(f"{error}; the batch was {where}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # An op's own advice would stand beside the command that follows it.
            reason = str(error).partition("\n")[0].partition(". Lower ")[0][:200]
            reason = reason or type(error).__name__
            raise TrainError(f"step {step}: out of memory ({reason}). {self._smaller()}") from error
        self._record(finished)

    def _record(self, finished: Iterable[Finished]) -> None:
        for done in finished:
            if self.record:
                self.record.add(done.step, self.batches.epoch(done.step), "train", done.values)
            if self.report:
                self.report.step(done.step, done.values["nll_nats"], done.n_tokens)

    def _smaller(self) -> str:
        """What to do about a batch that does not fit in memory."""
        n_parts, n_windows = 2 * self.step.n_parts, len(self.batches.rows)
        if n_parts < 2 * n_windows:
            at_a_time = -(-n_windows // n_parts)
            return (
                f"The same batch in smaller parts, {at_a_time} of its {n_windows} windows at a "
                f"time: {self._command(accumulate=n_parts)}"
            )
        seconds = round(self.settings.context_s / 2, 2)
        return f"Shorter windows: {self._command(context_s=seconds)}"

    def _command(self, **changes: Any) -> str:
        """What the user types to go on with other settings."""
        if (self.run.folder / "config.json").exists():
            return resume_command(self.run, **changes)
        return f"the same command with{flags_of(changes)}"  # only timed so far: there is no run

    def _sample_is_due(self, step: int) -> bool:
        return bool(self.settings.sample_every) and step % self.settings.sample_every == 0

    def _is_exhausted(self) -> bool:
        """Whether validation has not improved for too long, as the first process sees it."""
        return self.processes.any(self.progress.is_exhausted(self.settings.patience))


def _segments(batch: Batch) -> list[tuple[int, int]]:
    """(clip, first step) of all segments of a batch."""
    clips, steps = batch.clips, batch.steps
    goes_on = (clips[:, 1:] == clips[:, :-1]) & (steps[:, 1:] == steps[:, :-1] + 1)
    begins = torch.nn.functional.pad(~goes_on, (1, 0), value=True) & (clips >= 0)
    return list(zip(clips[begins].tolist(), steps[begins].tolist(), strict=True))
