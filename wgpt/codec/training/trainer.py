"""Trains a small EnCodec on a corpus, resumable to the bit.

What made it work at this size (each found necessary in trials that collapsed without it): layer
scales set from data before the first step, losses that put the waveform first, short crops, a few
hundred steps without the quantiser, codebooks started by k-means on real residuals, and
orthogonalised steps (Muon) for every weight matrix.

Every draw comes from a generator seeded by (seed, step), so a resumed run sees what an
uninterrupted one sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wgpt.codec.network import Architecture, Lstm, decoder_layers, encoder_layers
from wgpt.codec.training.corpus import Corpus
from wgpt.codec.training.forward import Forward
from wgpt.codec.training.initial import draw_parameters, scale_layers
from wgpt.codec.training.loss import CodecLoss
from wgpt.codec.training.optimizer import Optimizer
from wgpt.codec.training.quantizer import ResidualQuantizer
from wgpt.codec.weights import CodecWeights
from wgpt.commits import ALWAYS, committing, state_of
from wgpt.config import HOP_SAMPLES, require
from wgpt.errors import CheckpointError, CodecError, TrainError
from wgpt.ops.runtime import environment, warn_of_changes

CROP_FRAMES = 38  # about half a second
START_BATCHES = 24  # of 32 crops, whose latents the codebooks start from
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CodecTrainConfig:
    """Settings of a training; all but the two counts of steps are fixed once it has begun."""

    n_steps: int = 20_000
    decay_steps: int = 4_000  # at the end, over which the step size falls to a hundredth
    batch: int = 16
    lr: float = 0.02  # peak step, relative to a tensor's own size
    filters: int = 16  # channels at the audio rate
    hidden: int = 64  # channels of the latent frames
    warmup_steps: int = 800  # before the quantiser starts
    dtype: str = "bfloat16"
    seed: int = 0
    init_sha256: str | None = None  # of the weights it starts from

    def __post_init__(self) -> None:
        def check(flag: str, rule: str, value: object, holds: bool) -> None:
            require("codec-train", flag, rule, value, holds)

        # Above any codec (the released one: 32 filters, 128 hidden), below what no machine holds.
        check("--filters", "in [2, 512]", self.filters, 2 <= self.filters <= 512)
        check("--hidden", "in [1, 4096]", self.hidden, 1 <= self.hidden <= 4096)
        check("--batch", "in [1, 4096]", self.batch, 1 <= self.batch <= 4096)
        check("--steps", "at least 1", self.n_steps, self.n_steps >= 1)
        check("--decay-steps", "at least 0", self.decay_steps, self.decay_steps >= 0)
        check("--lr", "in (0, 1]", self.lr, 0 < self.lr <= 1)
        check("--warmup-steps", "at least 0", self.warmup_steps, self.warmup_steps >= 0)
        check("--seed", "in [0, 2^32)", self.seed, 0 <= self.seed < 1 << 32)
        check("--dtype", f"one of {', '.join(DTYPES)}", self.dtype, self.dtype in DTYPES)

    def architecture(self) -> Architecture:
        """A causal 24 kHz EnCodec with 75 frames/s and 8 codebooks of 1024.

        The encoder strides by 8 first: the audio-rate layers, which cost most of the time on a
        CPU and hold few of the parameters, are then only one stage on each side.
        """
        return Architecture(
            num_filters=self.filters,
            hidden_size=self.hidden,
            codebook_dim=self.hidden,
            num_lstm_layers=1,
            upsampling_ratios=(2, 4, 5, 8),
            last_kernel_size=5,
            use_conv_shortcut=False,
            pad_mode="constant",
            target_bandwidths=(0.75, 1.5, 3.0, 6.0),
        )


def check_init(init: CodecWeights, config: CodecTrainConfig) -> None:
    """Refuse weights to start from that are not of the config's architecture.

    Raises:
        CodecError: says which flags fit them, if any do.
    """
    own = init.architecture
    if own == config.architecture():
        return
    fitting = replace(config, filters=own.num_filters, hidden=own.hidden_size)
    way = "pass mini, mini-v1 or a codec that codec-train wrote"
    if own == fitting.architecture():
        way = f"pass --filters {own.num_filters} --hidden {own.hidden_size}"
    raise CodecError(
        f"codec-train: --init {init.name} must have the architecture of this training, "
        f"{config.filters} filters and hidden size {config.hidden}, got {own.num_filters} and "
        f"{own.hidden_size}; {way}"
    )


class Trainer:
    """The network, its quantiser, the optimiser and a running mean of the weights.

    Attributes:
        step: steps done.
        log: running means of the parts of the loss.
    """

    def __init__(
        self, corpus: Corpus, config: CodecTrainConfig, init: CodecWeights | None = None
    ) -> None:
        self.corpus, self.config, self._init = corpus, config, init
        a = self.architecture = config.architecture()
        self.parameters = draw_parameters(a, torch.Generator().manual_seed(config.seed))
        if init is None:
            scale_layers(a, self.parameters, self._crops(0, 16))
        else:
            for k, p in self.parameters.items():
                p.data = init.tensors[k].clone()
        dtype = DTYPES[config.dtype]
        self._encoder = Forward(encoder_layers(a), CROP_FRAMES * HOP_SAMPLES, dtype)
        self._decoder = Forward(decoder_layers(a), CROP_FRAMES, dtype)
        self.quantizer = ResidualQuantizer(a.n_codebooks, a.codebook_size, a.hidden_size)
        self.loss = CodecLoss()
        self.mean = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = Optimizer(self.parameters)
        self.step = 0
        self.log: dict[str, float] = {}

    def _crops(self, step: int, n_crops: int) -> Tensor:
        """(B, L, 1), the crops of a step."""
        rng = np.random.default_rng([self.config.seed, step])
        return self.corpus.crops(rng, n_crops, CROP_FRAMES * HOP_SAMPLES)[:, :, None]

    def _run(self, forward: Forward, x: Tensor) -> Tensor:
        matrices = forward.matrices(self.parameters)
        x = x.to(forward.dtype)
        for layer in forward.layers:
            if isinstance(layer, Lstm):
                x = forward.lstm(layer, x, self.parameters)
            else:
                x = forward.convolve([layer], x, matrices)
        return x.float()

    def learning_rate(self) -> float:
        """Constant after a warm-up, then linear to a hundredth over the last decay_steps."""
        c = self.config
        left = (c.n_steps - self.step) / max(c.decay_steps, 1)
        return c.lr * min(1.0, (self.step + 1) / 200) * max(0.01, min(1.0, left))

    def train_step(self) -> None:
        """One step: draw crops, encode, quantise by a drawn number of codebooks, decode, learn."""
        config, n_codebooks = self.config, self.architecture.n_codebooks
        wave = self._crops(self.step, config.batch)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        z = self._run(self._encoder, wave)  # (B, T, E)
        n_used = torch.full((config.batch,), n_codebooks)
        commitment = z.new_zeros(())
        quantized = z
        first = config.warmup_steps if self._init is None else 0  # trained codebooks need no start
        if self.step >= first:
            if self.step == first:
                self._start_codebooks()
            draw = torch.rand(config.batch, generator=generator)
            middle = torch.randint(2, n_codebooks, (config.batch,), generator=generator)
            n_used = torch.where(draw < 0.12, 1, torch.where(draw < 0.27, middle, n_codebooks))
            quantized, commitment = self.quantizer(z, n_used, generator)
        decoded = self._run(self._decoder, quantized)
        loss, parts = self.loss(decoded[:, :, 0], wave[:, :, 0], n_used)
        # The level of the latents is free; near 1 the decoder's LSTM can make use of them.
        level = z.square().mean().log().square()
        for p in self.parameters.values():
            p.grad = None
        (loss + 0.05 * commitment + 0.1 * level).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 2.0)
        if torch.isfinite(norm):
            self.optimizer.step(self.learning_rate())
        decay = min(0.998, 1 - 1 / (1 + self.step / 5))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean.values()), list(self.parameters.values()), 1 - decay
            )
        parts |= {"commit": float(commitment.detach()), "level": float(level.detach())}
        parts |= {"norm": float(norm)}
        for key, value in parts.items():
            if not math.isfinite(value):  # such a step teaches nothing, and is left out
                continue
            self.log[key] = value + 0.98 * (self.log.get(key, value) - value)
        self.step += 1

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        latents = [
            self._run(self._encoder, self._crops(10**9 + i, 32)).flatten(0, 1)
            for i in range(START_BATCHES)
        ]
        if self._init is None:
            generator = torch.Generator().manual_seed(self.config.seed)
            self.quantizer.start(torch.cat(latents), generator)
        else:
            self.quantizer.adopt(self._init.codebooks(), torch.cat(latents))

    def commit(self, folder: Path) -> None:
        """Commits the step to folder/step-N.

        Raises TrainError where a number is not finite, OSError.
        """
        weights = {f"mean.{k}": v for k, v in self.mean.items()}
        weights |= {f"param.{k}": v.detach() for k, v in self.parameters.items()}
        weights |= {f"quantizer.{k}": v for k, v in self.quantizer.state_dict().items()}
        optimizer = self.optimizer.state()
        for name, value in {**weights, **optimizer}.items():
            if not bool(torch.isfinite(value).all()):
                raise TrainError(
                    f"codec-train: step {self.step}: {name} is not finite; the step is not "
                    "committed. Begin again at a lower --lr, in another --work"
                )
        state = {
            "data": self.corpus.sha256,
            "config": asdict(self.config),
            "environment": environment(),
            "log": self.log,
        }
        n_bytes = sum(value.nbytes for value in (*weights.values(), *optimizer.values()))
        with committing(folder, self.step, state, n_bytes) as temporary:
            for name, tensors in zip(ALWAYS, (weights, optimizer), strict=True):
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name)

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a whole checkpoint.

        Raises CheckpointError where it is of another corpus or other settings.
        """
        state = state_of(checkpoint)
        self._check_same(checkpoint, state)
        weights, optimizer = (load_file(checkpoint / name) for name in ALWAYS)
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(weights[f"param.{k}"])
                self.mean[k].copy_(weights[f"mean.{k}"])
        self.optimizer.load_state(optimizer)
        self.quantizer.load_state_dict(
            {k: weights[f"quantizer.{k}"] for k in self.quantizer.state_dict()}
        )
        self.step, self.log = state["step"], state["log"]
        warn_of_changes(state["environment"], self.step)

    def _check_same(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        if state.get("data") != self.corpus.sha256:
            raise CheckpointError(
                f"codec-train: {checkpoint} was trained on another corpus than that of --work now; "
                "choose another --work"
            )
        then, now = state["config"], asdict(self.config)
        for name in sorted(now.keys() - {"n_steps", "decay_steps"}):
            if now[name] != then.get(name):
                flag = "--" + name.removesuffix("_sha256").replace("_", "-")
                raise CheckpointError(
                    f"codec-train: {flag} must be that of {checkpoint}, {then.get(name)}, got "
                    f"{now[name]}; to train another codec, choose another --work"
                )
        if self.config.n_steps < state["step"]:
            raise CheckpointError(
                f"codec-train: --steps must be at least {state['step']}, the steps that "
                f"{checkpoint.parents[1]} has done, got {self.config.n_steps}"
            )

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights and the codebooks under the names of transformers' EncodecModel."""
        tensors = {k: v.clone() for k, v in self.mean.items()}
        for i in range(self.quantizer.n_codebooks):
            tensors[f"quantizer.layers.{i}.codebook.embed"] = self.quantizer.embed[i].clone()
        return tensors
