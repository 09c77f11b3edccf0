"""One generation under way: it prefills from a prompt and samples on, step by step.

    logits ── sample ──▶ tokens ──▶ streaming decoder ──▶ 320 samples ──▶ mel slice ─┐
      ▲                    └──────────── next input of the cached model ◀────────────┘

The mel slices of the prompt come from the prompt's own audio; those of the continuation can only
come from decoded tokens. All work is done in fixed pieces (8 steps of the prompt, single steps
after it), so the samples do not depend on how the prompt was cut or how the sound is collected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wgpt.audio.mel_stream import MelStream
from wgpt.config import HOP_SAMPLES
from wgpt.errors import ConfigError
from wgpt.generation.prompt import Wave, checked_wave
from wgpt.generation.sampling import Sampler, Sampling
from wgpt.model import Cache

if TYPE_CHECKING:
    from wgpt.generation.generator import AudioGenerator

# Steps of a prompt that are encoded and read together. At the prompt's end at most one step fewer
# is left to do; eight rows cost a GEMM of this size little more than one.
PREFILL_STEPS = 8


@dataclass(frozen=True, eq=False)
class Step:
    """One step (1/75 s) of a continuation.

    wave: float32 (320,) at 24 kHz; tokens: from coarse to fine; entropy_nats: entropy of the
    distribution the coarse token was drawn from, after temperature, top-k and top-p; ended: the
    model ended the clip before this step, which is what a batch gives until all items have ended;
    gain: the prompt's, which was undone in `wave`.
    """

    wave: np.ndarray
    tokens: tuple[int, ...]
    entropy_nats: float
    ended: bool = False
    gain: float = 1.0

    @property
    def made(self) -> np.ndarray:
        """The wave at the level of the training data, as the model made it."""
        return self.wave * np.float32(self.gain)


class GenerationState:
    """State of one generation: a prompt as it arrives, then what the model samples.

        state = generator.new_state()
        state.feed(chunk)                    # any number of times, any lengths
        for (step,) in state.steps(None):    # for ever; the state is used up
            play(step.wave)

    The result depends on the samples fed, not on how they were cut. A last incomplete step
    (fewer than 320 samples) is ignored.
    """

    def __init__(self, generator: AudioGenerator, gain: float = 1.0) -> None:
        if not (math.isfinite(gain) and gain > 0):
            raise ConfigError(f"generate: a prompt's gain must be positive and finite, got {gain}")
        self.generator = generator
        self._gains = torch.tensor([gain])  # of each of the B items
        self._encoder = generator.codec.stream_encoder()
        self._decoder = generator.codec.stream_decoder(generator.n_codebooks)
        # The mel branch reads this decoder's sound; None: the prompt's, then _decoder's.
        self._mel_decoder = None
        if generator.model.config.mel_dim and generator.n_mel_codebooks:
            self._mel_decoder = self._decoder
            if generator.n_mel_codebooks != generator.n_codebooks:
                # Its state goes from the prompt into the continuation, which may have fewer.
                self._mel_decoder = generator.codec.stream_decoder(generator.n_mel_codebooks)
        self._mel = MelStream(generator.frontend)
        self._cache = generator.model.new_cache()
        self._waiting = torch.zeros(0)  # fed, but not yet a block
        with torch.inference_mode():
            shape = (1, generator.n_codebooks, 1)
            self._advance(torch.full(shape, generator.model.config.bos_token), None)

    def feed(self, wave: Wave) -> None:
        """The next samples of the prompt, float (L,) at 24 kHz, any L."""
        self._waiting = torch.cat((self._waiting, checked_wave(wave) * self._gains))
        n_block = PREFILL_STEPS * HOP_SAMPLES
        n_whole = len(self._waiting) // n_block * n_block
        for block in self._waiting[:n_whole].split(n_block):
            self._prefill(block)
        self._waiting = self._waiting[n_whole:].clone()  # a view would keep all of wave alive

    @torch.inference_mode()
    def _prefill(self, wave: Tensor) -> None:
        if not len(wave):
            return
        generator = self.generator
        wave = wave[None].to(generator.codec.device)
        codes = self._encoder.push(wave)  # (1, K, n)
        decoded = self._decoder.push(codes[:, : generator.n_codebooks])
        if self._mel_decoder is not None:
            wave = decoded
            if self._mel_decoder is not self._decoder:
                wave = self._mel_decoder.push(codes[:, : generator.n_mel_codebooks])
        self._advance(codes, wave)

    def _advance(self, codes: Tensor, wave: Tensor | None) -> None:
        """Reads codes (B, K, n) and the sound read with them, (B, n * 320); None before a clip."""
        generator, config = self.generator, self.generator.model.config
        device = next(generator.model.parameters()).device
        frames = None
        if config.mel_dim:
            if wave is None:
                frames = generator.frontend.silence.expand(1, config.frames_per_step, -1)
            else:
                frames = self._mel.push(wave)
            frames = frames.to(device)
        n_read = generator.model.n_codebooks_read
        tokens = codes[:, 0] if n_read == 1 else codes[:, :n_read].transpose(1, 2)
        self._state = generator.inference_model.hidden(tokens.to(device), frames, self._cache)

    @classmethod
    def join(cls, parts: list[GenerationState]) -> GenerationState:
        """One state whose batch is that of the given ones, which were fed equally much."""
        for part in parts:
            part._finish()
        first = parts[0]
        joined = object.__new__(cls)
        joined.generator, joined._waiting = first.generator, first._waiting
        joined._cache = Cache.join([part._cache for part in parts])
        joined._state = torch.cat([part._state for part in parts])
        joined._gains = torch.cat([part._gains for part in parts])
        joined._mel, joined._encoder, joined._decoder = first._mel, first._encoder, first._decoder
        joined._mel_decoder = first._mel_decoder
        if first._cache.position > 1:
            joined._mel = MelStream.join([part._mel for part in parts])
            joined._decoder = first._decoder.join([part._decoder for part in parts])
            if first._mel_decoder is first._decoder:
                joined._mel_decoder = joined._decoder
            elif first._mel_decoder is not None:
                joined._mel_decoder = first._mel_decoder.join(
                    [p._mel_decoder for p in parts if p._mel_decoder]
                )
        return joined

    def _finish(self) -> None:
        """The prompt is over: prefills what waits, but for an incomplete step."""
        n_whole = len(self._waiting) // HOP_SAMPLES * HOP_SAMPLES
        self._prefill(self._waiting[:n_whole])
        self._waiting = self._waiting[:0]

    def steps(
        self,
        n_steps: int | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] = (0,),
    ) -> Iterator[list[Step]]:
        """Yields n_steps lists (None: for ever) of one step for each of the B items.

        seeds: one for each item; B is 1 but for what `join` returns.

        Ends when every item has ended its clip. A model without an attention window (`load` gives
        it one) grows its cache and the cost of a step with the stream.
        """
        if len(seeds) != len(self._state):
            raise ConfigError(
                f"generate: there must be one seed for each of {len(self._state)} items, got "
                f"{len(seeds)} seeds"
            )
        steps = self.sample(n_steps, Sampler(sampling or Sampling(), seeds))
        return itertools.takewhile(lambda items: not all(item.ended for item in items), steps)

    @torch.inference_mode()
    def sample(self, n_steps: int | None, sampler: Sampler) -> Iterator[list[Step]]:
        """`steps` with a Sampler for its B items; does not end with their clips."""
        self._finish()
        model, codec_device = self.generator.inference_model, self.generator.codec.device
        gains = self._gains.tolist()
        for n_done in itertools.count(1):
            coarse = sampler(model.logits(self._state), self.generator.end_token)
            entropies, ended = sampler.entropy_nats.tolist(), sampler.ended.tolist()
            fine = model.sample_fine(self._state, coarse, sampler.fine)
            codes = torch.cat((coarse[:, None], fine), 1)[:, :, None].to(codec_device)
            wave = self._decoder.push(codes)
            out = (wave.cpu() / self._gains[:, None]).numpy()
            rows = zip(out, codes[:, :, 0].tolist(), entropies, ended, gains, strict=True)
            yield [Step(samples, tuple(chosen), *facts) for samples, chosen, *facts in rows]
            if n_done == n_steps:
                return
            if self._mel_decoder is not None and self._mel_decoder is not self._decoder:
                wave = self._mel_decoder.push(codes[:, : self.generator.n_mel_codebooks])
            self._advance(codes, wave)
