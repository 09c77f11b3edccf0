"""A trained model that makes sound: from prompts to waves, whole, in chunks or in batches.

A prompt is brought to the loudness that the training data had, so that a quiet one is heard as
training heard its like; what the model makes goes out at the prompt's own level again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wgpt import codec
from wgpt.audio.loudness import LoudnessMeter, gain_db
from wgpt.audio.mel import MelFrontend
from wgpt.config import HOP_SAMPLES, STEP_RATE_HZ
from wgpt.errors import ConfigError
from wgpt.generation.prompt import Prompt, Wave, checked_wave, n_steps_of, wave_of
from wgpt.generation.sampling import Sampler, Sampling
from wgpt.generation.state import GenerationState, Step
from wgpt.generation.stopping import StuckDetector
from wgpt.model import HybridModel
from wgpt.model.inference import InferenceModel, check_weight_dtype
from wgpt.ops.runtime import resolve_device
from wgpt.runs.model_record import ModelRecord
from wgpt.runs.pretrained import model_folder

log = logging.getLogger(__name__)

ENDLESS_STUCK_S = 5.0  # an endless stream that is stuck this long ends, unless told otherwise


@dataclass
class AudioGenerator:
    """A trained model with all it needs to make sound: codec and mel front end.

    mel_source: what the model was trained on; `decoded-k` reads k codebooks, of the prompt too.
    target_lufs: loudness of the training data, which prompts are brought to; None: as they are.
    weight_dtype: in which generation holds the weights: fp32, or on the CPU bf16 or int8, for which
        a step reads half or a quarter of the bytes. Samples are then those of rounded weights; the
        same arguments still give the same ones, and an item of a batch those it gets alone.
    """

    model: HybridModel
    codec: codec.Codec
    frontend: MelFrontend
    mel_source: str | None
    target_lufs: float | None = None
    weight_dtype: str = "fp32"

    def __post_init__(self) -> None:
        check_weight_dtype(self.weight_dtype, next(self.model.parameters()).device)
        n_codes = self.model.config.codebook_size
        self.end_token = n_codes if self.model.head.out_features > n_codes else None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "cpu",
        *,
        download: bool = False,
        weight_dtype: str = "fp32",
    ) -> AudioGenerator:
        """From a run folder, a model folder that a run wrote, `starter`, the package's model, or
        `user/model` on the Hugging Face Hub.

        A model without an attention window gets one of its training windows' length: past it a
        step would have more to attend to than ever in training (docs/closed-loop.md).

        device: auto, cpu, cuda or cuda:N. download: let a model and a codec of the Hub be
        downloaded. weight_dtype: as in AudioGenerator. Raises ConfigError or CodecError naming the
        file that is missing or does not fit.
        """
        device = resolve_device(device)
        check_weight_dtype(weight_dtype, device)
        folder = model_folder(folder, download)
        record = ModelRecord.read(folder)
        if record.mel_source and record.mel_source.startswith("leaky"):
            raise ConfigError(
                f"{folder}: this model was trained on {record.mel_source}, slices that see past "
                "their token; while generating there is no future to see. Train on mel source wave"
            )
        model = HybridModel.from_pretrained(folder, device)
        if not model.config.window_steps and record.context_steps:
            model.set_window(record.context_steps)
        loaded = record.load_codec(device, download)
        target_lufs = record.treatment.get("target_lufs")
        frontend = MelFrontend(record.mel)
        return cls(model, loaded, frontend, record.mel_source, target_lufs, weight_dtype)

    @functools.cached_property
    def inference_model(self) -> InferenceModel:
        """The model as generation runs it: a copy of the weights as they are at first use."""
        return InferenceModel(self.model, self.weight_dtype)

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
