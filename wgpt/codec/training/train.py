"""Train a small EnCodec-architecture codec, from synthetic sound or from your recordings.

    python -m wgpt.codec.training.train --work DIR --out MODEL_DIR --minutes 80 --threads 2

What made it work at this size (each found necessary in trials that collapsed without it): layer
scales set from data before the first step, losses that put the waveform first, short crops, a
few hundred steps without the quantiser, codebooks started by k-means on real residuals, and
orthogonalised steps (Muon) for every weight matrix, which learn about ten times as fast as Adam's.
Progress goes to stderr; DIR holds the corpus and a checkpoint from which the same command
continues. Steps draw from a generator seeded by (seed, step), so a continued run sees the same
data as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wgpt.codec.training import conv as codec_conv
from wgpt.codec.training import corpus as codec_corpus
from wgpt.codec.training import loss as codec_loss
from wgpt.codec.training import score as codec_score
from wgpt.codec.training.optimizer import Optimizer
from wgpt.codec.training.quantizer import ResidualQuantizer

logger = logging.getLogger(__name__)

CROP_SAMPLES = 38 * 320


def build_model(n_filters: int = 12, hidden: int = 48) -> Any:
    """A causal 24 kHz EnCodec with 75 frames/s and 8 codebooks of 1024.

    The encoder strides by 8 first: the audio-rate layers, which cost most of the time on a CPU
    and hold few of the parameters, are then only one stage on each side.
    """
    from transformers.models.encodec.configuration_encodec import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecModel

    config = EncodecConfig(
        target_bandwidths=[0.75, 1.5, 3.0, 6.0],
        sampling_rate=24_000,
        audio_channels=1,
        normalize=False,
        pad_mode="constant",
        num_filters=n_filters,
        hidden_size=hidden,
        codebook_dim=hidden,
        num_lstm_layers=1,
        upsampling_ratios=[2, 4, 5, 8],
        last_kernel_size=5,
        use_conv_shortcut=False,
    )
    return EncodecModel(config)


@torch.no_grad()
def scale_layers(model: Any, wave: Tensor) -> None:
    """Scale every convolution in turn so that its output has unit variance on `wave` (B, 1, L).

    Layer-sequential unit-variance initialisation (Mishkin and Matas, 2016); the second
    convolution of a residual block gets half of that, the last of the decoder the level of the
    wave itself.
    """
    convolutions: list[tuple[str, Any]] = [
        (name, module)
        for part in ("encoder", "decoder")
        for name, module in getattr(model, part).named_modules(prefix=part)
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    ]
    for i, (name, module) in enumerate(convolutions):
        seen: list[float] = []
        handle = module.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.std()))
        model.decoder(model.encoder(wave))
        handle.remove()
        target = 0.5 if ".block.3." in name else 1.0
        if i == len(convolutions) - 1:
            target = float(wave.std())
        scale = target / max(float(seen[0]), 1e-6)
        module.parametrizations.weight.original0.mul_(scale)
        module.bias.mul_(0)


class Trainer:
    """The model, its quantiser, the optimiser and a running mean of the weights."""

    def __init__(self, corpus: codec_corpus.Corpus, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.corpus = corpus
        self.model = build_model(args.filters, args.hidden)
        scale_layers(self.model, self._crops(0, 16).cpu())
        if args.device == "cpu":
            codec_conv.speed_up_narrow_convolutions(self.model)
        self.model.to(args.device)
        self.quantizer = ResidualQuantizer(8, 1024, args.hidden).to(args.device)
        self.loss = codec_loss.CodecLoss().to(args.device)
        self.parameters = {
            k: p for k, p in self.model.named_parameters() if not k.startswith("quantizer")
        }
        self.mean = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = Optimizer(self.parameters)
        self.step = 0
        self.elapsed_s = 0.0
        self.log: dict[str, float] = {}

    def _crops(self, step: int, n_crops: int) -> Tensor:
        rng = np.random.default_rng([self.args.seed, step])
        return self.corpus.crops(rng, n_crops, CROP_SAMPLES)[:, None].to(self.args.device)

    def progress(self) -> float:
        """0 at the start, 1 at the end, by steps if their number is given, else by minutes."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.elapsed_s / (60 * self.args.minutes)

    def train_step(self) -> None:
        args = self.args
        started = time.perf_counter()
        progress = min(1.0, self.progress())
        lr = args.lr * min(1.0, (self.step + 1) / 200)
        lr *= 0.01 + 0.99 * (1 - progress)
        wave = self._crops(self.step, args.batch)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + self.step)
        z = self.model.encoder(wave)
        n_used = torch.full((args.batch,), 8)
        commitment = z.new_zeros(())
        if self.step < args.warmup_steps:
            quantized = z
        else:
            if not self.quantizer.ready:
                self._start_codebooks()
            draw = torch.rand(args.batch, generator=generator)
            middle = torch.randint(2, 8, (args.batch,), generator=generator)
            n_used = torch.where(draw < 0.12, 1, torch.where(draw < 0.27, middle, 8))
            quantized, commitment = self.quantizer(z, n_used.to(z.device), generator)
        decoded = self.model.decoder(quantized)
        loss, parts = self.loss(decoded[:, 0], wave[:, 0], n_used.to(z.device))
        # The level of the latents is free; near 1 the decoder's LSTM can make use of them.
        level = z.square().mean().log().square()
        total = loss + 0.05 * commitment + 0.1 * level
        self.model.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 2.0)
        if torch.isfinite(norm):
            self.optimizer.step(lr)
        decay = min(0.998, 1 - 1 / (1 + self.step / 5))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean.values()), list(self.parameters.values()), 1 - decay
            )
        parts |= {"commit": float(commitment.detach()), "level": float(level.detach())}
        parts |= {"norm": float(norm), "lr": lr}
        for key, value in parts.items():
            self.log[key] = value + 0.98 * (self.log.get(key, value) - value)
        self.step += 1
        self.elapsed_s += time.perf_counter() - started

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        logger.info("step %d: k-means of %d codebooks", self.step, self.quantizer.n_codebooks)
        latents = [
            self.model.encoder(self._crops(10**9 + i, 32)).transpose(1, 2).flatten(0, 1)
            for i in range(24)
        ]
        self.quantizer.start(torch.cat(latents), torch.Generator().manual_seed(self.args.seed))

    # -------------------------------------------------------------- saving

    def save(self, folder: Path) -> None:
        """Write the checkpoint (safetensors + JSON), replacing the last one atomically."""
        from safetensors.torch import save_file

        tensors = {f"mean.{k}": v for k, v in self.mean.items()}
        tensors |= {f"param.{k}": v.detach() for k, v in self.parameters.items()}
        tensors |= {f"quantizer.{k}": v for k, v in self.quantizer.state_dict().items()}
        tensors |= self.optimizer.state()
        meta = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "ready": self.quantizer.ready,
            "filters": self.args.filters,
            "hidden": self.args.hidden,
        }
        path = folder / "checkpoint.safetensors"
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            str(path) + ".new",
            metadata={"state": json.dumps(meta)},
        )
        os.replace(str(path) + ".new", path)

    def resume(self, folder: Path) -> bool:
        """Continue from the checkpoint in `folder`, if there is one."""
        from safetensors import safe_open

        path = folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        with safe_open(str(path), "pt", device=self.args.device) as file:
            meta = json.loads(file.metadata()["state"])
            for name in ("filters", "hidden"):
                if meta[name] != getattr(self.args, name):
                    raise ValueError(
                        f"codec_train: {path} was trained with --{name} {meta[name]}, got "
                        f"{getattr(self.args, name)}; pass the same or another --work"
                    )
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(tensors[f"param.{k}"])
                self.mean[k].copy_(tensors[f"mean.{k}"])
        self.optimizer.load_state(tensors)
        state = {k: tensors[f"quantizer.{k}"] for k in self.quantizer.state_dict()}
        self.quantizer.load_state_dict(state)
        self.quantizer.ready = meta["ready"]
        self.step, self.elapsed_s = meta["step"], meta["elapsed_s"]
        return True

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights and the codebooks under the names of transformers' EncodecModel."""
        tensors = {k: v.cpu().clone() for k, v in self.mean.items()}
        for i in range(self.quantizer.n_codebooks):
            tensors[f"quantizer.layers.{i}.codebook.embed"] = self.quantizer.embed[i].cpu().clone()
        return tensors


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m wgpt.codec.training.train",
        description="Train a small EnCodec-architecture codec.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the model (config, weights, card)")
    add("--work", type=Path, required=True, help="folder of the corpus and the checkpoint")
    add("--data", type=Path, help="folder of recordings; without it the corpus is synthesised")
    add("--speech-minutes", type=float, default=220, help="minutes of synthetic speech")
    add("--music-minutes", type=float, default=50, help="minutes of synthetic music")
    add("--minutes", type=float, default=80, help="training time, which also sets the schedule")
    add("--steps", type=int, default=0, help="train this many steps instead of --minutes")
    add("--batch", type=int, default=8, help="crops of 0.5 s in a batch")
    add("--lr", type=float, default=0.02, help="peak step, relative to a tensor's own size")
    add("--filters", type=int, default=12, help="channels at the audio rate")
    add("--hidden", type=int, default=48, help="channels of the latent frames")
    add("--warmup-steps", type=int, default=600, help="steps before the quantiser starts")
    add("--export-minutes", type=float, default=15, help="evaluate and export this often")
    add("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice")
    add("--device", default="cpu", help="torch device")
    add("--seed", type=int, default=0)
    add("--note", default="", help="a sentence about this training for the card")
    return parser.parse_args(argv)


