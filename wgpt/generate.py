"""Sampling: continues a recording token by token, hearing its own output through the codec.

    logits ── sample ──▶ token ──▶ streaming decoder ──▶ 320 samples ──▶ mel slice ─┐
      ▲                    └──────────── next input of the cached model ◀───────────┘

The mel slices of the prompt come from the prompt's own audio; those of the continuation can only
come from decoded tokens. The model samples codebook 0, so the sound is that of the coarsest
codebook.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgpt import audio, codec
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ, STEP_RATE_HZ, ConfigError, MelConfig, from_json
from wgpt.data.shards import Dataset
from wgpt.mel import MelFrontend
from wgpt.model import HybridModel
from wgpt.runs import Run

log = logging.getLogger(__name__)

_SAMPLE_PROMPT_S = 3.0


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: keep the k most likely; 0 keeps all.
    top_p: keep the smallest set of most likely tokens with at least this probability; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token from logits (V,), by the inverse of the cumulative distribution on the CPU.

        One uniform number a token, so the same generator gives the same tokens on every device
        up to rounding of the logits.
        """
        logits = logits.detach().double().cpu()
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        if self.temperature == 0:
            return int(logits.argmax())
        values, order = logits.div(self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            values, order = values[: self.top_k], order[: self.top_k]
        cumulative = values.softmax(0).cumsum(0)
        if self.top_p < 1:
            n_kept = int((cumulative < self.top_p).sum()) + 1
            cumulative = cumulative[:n_kept]
        place = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        return int(order[place.clamp(max=len(cumulative) - 1)])


@dataclass
class Speaker:
    """A trained model with all it needs to make sound: codec and mel front end.

    mel_source: what the model was trained on; `decoded-k` also decodes the prompt before its mel.
    """

    model: HybridModel
    codec: codec.Codec
    frontend: MelFrontend
    mel_source: str | None
    tokens: list[int] = field(default_factory=list)  # drawn in the latest generation

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Speaker:
        """From a run folder, or from a model folder that a run wrote.

        Raises ConfigError or CodecError naming the file that is missing or does not fit.
        """
        folder = Path(folder)
        if (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        model = HybridModel.from_pretrained(folder, device)
        path = folder / "config.json"
        facts = json.loads(path.read_text())
        try:
            mel = from_json(MelConfig, facts["mel"], str(path))
            source, identity = facts["codec"]["source"], facts["codec"]["identity"]
            mel_source = facts["mel_source"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: was not written by `wgpt train`: no {error}") from None
        if mel_source and mel_source.startswith("leaky"):
            raise ConfigError(
                f"{path}: this model was trained on {mel_source}, slices that see past their "
                "token; while generating there is no future to see. Train on mel source wave"
            )
        loaded = codec.load(source, device=device)
        if loaded.identity["sha256"] != identity["sha256"]:
            raise codec.CodecError(
                f"codec: {source} must have the weights the model was trained with, sha256 "
                f"{identity['sha256']}, got {loaded.identity['sha256']}"
            )
        return cls(model, loaded, MelFrontend(mel), mel_source)

    @torch.inference_mode()
    def stream(
        self,
        prompt: np.ndarray | Tensor | None,
        n_steps: int,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yields n_steps chunks of float32 (320,) samples that continue the prompt.

        prompt: float32 (L,) at 24 kHz, cropped to whole steps from its end; None starts a clip.
        """
        sampling = sampling or Sampling()
        generator = torch.Generator().manual_seed(seed)
        decoder = self.codec.stream_decoder(1)
        wave, codes = self._read_prompt(prompt)
        if codes.shape[1]:
            decoder.push(codes)
        self.tokens = []
        cache = self.model.new_cache()
        logits = self._prefill(wave, codes, cache)
        history = wave[-self._history_samples() :]
        device = logits.device
        for step in range(n_steps):
            token = sampling.draw(logits, generator)
            self.tokens.append(token)
            chunk = decoder.push(torch.tensor([[token]], device=device))
            yield chunk.cpu().numpy()
            if step + 1 == n_steps:
                return
            history = torch.cat([history, chunk])[-self._history_samples() :]
            frames = self._slices(history, 1)
            logits = self.model(torch.tensor([[token]], device=device), frames, cache)[0, -1]

    def continue_wave(
        self,
        prompt: np.ndarray | Tensor | None,
        seconds: float,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The continuation as one float32 array of `seconds` at 24 kHz (whole steps)."""
        n_steps = round(seconds * STEP_RATE_HZ)
        if n_steps < 1:
            raise ConfigError(f"seconds must be at least one step (1/75 s), got {seconds}")
        return np.concatenate(list(self.stream(prompt, n_steps, sampling, seed)))

    def _read_prompt(self, prompt: np.ndarray | Tensor | None) -> tuple[Tensor, Tensor]:
        """The prompt as heard by the mel branch, (L,), and its coarse codes (1, T)."""
        wave = torch.as_tensor(prompt if prompt is not None else np.zeros(0, np.float32)).float()
        wave = wave[len(wave) % HOP_SAMPLES :].to(self.codec.device)
        if not len(wave):
            return wave, torch.zeros(1, 0, dtype=torch.int64, device=wave.device)
        codes = self.codec.encode(wave)
        if self.mel_source and self.mel_source.startswith("decoded-"):
            wave = self.codec.decode(codes[: int(self.mel_source.removeprefix("decoded-"))])
        return wave, codes[:1]

    def _prefill(self, wave: Tensor, codes: Tensor, cache: Any) -> Tensor:
        """Logits (V,) of the first token after the prompt."""
        device = next(self.model.parameters()).device
        bos = torch.tensor([[self.model.config.bos_token]], device=device)
        tokens = torch.cat([bos, codes.to(device)], dim=1)
        frames = None
        if self.model.config.mel_dim:
            silence = self.frontend.silence[None, None].expand(
                1, self.model.config.frames_per_step, -1
            )
            frames = torch.cat([silence.to(wave.device), self.frontend(wave[None])], 1).to(device)
        return self.model(tokens, frames, cache)[0, -1]

    def _slices(self, history: Tensor, n_steps: int) -> Tensor | None:
        """Frames (1, n*r, M) of the newest steps, from the newest samples."""
        if not self.model.config.mel_dim:
            return None
        first = len(history) // HOP_SAMPLES - n_steps
        return self.frontend.slices_from(history, first, n_steps)[None]

    def _history_samples(self) -> int:
        """Whole steps that cover the longest window of the newest step."""
        config = self.frontend.config
        return HOP_SAMPLES * (math.ceil(config.window_samples / HOP_SAMPLES) + 1)


def sample_into(run: Run, model: HybridModel, data: Dataset, step: int) -> Path:
    """Writes RUN/samples/step-N.wav: decoded validation prompt, then the model's continuation."""
    loaded = run.codec(str(next(model.parameters()).device))
    prompt = loaded.decode(
        data.split("valid").clip(0)[0][:, : round(_SAMPLE_PROMPT_S * STEP_RATE_HZ)]
    )
    source = run.config.mel_source if model.config.mel_dim else None
    was_training = model.training
    speaker = Speaker(model.eval(), loaded, MelFrontend(data.mel_config), source)
    new = speaker.continue_wave(prompt, run.config.sample_s, Sampling(top_k=100), seed=step)
    model.train(was_training)
    path = run.folder / "samples" / f"step-{step:08d}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, np.concatenate([prompt.cpu().numpy(), new]))
    return path


# -- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt generate`."""
    parser.add_argument("run", metavar="RUN", help="run folder, or its model folder")
    parser.add_argument("--prompt", metavar="AUDIO", help="recording to continue")
    parser.add_argument("--seconds", type=float, required=True, help="length of the continuation")
    parser.add_argument("--out", required=True, metavar="AUDIO", help="file to write (.wav, ...)")
    parser.add_argument("--with-prompt", action="store_true", help="write the prompt in front")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: most likely (default 1)")
    parser.add_argument("--top-k", type=int, default=100, help="0: all (default 100)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: all (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same samples (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`wgpt generate`."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    torch.set_num_threads(1)  # a step is a few thousand small operations: threads only wait
    speaker = Speaker.open(args.run, args.device)
    prompt = audio.read(args.prompt) if args.prompt else np.zeros(0, np.float32)
    wave = speaker.continue_wave(prompt, args.seconds, sampling, args.seed)
    if args.with_prompt:
        wave = np.concatenate([prompt, wave])
    audio.write(args.out, wave)
    if args.json:
        facts = {"out": args.out, "seconds": len(wave) / SAMPLE_RATE_HZ, "tokens": speaker.tokens}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
