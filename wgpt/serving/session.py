"""What a page may ask for, checked here, and the answers, as values that JSON can carry."""

from __future__ import annotations

import base64
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgpt import audio
from wgpt.audio.mel import band_edges_hz
from wgpt.audio.mel_stream import MelStream
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ, STEP_RATE_HZ
from wgpt.errors import AudioError, ConfigError
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.prompt import n_steps_of
from wgpt.generation.sampling import Sampling
from wgpt.generation.state import Step
from wgpt.generation.stopping import StuckDetector

FIRST_STEPS, NEXT_STEPS = 6, 15  # steps in a piece of sound: 80 ms, then 200 ms
WARN_AFTER_S = 2.0  # of silence or of a loop; half the continuation where that is shorter
EXAMPLES = Path(__file__).parents[1] / "assets" / "speech"
N_EXAMPLES, EXAMPLE_S = 6, 4.0
DECIBELS_PER_NAT = 10 / math.log(10)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_prompt_s: float = 30.0
    max_seconds: float = 30.0
    max_upload_mb: float = 25.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} must be finite and positive, got {value:g}")

    @property
    def max_upload_bytes(self) -> int:
        return int(self.max_upload_mb * 1e6)


@dataclass(frozen=True)
class Request:
    """A continuation that was asked for and may be made."""

    model: str
    n_steps: int
    seed: int
    sampling: Sampling