def export(trainer: Trainer) -> dict[str, Any]:
    started = time.perf_counter()
    figures = codec_score.export(
        trainer.args.out, trainer.model.config, trainer.weights(), trainer.corpus,
        {
            "steps": trainer.step,
            "minutes": round(trainer.elapsed_s / 60, 1),
            "batch": trainer.args.batch,
            "seed": trainer.args.seed,
            "synthetic": trainer.args.data is None,
            "note": trainer.args.note,
        },
    )  # fmt: skip
    logger.info("exported in %.0f s: %s", time.perf_counter() - started, json.dumps(figures))
    return figures


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate and export; returns the exit code."""
    args = parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "corpus.json").exists():
        if args.data:
            codec_corpus.collect(args.work, args.data)
        else:
            codec_corpus.synthesise(args.work, args.speech_minutes, args.music_minutes, args.seed)
    corpus = codec_corpus.Corpus(args.work)
    logger.info("corpus, minutes: %s", {k: round(v, 1) for k, v in corpus.minutes.items()})
    trainer = Trainer(corpus, args)
    if trainer.resume(args.work):
        logger.info("continuing at step %d", trainer.step)
    last_save, last_export = time.perf_counter(), trainer.elapsed_s
    while trainer.progress() < 1:
        trainer.train_step()
        if trainer.step % 100 == 0:
            shown = " ".join(f"{k} {v:.4g}" for k, v in trainer.log.items())
            logger.info("step %d %.1f min %s", trainer.step, trainer.elapsed_s / 60, shown)
        if time.perf_counter() - last_save > 60:
            trainer.save(args.work)
            last_save = time.perf_counter()
        if trainer.elapsed_s - last_export > 60 * args.export_minutes and trainer.quantizer.ready:
            last_export = trainer.elapsed_s
            export(trainer)
    trainer.save(args.work)
    figures = export(trainer)
    json.dump(figures, sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
