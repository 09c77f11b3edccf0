"""A trained model that makes sound: it prefills from a prompt and samples on, step by step.

    logits ── sample ──▶ tokens ──▶ streaming decoder ──▶ 320 samples ──▶ mel slice ─┐
      ▲                    └──────────── next input of the cached model ◀────────────┘

The mel slices of the prompt come from the prompt's own audio; those of the continuation can only
come from decoded tokens. All work is done in fixed pieces (8 steps of the prompt, single steps
after it), so the samples do not depend on how the prompt was cut or how the sound is collected.

A prompt is brought to the loudness that the training data had, so that a quiet one is heard as
training heard its like; what the model makes goes out at the prompt's own level again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wgpt import codec
from wgpt.audio.loudness import LoudnessMeter, gain_db
from wgpt.audio.mel import MelFrontend
from wgpt.audio.mel_stream import MelStream
from wgpt.config import HOP_SAMPLES, STEP_RATE_HZ
from wgpt.errors import ConfigError
from wgpt.generation.prompt import Prompt, Wave, checked_wave, n_steps_of, wave_of
from wgpt.generation.sampling import Sampler, Sampling
from wgpt.generation.stopping import StuckDetector
from wgpt.model import Cache, HybridModel
from wgpt.model.inference import InferenceModel
from wgpt.ops.runtime import resolve_device
from wgpt.runs.model_record import ModelRecord
from wgpt.runs.pretrained import model_folder

log = logging.getLogger(__name__)

# Steps of a prompt that are encoded and read together. At the prompt's end at most one step fewer
# is left to do; eight rows cost a GEMM of this size little more than one.
PREFILL_STEPS = 8
ENDLESS_STUCK_S = 5.0  # an endless stream that is stuck this long ends, unless told otherwise


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


@dataclass
class AudioGenerator:
    """A trained model with all it needs to make sound: codec and mel front end.

    mel_source: what the model was trained on; `decoded-k` reads k codebooks, of the prompt too.
    target_lufs: loudness of the training data, which prompts are brought to; None: as they are.
    """

    model: HybridModel
    codec: codec.Codec
    frontend: MelFrontend
    mel_source: str | None
    target_lufs: float | None = None

    def __post_init__(self) -> None:
        n_codes = self.model.config.codebook_size
        self.end_token = n_codes if self.model.head.out_features > n_codes else None

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> AudioGenerator:
        """From a run folder, a model folder that a run wrote, or `starter`, the package's model.

        A model without an attention window gets one of its training windows' length: past it a
        step would have more to attend to than ever in training (docs/closed-loop.md).

        device: auto, cpu, cuda or cuda:N. Raises ConfigError or CodecError naming the file that is
        missing or does not fit.
        """
        device = resolve_device(device)
        folder = model_folder(folder)
        record = ModelRecord.read(folder)
        if record.mel_source and record.mel_source.startswith("leaky"):
            raise ConfigError(
                f"{folder}: this model was trained on {record.mel_source}, slices that see past "
                "their token; while generating there is no future to see. Train on mel source wave"
            )
        model = HybridModel.from_pretrained(folder, device)
        if not model.config.window_steps and record.context_steps:
            model.set_window(record.context_steps)
        loaded = record.load_codec(device)
        target_lufs = record.treatment.get("target_lufs")
        return cls(model, loaded, MelFrontend(record.mel), record.mel_source, target_lufs)

    @functools.cached_property
    def inference_model(self) -> InferenceModel:
        """The model as generation runs it: a copy of the weights as they are at first use."""
        return InferenceModel(self.model)

    @property
    def sample_rate_hz(self) -> int:
        """Rate of prompts and of generated waves, 24 000."""
        return self.codec.sample_rate_hz

    @property
    def n_codebooks(self) -> int:
        """Codebooks that are sampled and decoded: the coarse one and the residual ones."""
        return 1 + self.inference_model.n_fine

    @property
    def n_mel_codebooks(self) -> int:
        """Codebooks whose sound the mel branch reads; 0: the prompt's wave, then the decoder's."""
        if not self.mel_source or not self.mel_source.startswith("decoded-"):
            return 0
        return int(self.mel_source.removeprefix("decoded-"))

    def prompt_gain(self, wave: Wave) -> float:
        """Factor that brings a prompt, float (L,) at 24 kHz, to the training data's loudness.

        Within +-20 dB and without clipping, as `wgpt prepare` does it; 1 for silence, and for a
        model of data whose level was left alone.
        """
        wave = checked_wave(wave)
        wave = wave[len(wave) % HOP_SAMPLES :]
        if self.target_lufs is None or not len(wave):
            return 1.0
        meter = LoudnessMeter(self.sample_rate_hz)
        meter.push(wave.numpy())
        gain = gain_db(meter.integrated_lufs(), float(wave.abs().max()), self.target_lufs)
        return float(np.float32(10 ** (gain / 20)))

    def generate(
        self,
        prompt: Prompt = None,
        seconds: float = 10.0,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The continuation of a prompt as one wave.

        Args:
            prompt: float (L,) at 24 kHz or a recording's path; None starts from nothing.
            seconds: length of the continuation, in whole steps of 1/75 s; at most that where the
                model has an end-of-clip token (Sampling.end_of_clip).
            sampling: how tokens are drawn; Sampling() by default.
            seed: the same arguments give the same samples on one machine.

        Returns:
            float32 (round(seconds * 75) * 320,) at `sample_rate_hz` and at the prompt's level,
            without the prompt.

        Raises:
            ConfigError: a prompt that is not finite or not (L,), or a length below one step.
            AudioError: a recording that cannot be read.
        """
        steps = self.steps(prompt, n_steps_of(seconds), sampling, seed)
        return np.concatenate([step.wave for step in steps])

    def stream(
        self,
        prompt: Prompt = None,
        seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        *,
        chunk_s: float = 0.08,
        end_when_stuck_s: float | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the samples of `generate` as they are made, in chunks of float32 (n,).

        The arguments are checked at the call, not at the first chunk.

        Args:
            prompt, sampling, seed: as in `generate`.
            seconds: length of the continuation; None: it does not end.
            chunk_s: length of a chunk, in whole steps; it has no influence on the samples.
            end_when_stuck_s: end, with a line in the log, once the stream gave nothing but silence
                or a short loop of tokens for so long (see StuckDetector); 0: never. None: 5 s if
                it would not end otherwise, never if `seconds` is given.

        Raises:
            As `generate`.
        """
        n_steps = None if seconds is None else n_steps_of(seconds)
        n_chunk = n_steps_of(chunk_s, "chunk_s")
        if end_when_stuck_s is None:
            end_when_stuck_s = 0.0 if n_steps else ENDLESS_STUCK_S
        stuck = StuckDetector(end_when_stuck_s) if end_when_stuck_s else None
        return _chunks(self.steps(prompt, n_steps, sampling, seed), n_chunk, stuck)

    def steps(
        self,
        prompt: Prompt = None,
        n_steps: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[Step]:
        """Yields n_steps steps (None: for ever) that continue the prompt, as they are made.

        prompt: as in `generate`, cropped to whole steps from its end. Fewer steps come when the
        model ends the clip.
        """
        batches = self.steps_batch([prompt], n_steps, sampling, [seed])
        return (steps[0] for steps in batches)

    def steps_batch(
        self,
        prompts: Sequence[Prompt],
        n_steps: int | None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] = (0,),
        gains: Sequence[float] | None = None,
    ) -> Iterator[list[Step]]:
        """Yields a list of one step for each item, item i continuing prompts[i] with seeds[i].

        One prompt and several seeds give as many continuations of it. Prompts may differ in
        length. Items that ended their clip are marked; when all have, nothing more comes. Raises
        ConfigError, at the call, as `generate`, and when there are not as many
        seeds as prompts.

        gains: of the prompts, by default `prompt_gain` of each; 1 for what the level was set of.
        """
        if (len(prompts) != len(seeds) and len(prompts) != 1) or not seeds:
            raise ConfigError(
                f"generate: there must be one seed for each of {len(prompts)} prompts, got "
                f"{len(seeds)} seeds"
            )
        waves = [wave_of(prompt) for prompt in prompts]
        levels = [self.prompt_gain(wave) for wave in waves] if gains is None else gains
        self._note_length(max(map(len, waves)))
        n_each = len(seeds) // len(prompts)  # items of a prompt
        places: dict[int, list[int]] = {}  # prompts of equal length advance in one batch
        for i in range(len(seeds)):
            places.setdefault(len(waves[i // n_each]) // HOP_SAMPLES, []).append(i)
        samplers = [
            Sampler(sampling or Sampling(), [seeds[i] for i in at]) for at in places.values()
        ]

        def batches() -> Iterator[list[Step]]:
            states = [self.new_state(gain) for gain in levels]
            for state, wave in zip(states, waves, strict=True):
                state.feed(wave[len(wave) % HOP_SAMPLES :])
            groups = [
                GenerationState.join([states[i // n_each] for i in at]).sample(n_steps, sampler)
                for at, sampler in zip(places.values(), samplers, strict=True)
            ]
            for parts in zip(*groups, strict=True):
                steps = {
                    i: step
                    for at, part in zip(places.values(), parts, strict=True)
                    for i, step in zip(at, part, strict=True)
                }
                if all(step.ended for step in steps.values()):
                    return
                yield [steps[i] for i in range(len(seeds))]

        return batches()

    def _note_length(self, n_samples: int) -> None:
        window_steps = self.model.config.window_steps
        if 0 < window_steps < n_samples // HOP_SAMPLES:
            log.warning(
                "the prompt lasts %.1f s; a step of this model attends to the latest %.1f s of it",
                n_samples / self.sample_rate_hz,
                window_steps / STEP_RATE_HZ,
            )

    def new_state(self, gain: float = 1.0) -> GenerationState:
        """The state of a generation that was fed nothing yet.

        gain: brings what will be fed to the training data's loudness, and is undone in what comes
            out. A prompt that is still arriving has no loudness yet, so its level is left alone
            unless the caller knows it, by `prompt_gain` of an earlier take for example.
        """
        return GenerationState(self, gain)


def _chunks(
    steps: Iterator[Step], n_chunk: int, stuck: StuckDetector | None
) -> Iterator[np.ndarray]:
    """The waves of n_chunk steps at a time, the last chunk shorter if need be."""
    waves: list[np.ndarray] = []
    for n_done, step in enumerate(steps, 1):
        waves.append(step.wave)
        reason = stuck.reason(step.made, step.tokens[0]) if stuck else None
        if reason or len(waves) == n_chunk:
            yield np.concatenate(waves)
            waves = []
        if reason:
            log.warning("ended after %.2f s: %s", n_done / STEP_RATE_HZ, reason)
            return
    if waves:
        yield np.concatenate(waves)


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
