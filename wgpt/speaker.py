"""A trained model that speaks: it hears a prompt as it arrives and goes on, step by step.

    logits ── draw ──▶ tokens ──▶ streaming decoder ──▶ 320 samples ──▶ mel slice ─┐
      ▲                   └──────────── next input of the cached model ◀───────────┘

The mel slices of the prompt come from the prompt's own audio; those of the continuation can only
come from decoded tokens. All work is done in fixed pieces (8 steps of the prompt, single steps
after it), so the samples do not depend on how the prompt was cut or how the sound is collected.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from wgpt import codec
from wgpt.config import HOP_SAMPLES, STEP_RATE_HZ, ConfigError, MelConfig, from_json
from wgpt.mel import MelFrontend, MelStream
from wgpt.model import Cache, HybridModel
from wgpt.model.packed import PackedModel
from wgpt.sampling import Draw, Sampling
from wgpt.starter import model_folder

Wave: TypeAlias = np.ndarray | Tensor

# Steps of a prompt that are encoded and read together. At the prompt's end at most one step fewer
# is left to do; eight rows cost a matrix product of this size little more than one.
HEAR_STEPS = 8


@dataclass(frozen=True, eq=False)
class Step:
    """One step (1/75 s) of a continuation.

    wave: float32 (320,) at 24 kHz; tokens: from coarse to fine; entropy_nats: entropy of the
    distribution the coarse token was drawn from, after temperature, top-k and top-p.
    """

    wave: np.ndarray
    tokens: tuple[int, ...]
    entropy_nats: float


@dataclass
class Speaker:
    """A trained model with all it needs to make sound: codec and mel front end.

    mel_source: what the model was trained on; `decoded-k` hears k codebooks, of the prompt too.
    """

    model: HybridModel
    codec: codec.Codec
    frontend: MelFrontend
    mel_source: str | None

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Speaker:
        """From a run folder, a model folder that a run wrote, or `starter`, the package's model.

        Raises ConfigError or CodecError naming the file that is missing or does not fit.
        """
        folder = model_folder(folder)
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

    @functools.cached_property
    def packed(self) -> PackedModel:
        """The model as generation runs it: a copy of the weights as they are at first use."""
        return PackedModel(self.model)

    @property
    def n_codebooks(self) -> int:
        """Codebooks that are sampled and decoded: the coarse one and those of a fine head."""
        return 1 + self.packed.n_fine

    @property
    def n_heard(self) -> int:
        """Codebooks whose sound the mel branch hears; 0: the prompt's wave, then what is said."""
        if not self.mel_source or not self.mel_source.startswith("decoded-"):
            return 0
        return int(self.mel_source.removeprefix("decoded-"))

    def listen(self) -> Continuation:
        """A continuation that has heard nothing yet."""
        return Continuation(self)

    def stream(
        self,
        prompt: Wave | None = None,
        n_steps: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[Step]:
        """Yields n_steps steps (None: for ever) that continue the prompt, as they are made.

        prompt: float (L,) at 24 kHz, cropped to whole steps from its end; None starts a clip.
        Raises ConfigError for a prompt that is not finite or not (L,).
        """
        batches = self.stream_batch([prompt], n_steps, sampling, [seed])
        return (steps[0] for steps in batches)

    def stream_batch(
        self,
        prompts: Sequence[Wave | None],
        n_steps: int | None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] = (0,),
    ) -> Iterator[list[Step]]:
        """Yields a list of one step for each item, item i continuing prompts[i] with seeds[i].

        One prompt and several seeds give as many continuations of it. Prompts may differ in
        length. Raises ConfigError, at the call, as `stream`, and when there are not as many seeds
        as prompts.
        """
        if (len(prompts) != len(seeds) and len(prompts) != 1) or not seeds:
            raise ConfigError(
                f"generate: there must be one seed for each of {len(prompts)} prompts, got "
                f"{len(seeds)} seeds"
            )
        waves = [_checked(p if p is not None else np.zeros(0, np.float32)) for p in prompts]
        n_each = len(seeds) // len(prompts)  # items of a prompt
        places: dict[int, list[int]] = {}  # prompts of equal length go in step, in one batch
        for i in range(len(seeds)):
            places.setdefault(len(waves[i // n_each]) // HOP_SAMPLES, []).append(i)
        draws = [Draw(sampling or Sampling(), [seeds[i] for i in at]) for at in places.values()]

        def batches() -> Iterator[list[Step]]:
            heard = [self.listen() for _ in waves]
            for continuation, wave in zip(heard, waves, strict=True):
                continuation.hear(wave[len(wave) % HOP_SAMPLES :])
            groups = [
                Continuation.join([heard[i // n_each] for i in at]).speak(n_steps, draw)
                for at, draw in zip(places.values(), draws, strict=True)
            ]
            for parts in zip(*groups, strict=True):
                steps = {
                    i: step
                    for at, part in zip(places.values(), parts, strict=True)
                    for i, step in zip(at, part, strict=True)
                }
                yield [steps[i] for i in range(len(seeds))]

        return batches()

    def continue_wave(
        self,
        prompt: Wave | None,
        seconds: float,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The continuation as one float32 array of `seconds` at 24 kHz (whole steps)."""
        steps = self.stream(prompt, n_steps_of(seconds), sampling, seed)
        return np.concatenate([step.wave for step in steps])


class Continuation:
    """A prompt as it arrives, then what the model makes of it.

        heard = speaker.listen()
        heard.hear(chunk)                    # any number of times, any lengths
        for (step,) in heard.steps(None):    # for ever; heard is used up
            play(step.wave)

    The result depends on the samples heard, not on how they were cut. A last incomplete step
    (fewer than 320 samples) is not heard.
    """

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self._encoder = speaker.codec.stream_encoder()
        self._decoder = speaker.codec.stream_decoder(speaker.n_codebooks)
        # The mel branch hears this decoder; None: the prompt, then _decoder.
        self._heard = None
        if speaker.model.config.mel_dim and speaker.n_heard:
            self._heard = self._decoder
            if speaker.n_heard != speaker.n_codebooks:
                # Its state goes from the prompt into the continuation, which may have fewer.
                self._heard = speaker.codec.stream_decoder(speaker.n_heard)
        self._mel = MelStream(speaker.frontend)
        self._cache = speaker.model.new_cache()
        self._waiting = torch.zeros(0)  # heard, but not yet a block
        with torch.inference_mode():
            shape = (1, speaker.n_codebooks, 1)
            self._advance(torch.full(shape, speaker.model.config.bos_token), None)

    def hear(self, wave: Wave) -> None:
        """The next samples of the prompt, float (L,) at 24 kHz, any L."""
        self._waiting = torch.cat((self._waiting, _checked(wave)))
        n_block = HEAR_STEPS * HOP_SAMPLES
        n_whole = len(self._waiting) // n_block * n_block
        for block in self._waiting[:n_whole].split(n_block):
            self._hear(block)
        self._waiting = self._waiting[n_whole:].clone()  # a view would keep all of wave alive

    @torch.inference_mode()
    def _hear(self, wave: Tensor) -> None:
        if not len(wave):
            return
        speaker = self.speaker
        wave = wave[None].to(speaker.codec.device)
        codes = self._encoder.push(wave)  # (1, K, n)
        said = self._decoder.push(codes[:, : speaker.n_codebooks])
        if self._heard is not None:
            wave = said
            if self._heard is not self._decoder:
                wave = self._heard.push(codes[:, : speaker.n_heard])
        self._advance(codes, wave)

    def _advance(self, codes: Tensor, wave: Tensor | None) -> None:
        """Reads codes (B, K, n) and the sound heard with them, (B, n * 320); None before a clip."""
        speaker, config = self.speaker, self.speaker.model.config
        device = next(speaker.model.parameters()).device
        frames = None
        if config.mel_dim:
            if wave is None:
                frames = speaker.frontend.silence.expand(1, config.frames_per_step, -1)
            else:
                frames = self._mel.push(wave)
            frames = frames.to(device)
        n_read = speaker.model.n_codebooks_read
        tokens = codes[:, 0] if n_read == 1 else codes[:, :n_read].transpose(1, 2)
        self._state = speaker.packed.hidden(tokens.to(device), frames, self._cache)

    @classmethod
    def join(cls, parts: list[Continuation]) -> Continuation:
        """One continuation whose batch is that of the given ones, which heard equally much."""
        for part in parts:
            part._finish()
        first = parts[0]
        joined = object.__new__(cls)
        joined.speaker, joined._waiting = first.speaker, first._waiting
        joined._cache = Cache.join([part._cache for part in parts])
        joined._state = torch.cat([part._state for part in parts])
        joined._mel, joined._encoder, joined._decoder = first._mel, first._encoder, first._decoder
        joined._heard = first._heard
        if first._cache.position > 1:
            joined._mel = MelStream.join([part._mel for part in parts])
            joined._decoder = first._decoder.join([part._decoder for part in parts])
            if first._heard is first._decoder:
                joined._heard = joined._decoder
            elif first._heard is not None:
                joined._heard = first._heard.join([p._heard for p in parts if p._heard])
        return joined

    def _finish(self) -> None:
        """The prompt is over: hears what waits, but for an incomplete step."""
        n_whole = len(self._waiting) // HOP_SAMPLES * HOP_SAMPLES
        self._hear(self._waiting[:n_whole])
        self._waiting = self._waiting[:0]

    def steps(
        self,
        n_steps: int | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] = (0,),
    ) -> Iterator[list[Step]]:
        """Yields n_steps lists (None: for ever) of one step for each of the B items.

        seeds: one for each item; B is 1 but for what `join` returns.

        Without a sliding window the cache and the cost of a step grow with the stream, and after
        the length trained on the model is at positions it never saw.
        """
        if len(seeds) != len(self._state):
            raise ConfigError(
                f"generate: there must be one seed for each of {len(self._state)} items, got "
                f"{len(seeds)} seeds"
            )
        return self.speak(n_steps, Draw(sampling or Sampling(), seeds))

    @torch.inference_mode()
    def speak(self, n_steps: int | None, draw: Draw) -> Iterator[list[Step]]:
        """`steps` with a Draw for its B items."""
        self._finish()
        packed, codec_device = self.speaker.packed, self.speaker.codec.device
        for n_done in itertools.count(1):
            coarse = draw(packed.logits(self._state))
            entropies = draw.entropy_nats.tolist()
            fine = packed.sample_fine(self._state, coarse, draw.fine)
            codes = torch.cat((coarse[:, None], fine), 1)[:, :, None].to(codec_device)
            wave = self._decoder.push(codes)
            rows = zip(wave.cpu().numpy(), codes[:, :, 0].tolist(), entropies, strict=True)
            yield [Step(samples, tuple(chosen), entropy) for samples, chosen, entropy in rows]
            if n_done == n_steps:
                return
            if self._heard is not None and self._heard is not self._decoder:
                wave = self._heard.push(codes[:, : self.speaker.n_heard])
            self._advance(codes, wave)


def n_steps_of(seconds: float, name: str = "seconds") -> int:
    """Whole steps in a time. Raises ConfigError when it is not finite or shorter than a step."""
    if not (math.isfinite(seconds) and round(seconds * STEP_RATE_HZ) >= 1):
        raise ConfigError(f"{name} must be at least one step (1/75 s), got {seconds}")
    return round(seconds * STEP_RATE_HZ)


def _checked(wave: Wave) -> Tensor:
    """float32 (L,) on the CPU."""
    wave = torch.as_tensor(wave).detach().cpu()
    if wave.dim() != 1 or not wave.is_floating_point():
        raise ConfigError(
            f"prompt must be floating point (L,) at 24 kHz, got {wave.dtype} {tuple(wave.shape)}"
        )
    if not bool(torch.isfinite(wave).all()):
        raise ConfigError("prompt must be finite, got NaN or infinite samples")
    return wave.float()
