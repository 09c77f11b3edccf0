"""Trains a model on prepared data: `wgpt train`, in one process or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wgpt import checkpoint, codec, config, evaluate, plots
from wgpt.config import PRESETS, STEP_RATE_HZ, ConfigError, ModelConfig, TrainConfig
from wgpt.data.augment import MelAugment, scored_steps
from wgpt.data.loader import Batch, Batches, prefetch
from wgpt.data.shards import Dataset
from wgpt.model import HybridModel
from wgpt.optimizer import learning_rate, make_optimizer
from wgpt.runs import Metrics, Run, facts_of, read_metrics
from wgpt.warm_start import WarmStart
from wgpt.world import World, keep_freed_memory

log = logging.getLogger(__name__)


class TrainError(RuntimeError):
    """Training cannot go on; the message says at which step and on which batch."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: a checkpoint was saved; the message says how to resume."""


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
        raise ConfigError("--freeze-trunk trains the finer codebooks: give --fine-codebooks")
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


class Trainer:
    """One run: model, optimizer, data and files. `fit` does the rest."""

    def __init__(self, run: Run, data: Dataset, world: World) -> None:
        self.run, self.data, self.world, self.settings = run, data, world, run.config
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = HybridModel(run.model)
        self.mel_source = settings.mel_source if run.model.mel_dim else None
        if self.mel_source:
            self.model.set_mel_normalisation(*data.normalisation(self.mel_source))
        if run.model.latent_steps:
            self.model.set_codebooks(run.codec().codebooks())
        self.model.to(world.device)
        if self.model.latent is not None:
            self.model.latent.noise = settings.latent_noise
        if settings.freeze_trunk:
            self.model.requires_grad_(False)
            assert self.model.fine is not None
            self.model.fine.requires_grad_(True)
        self.optimizer = make_optimizer(self.model, settings)
        self.batches = Batches(
            data.split("train"),
            batch_size=settings.batch_size,
            context_steps=settings.context_steps,
            seed=settings.seed,
            mel_source=self.mel_source,
            codebooks=self.model.n_codebooks_read,
            n_fine=run.model.n_fine,
            augment=self._augment(),
            rank=world.rank,
            world_size=world.size,
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
        is_first = self.world.rank == 0
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
            disable=None if self.world.rank == 0 else True,
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
            stop = self.world.any(self.interrupted)
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
        settings, device = self.settings, self.world.device
        if self.run.model.dropout or settings.latent_noise:  # by the step: a resumed run repeats it
            torch.manual_seed((settings.seed << 32) + step * self.world.size + self.world.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, settings)
        batch = batch.to(device)
        n_scored = self.world.sum((batch.targets >= 0).sum())
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
        self.world.sum_gradients(parameters)
        limit = settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        parts = [loss.detach(), (correct / n_scored).float()]
        if batch.codes is not None:
            parts.append(fine_nll.detach())
        facts = self.world.sum(torch.stack(parts)).tolist()
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
        n_scored = self.world.sum(fine.known_targets(codes).sum())
        return nll.sum() / n_scored.clamp(min=1)

    def _validate(self, step: int, metrics: Metrics | None) -> None:
        split = self.data.split("valid")
        if metrics is None or split.n_clips == 0:
            return
        result, *finer = evaluate.codebook_scores(
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
        if self.world.rank or not self.settings.sample_s or not self.data.split("valid").n_clips:
            return
        from wgpt import generate

        generate.sample_into(self.run, self.model, self.data, step)

    def _card(self, step: int) -> str:
        validation = ", ".join(f"{k} {v:.4f}" for k, v in self.last_validation.items())
        return (
            f"# {self.run.preset}, trained with wgpt\n\n{self.model.describe()}.\n\n"
            f"Step {step} of {self.settings.max_steps}; validation: {validation or 'none'}.\n\n"
            f"Codec: `{self.data.codec_identity}`. Mel source: {self.mel_source}.\n\n"
            "Load with `wgpt.model.HybridModel.from_pretrained(folder)`.\n"
        )


def _spread_clips(split: Any, audio_s: float) -> list[int] | None:
    """Clips spread evenly over the split, about `audio_s` seconds of them; None for all."""
    total_s = split.n_steps / STEP_RATE_HZ
    if not audio_s or total_s <= audio_s:
        return None
    n_clips = max(1, round(split.n_clips * audio_s / total_s))
    return [i * split.n_clips // n_clips for i in range(n_clips)]


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
        settings: TrainConfig fields. On resume all of them come from the run's config.json.

    Raises ConfigError, DataError, CheckpointError, TrainError, Interrupted.
    """
    if resume:
        run = Run.open(out)
        dataset, warm = run.dataset(data), None
        world = World.join(run.config.device)
    else:
        if data is None:
            raise ConfigError("data must name a prepared folder; make one with `wgpt prepare`")
        dataset = Dataset(data)
        chosen = TrainConfig(**settings)
        warm = WarmStart(chosen.init) if chosen.init else None
        if warm is None:
            preset = preset or "hybrid"
            shape = dataclasses.replace(config.preset(preset), **(model or {}))
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
            latent_dim = codec.load(dataset.manifest["codec"]["source"]).codebooks().shape[2]
            if shape.latent_dim not in (0, latent_dim):
                raise ConfigError(
                    f"--latent-dim must be that of the data's codec, {latent_dim}, "
                    f"got {shape.latent_dim}"
                )
            shape = dataclasses.replace(shape, latent_dim=latent_dim)
        check_fit(shape, chosen, dataset)
        world = World.join(chosen.device)
        run = Run(Path(out), preset, shape, chosen, facts_of(dataset))
        if world.rank == 0:
            run = Run.create(out, preset, shape, chosen, dataset)
    if world.rank == 0:
        dataset.verify()
    trainer = Trainer(run, dataset, world)
    if warm is not None:
        warm.load_into(trainer.model)
    log.info("%s: %s", run.preset, trainer.model.describe())
    try:
        return trainer.fit(resume)
    finally:
        world.leave()


# -- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt train`: a flag for every TrainConfig and ModelConfig field."""
    parser.add_argument("--data", help="folder written by `wgpt prepare`")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder to write")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), help="default hybrid, or that of --init"
    )
    parser.add_argument("--resume", action="store_true", help="go on from RUN's newest checkpoint")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    training = parser.add_argument_group("training")
    shape = parser.add_argument_group("model", "fields of the model, instead of the preset's")
    for group, kind in ((training, TrainConfig), (shape, ModelConfig)):
        for field in dataclasses.fields(kind):
            if type(field.default) is bool:
                group.add_argument(
                    config.flag_of(field),
                    action="store_const",
                    const=True,
                    help=field.metadata["doc"],
                )
                continue
            shown = kind is TrainConfig and field.default != ""
            default = f" (default {field.default})" if shown else ""
            group.add_argument(
                config.flag_of(field),
                dest=field.name,
                type=type(field.default),
                metavar=type(field.default).__name__.upper(),
                default=None,
                help=f"{field.metadata['doc']}{default}".replace("%", "%%"),
            )


def run(args: argparse.Namespace) -> int:
    """`wgpt train`."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    settings = {f.name: given[f.name] for f in dataclasses.fields(TrainConfig) if f.name in given}
    shape = {f.name: given[f.name] for f in dataclasses.fields(ModelConfig) if f.name in given}
    if args.resume and (settings or shape):
        fields = (*dataclasses.fields(TrainConfig), *dataclasses.fields(ModelConfig))
        raise ConfigError(
            f"--resume takes every setting from {args.out}/config.json; leave out "
            + ", ".join(config.flag_of(f) for f in fields if f.name in settings | shape)
        )
    keep_freed_memory()
    summary = train(args.data, args.out, args.preset, resume=args.resume, model=shape, **settings)
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        rows = [
            row for row in read_metrics(Path(args.out) / "metrics.csv") if row["split"] == "valid"
        ]
        for row in rows[-1:]:
            sys.stdout.write(
                f"step {row['step']}: validation NLL {float(row['nll_nats']):.4f} nats, accuracy "
                f"{100 * float(row['accuracy']):.2f} %\n"
            )
        sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
