"""One request of `wgpt serve`: checks what was asked, makes the sound, says what the page shows."""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wgpt import audio
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ, STEP_RATE_HZ, ConfigError
from wgpt.generation.generator import AudioGenerator as Speaker
from wgpt.generation.generator import Step
from wgpt.generation.prompt import n_steps_of
from wgpt.generation.sampling import Sampling
from wgpt.runs import plots

FIRST_STEPS, NEXT_STEPS = 6, 15  # steps per piece of sound: 80 ms, then 200 ms
DRAWING_SHARE = 0.15  # of a job's time at most, until it is done


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; checked on the server."""

    max_prompt_s: float = 30.0
    max_seconds: float = 30.0
    max_upload_mb: float = 25.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} must be finite and positive, got {value:g}")


@dataclass
class Progress:
    """What a job has made so far; one object per job, growing."""

    prompt: np.ndarray  # float32 (L,)
    n_steps: int  # wanted
    steps: list[Step] = field(default_factory=list)
    prompt_tokens: list[int] | None = None  # coarse; encoded for the first picture
    first_sound_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def wave(self) -> np.ndarray:
        """The continuation, float32 (steps * 320,)."""
        return np.concatenate([np.zeros(0, np.float32), *(step.wave for step in self.steps)])

    @property
    def done(self) -> bool:
        return len(self.steps) == self.n_steps


def read_prompt(path: str | None, limits: Limits) -> np.ndarray:
    """The uploaded prompt, float32 (L,) at 24 kHz; nothing uploaded gives an empty one.

    Raises AudioError that speaks of "the prompt", not of a path on this machine.
    """
    if path is None:
        return np.zeros(0, np.float32)
    try:
        return audio.read(path, max_seconds=limits.max_prompt_s)
    except audio.AudioError as error:
        message = str(error).replace(f"{path}:", "the prompt")
        raise audio.AudioError(message.replace("; split it or raise max_seconds", "")) from error


def continue_prompt(
    speaker: Speaker, prompt: np.ndarray, seconds: float, sampling: Sampling, seed: int
) -> Iterator[Progress]:
    """Yields the growing progress whenever a piece of sound is ready: 80 ms, then every 200 ms."""
    began = time.monotonic()
    progress = Progress(prompt, n_steps_of(seconds))
    steps = speaker.stream(prompt, progress.n_steps, sampling, seed)
    n_due = FIRST_STEPS
    for n_done, step in enumerate(steps, 1):
        progress.steps.append(step)
        if n_done >= n_due or progress.done:
            progress.elapsed_s = time.monotonic() - began
            progress.first_sound_s = progress.first_sound_s or progress.elapsed_s
            n_due = n_done + NEXT_STEPS
            yield progress


class Desk:
    """The page's one job: takes what the user chose, yields what the page shows."""

    def __init__(self, speakers: dict[str, Speaker], limits: Limits) -> None:
        self.speakers = speakers
        self.limits = limits

    def check(self, run: str, seconds: float, seed: float | None) -> None:
        """Raises ConfigError for what the page's own controls would not send."""
        if run not in self.speakers:
            raise ConfigError(f"run must be one of {', '.join(self.speakers)}, got {run!r}")
        if not (1 / STEP_RATE_HZ <= seconds <= self.limits.max_seconds):
            raise ConfigError(
                f"seconds must lie in [1/75, {self.limits.max_seconds:g}], got {seconds:g}"
            )
        if seed is None or not (0 <= seed < 2**63 and seed == int(seed)):
            raise ConfigError(f"seed must be a whole number in [0, 2^63), got {seed}")

    def serve(
        self,
        prompt: str | None,
        run: str,
        seconds: float,
        with_prompt: bool,
        temperature: float,
        top_k: float,
        top_p: float,
        fine_temperature: float,
        fine_top_k: float,
        seed: float,
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yields (player value, status, figure, token text); gradio.skip() for what stays."""
        import gradio

        try:
            self.check(run, seconds, seed)
            sampling = Sampling(temperature, int(top_k), top_p, fine_temperature, int(fine_top_k))
            wave = read_prompt(prompt, self.limits)
        except (audio.AudioError, ConfigError) as error:
            raise gradio.Error(str(error), print_exception=False) from None
        job, pcm = uuid.uuid4().hex, ""
        n_sent, drawing_s = 0, 0.0
        sound = wave if with_prompt else np.zeros(0, np.float32)
        for progress in continue_prompt(self.speakers[run], wave, seconds, sampling, int(seed)):
            made = np.concatenate([sound, progress.wave])
            end = len(made) if progress.done else len(made) // 3 * 3  # base64 joins at 3 samples
            pcm += encode(made[n_sent:end])
            n_sent = end
            player = {"job": job, "pcm": pcm, "rate_hz": SAMPLE_RATE_HZ, "done": progress.done}
            picture = text = gradio.skip()
            first = len(progress.steps) <= FIRST_STEPS  # sound before pictures
            if progress.done or (drawing_s <= DRAWING_SHARE * progress.elapsed_s and not first):
                began = time.monotonic()
                picture = draw(self.speakers[run], progress)
                text = token_text(progress)
                drawing_s += time.monotonic() - began
            yield player, status(run, progress), picture, text


def encode(wave: np.ndarray) -> str:
    """Base64 of 16-bit little-endian PCM; float samples beyond full scale are clipped."""
    pcm = np.round(np.clip(wave, -1.0, 1.0) * 32767).astype("<i2")
    return base64.b64encode(pcm.tobytes()).decode()


def draw(speaker: Speaker, progress: Progress) -> Any:
    """The picture of the prompt and what follows: waveform, log-mel, tokens, entropy."""
    prompt = progress.prompt[len(progress.prompt) % HOP_SAMPLES :]  # whole steps, as the model's
    if progress.prompt_tokens is None:
        progress.prompt_tokens = speaker.codec.encode(torch.from_numpy(prompt))[0].tolist()
    wave = np.concatenate([prompt, progress.wave])
    return plots.continuation(
        wave,
        speaker.frontend(torch.from_numpy(wave)).numpy()[
            :: speaker.frontend.config.frames_per_step
        ],
        n_prompt=len(prompt) // HOP_SAMPLES,
        n_steps=progress.n_steps,
        prompt_tokens=progress.prompt_tokens,
        tokens=[step.tokens[0] for step in progress.steps],
        entropies=[step.entropy_nats for step in progress.steps],
        codebook_size=speaker.model.config.codebook_size,
    )


def token_text(progress: Progress) -> str:
    """One line per codebook, coarse first."""
    codebooks = zip(*(step.tokens for step in progress.steps), strict=True)
    return "\n".join(" ".join(map(str, codebook)) for codebook in codebooks)


def status(run: str, progress: Progress) -> str:
    """One line: what was made, how fast, how soon."""
    made_s, wanted_s = len(progress.steps) / STEP_RATE_HZ, progress.n_steps / STEP_RATE_HZ
    return (
        f"**{run}** · prompt {len(progress.prompt) / SAMPLE_RATE_HZ:.1f} s · "
        f"made {made_s:.1f} of {wanted_s:.1f} s, {made_s / progress.elapsed_s:.1f} times real time "
        f"· first sound after {1000 * progress.first_sound_s:.0f} ms"
    )