class GenerationSession:
    """The models of a server and what may be done with them.

    models: by the names that the page shows.
    """

    def __init__(self, models: Mapping[str, AudioGenerator], limits: Limits) -> None:
        self.models = dict(models)
        self.limits = limits
        lines = (EXAMPLES / "text.tsv").read_text(encoding="utf-8").splitlines()
        every = -(-len(lines) // N_EXAMPLES)
        self.examples = [line.split("\t") for line in lines[::every]]  # name, language, text

    def facts(self) -> dict[str, Any]:
        """What the page must know before the first request."""
        return {
            "models": {
                name: {
                    "n_codebooks": model.n_codebooks,
                    "codebook_size": model.model.config.codebook_size,
                    "mel_edges_hz": band_edges_hz(model.frontend.config).tolist(),
                }
                for name, model in self.models.items()
            },
            "limits": asdict(self.limits),
            "sampling": asdict(Sampling(top_k=100)),
            "examples": [
                {"language": language, "text": re.split("(?<=[.!?]) ", text)[0]}
                for _, language, text in self.examples
            ],
            "rate_hz": SAMPLE_RATE_HZ,
            "step_samples": HOP_SAMPLES,
        }

    def example(self, index: int) -> np.ndarray:
        """float32 (L,): the start of an example prompt. Raises IndexError."""
        return audio.read(EXAMPLES / self.examples[index][0])[: round(EXAMPLE_S * SAMPLE_RATE_HZ)]

    def read_prompt(self, body: bytes) -> np.ndarray:
        """An uploaded file's sound, float32 (L,) at 24 kHz; no bytes give an empty prompt.

        Raises AudioError, which speaks of "the prompt": it has no path on this machine.
        """
        if not body:
            return np.zeros(0, np.float32)
        with tempfile.TemporaryFile() as file:  # has no name; the kernel drops it, however we end
            file.write(body)
            file.seek(0)
            path = f"/dev/fd/{file.fileno()}"
            try:
                return audio.read(path, max_seconds=self.limits.max_prompt_s)
            except AudioError as error:
                message = str(error).replace(f"{path}:", "the prompt")
                raise AudioError(message.partition("; split it")[0]) from error

    def model(self, query: Mapping[str, str]) -> AudioGenerator:
        """The model that a query names. Raises ConfigError."""
        name = query.get("model", "")
        if name not in self.models:
            raise ConfigError(f"model must be one of {', '.join(self.models)}, got {name!r}")
        return self.models[name]

    def request(self, query: Mapping[str, str]) -> Request:
        """A checked request. Raises ConfigError for what the page's own controls do not send."""
        self.model(query)
        seconds = _number(query, "seconds", float, 8.0)
        if not (1 / STEP_RATE_HZ <= seconds <= self.limits.max_seconds):
            raise ConfigError(
                f"seconds must lie in [1/75, {self.limits.max_seconds:g}], got {seconds:g}"
            )
        seed = _number(query, "seed", int, 0)
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2^63), got {seed}")
        chosen = {
            name: _number(query, name, type(default), default)
            for name, default in asdict(Sampling(top_k=100)).items()
        }
        return Request(query["model"], n_steps_of(seconds), seed, Sampling(**chosen))

    def describe(self, query: Mapping[str, str], prompt: np.ndarray) -> dict[str, Any]:
        """A prompt as it is and as the codec hears it, with as many codebooks as are generated.

        Raises ConfigError for a prompt that is shorter than a step, or an unknown model.
        """
        model = self.model(query)
        prompt = whole_steps(prompt)
        if not len(prompt):
            raise ConfigError("the prompt must last at least one step (1/75 s)")
        gain = np.float32(model.prompt_gain(prompt))
        tokens = model.codec.encode(torch.tensor(prompt * gain))[: model.n_codebooks]
        ceiling = model.codec.decode(tokens).cpu().numpy() / gain
        return {
            "seconds": len(prompt) / SAMPLE_RATE_HZ,
            "recording": _sound(prompt, MelPicture(model).push(prompt)),
            "codec": _sound(ceiling, MelPicture(model).push(ceiling)),
        }

    def continue_prompt(self, request: Request, prompt: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yields the continuation piece by piece, as it is made: 80 ms, then 200 ms each.

        The samples are those of AudioGenerator.steps, rounded to 16 bits.
        """
        model = self.models[request.model]
        prompt = whole_steps(prompt)
        stuck = StuckDetector(min(WARN_AFTER_S, request.n_steps / STEP_RATE_HZ / 2))
        picture = MelPicture(model)
        began, first = time.monotonic(), 0.0
        steps: list[Step] = []
        warning: str | None = None
        n_due = FIRST_STEPS
        stream = model.steps(prompt, request.n_steps, request.sampling, request.seed)
        for n_done, step in enumerate(stream, 1):
            if n_done == 1:
                first = time.monotonic()
                picture.push(prompt)
            steps.append(step)
            warning = warning or stuck.reason(step.made, step.tokens[0])
            if n_done not in (n_due, request.n_steps):
                continue
            wave = np.concatenate([one.wave for one in steps])
            now = time.monotonic()
            yield {
                **_sound(wave, picture.push(wave)),
                "tokens": [step.tokens for step in steps],
                "entropy_nats": [round(step.entropy_nats, 3) for step in steps],
                "elapsed_s": now - began,
                # Seconds made in a second, without the prompt and the first step, which waits
                # for it: the player begins when what is made will last.
                "pace": (n_done - 1) / STEP_RATE_HZ / max(now - first, 1e-6),
                "warning": warning,
                "done": n_done == request.n_steps,
            }
            steps, n_due = [], n_done + NEXT_STEPS


def load_models(
    runs: Sequence[str], device: str, download: bool = False, weight_dtype: str = "fp32"
) -> dict[str, AudioGenerator]:
    """Generators by a short name: the folder's, with a number where two are alike."""
    models: dict[str, AudioGenerator] = {}
    for folder in runs:
        name = base = Path(folder).resolve().name
        count = 1
        while name in models:
            count += 1
            name = f"{base} ({count})"
        models[name] = AudioGenerator.load(
            folder, device, download=download, weight_dtype=weight_dtype
        )
    return models


class MelPicture:
    """Log-mel of a wave that arrives in whole steps, by a model's front end, one column a step."""

    def __init__(self, model: AudioGenerator) -> None:
        self._stream = MelStream(model.frontend)
        self._frames_per_step = model.frontend.config.frames_per_step

    def push(self, wave: np.ndarray) -> np.ndarray:
        """float32 (n * 320,) to int8 (n, M), decibels."""
        if not len(wave):
            return np.zeros((0, 0), np.int8)
        mel = self._stream.push(torch.tensor(wave)[None])[0, :: self._frames_per_step]
        return np.clip(np.rint(mel.numpy() * DECIBELS_PER_NAT), -127, 127).astype(np.int8)


def whole_steps(prompt: np.ndarray) -> np.ndarray:
    """The prompt without its first samples that fill no step: what the model hears."""
    return prompt[len(prompt) % HOP_SAMPLES :]


def pcm(wave: np.ndarray) -> bytes:
    """16-bit little-endian PCM; float samples beyond full scale are clipped."""
    return np.rint(np.clip(wave, -1.0, 1.0) * 32767).astype("<i2").tobytes()


def _sound(wave: np.ndarray, mel: np.ndarray) -> dict[str, str]:
    return {
        "pcm": base64.b64encode(pcm(wave)).decode(),
        "mel": base64.b64encode(mel.tobytes()).decode(),
    }


def _number(query: Mapping[str, str], name: str, kind: Callable[[Any], Any], default: Any) -> Any:
    try:
        return kind(query.get(name, default))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} must be {what}, got {query[name]!r}") from None
