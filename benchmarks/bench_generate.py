"""How fast does a model speak, and how soon after its prompt's end? One core, torch threads 1.

A step is 1/75 s of sound: draw the token(s), decode 320 samples, take the mel slice, run the model.
speed_over_realtime is 13.33 ms over the median step; the shares are of the same steps, timed around
the codec's push, the mel slice's and the rest (model, fine head and drawing). What limits a step is
reading every weight once (4 bytes a parameter) and the overhead of a few hundred small operations.

A prompt of 3.08 s arrives in chunks of 80 ms and is encoded and read meanwhile. first_chunk_ms is
the time from the arrival of its last chunk until 80 ms of sound exist: what is left to hear (here
7 steps, the most there can be), then 6 steps; whole_prompt_first_chunk_ms is it when the whole
prompt is handed over at once.

Models and the EnCodec 24 kHz architecture have random weights (speed does not depend on them);
mini is the shipped codec. Sampling is top-k 100. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Results, add_common_arguments, machine_facts, print_table, say

from wgpt import codec
from wgpt.audio.mel import MelFrontend
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ, STEP_RATE_HZ, MelConfig
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.generation.state import PREFILL_STEPS, GenerationState
from wgpt.model import HybridModel
from wgpt.model.presets import PRESETS

PROMPT_STEPS = 231  # 3.08 s: 28 blocks of 8 and 7, the most that can be left at the end
CHUNK_S = 0.08
SAMPLING = Sampling(top_k=100)


class Clock:
    """Adds up the time spent inside wrapped methods."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments)
            self.spent_s += time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def random_encodec(folder: Path) -> str:
    """A folder in the Hugging Face layout with EnCodec 24 kHz's architecture, random weights."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    EncodecModel(EncodecConfig()).save_pretrained(folder)
    return str(folder)


def speaker_of(preset: str, loaded: codec.Codec, n_fine: int) -> AudioGenerator:
    torch.manual_seed(0)
    shape = dataclasses.replace(PRESETS[preset][0], n_fine=n_fine)
    return AudioGenerator(HybridModel(shape).eval(), loaded, MelFrontend(MelConfig()), "wave")


def first_chunk_ms(generator: AudioGenerator, prompt: np.ndarray, streamed: bool) -> float:
    heard = generator.new_state()
    if streamed:
        n = round(CHUNK_S * SAMPLE_RATE_HZ)
        pieces = [prompt[i : i + n] for i in range(0, len(prompt), n)]
        for piece in pieces[:-1]:
            heard.feed(piece)
        prompt = pieces[-1]
    start = time.perf_counter()
    heard.feed(prompt)
    for _ in heard.steps(round(CHUNK_S * STEP_RATE_HZ), SAMPLING):
        pass
    return (time.perf_counter() - start) * 1e3


def step_times(
    generator: AudioGenerator, prompt: np.ndarray, n_steps: int
) -> dict[str, list[float]]:
    """Seconds of each step after the prompt, in all and inside the codec and the mel slice."""
    heard: GenerationState = generator.new_state()
    heard.feed(prompt)
    clocks = {"codec": Clock(), "mel": Clock()}
    clocks["codec"].wrap(heard._decoder, "push")
    clocks["mel"].wrap(heard._mel, "push")
    times: dict[str, list[float]] = {"all": [], "codec": [], "mel": []}
    steps = heard.steps(None, SAMPLING)
    for _ in range(10):
        next(steps)
    for _ in range(n_steps):
        for clock in clocks.values():
            clock.spent_s = 0.0
        start = time.perf_counter()
        next(steps)
        times["all"].append(time.perf_counter() - start)
        for name, clock in clocks.items():
            times[name].append(clock.spent_s)
    return times


def measure(generator: AudioGenerator, rounds: int, n_steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prompt = (0.1 * rng.standard_normal(PROMPT_STEPS * HOP_SAMPLES)).astype(np.float32)
    first_chunk_ms(generator, prompt[:SAMPLE_RATE_HZ], True)
    firsts = {streamed: [first_chunk_ms(generator, prompt, streamed) for _ in range(rounds)]
              for streamed in (True, False)}  # fmt: skip
    times = step_times(generator, prompt, n_steps)
    step_s = statistics.median(times["all"])
    total, in_codec, in_mel = (sum(times[name]) for name in ("all", "codec", "mel"))
    return {
        "speed_over_realtime": 1 / STEP_RATE_HZ / step_s,
        "step_ms": step_s * 1e3,
        "first_chunk_ms": statistics.median(firsts[True]),
        "whole_prompt_first_chunk_ms": statistics.median(firsts[False]),
        "model_share": 1 - (in_codec + in_mel) / total,
        "codec_share": in_codec / total,
        "mel_share": in_mel / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--presets", nargs="+", default=["hybrid-xs", "hybrid", "gpt-s", "gpt-l"])
    parser.add_argument("--codecs", nargs="+", default=["mini", "encodec-architecture"])
    parser.add_argument("--fine", nargs="+", type=int, default=[0, 7], help="residual codebooks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)
    rounds, n_steps = (3, 100) if args.quick else (5, 200)
    results = Results(args.out, machine_facts("cpu"), ("preset", "codec", "n_fine"))
    if args.resume:
        results.resume()
    deadline = time.monotonic() + args.time_limit
    with tempfile.TemporaryDirectory() as folder:
        for name in args.codecs:
            loaded = codec.load(random_encodec(Path(folder)) if name != "mini" else name)
            for preset in args.presets:
                for n_fine in args.fine:
                    key = {"preset": preset, "codec": name, "n_fine": n_fine}
                    if results.has(**key) or time.monotonic() > deadline:
                        continue
                    say(key)
                    row = measure(speaker_of(preset, loaded, n_fine), rounds, n_steps)
                    results.add(key | row | {"hear_steps": PREFILL_STEPS})
    if not args.json:
        print_table(results.rows, ["preset", "codec", "n_fine", "speed_over_realtime", "step_ms",
                                   "first_chunk_ms", "whole_prompt_first_chunk_ms", "model_share",
                                   "codec_share", "mel_share"])  # fmt: skip
    results.print_json()


if __name__ == "__main__":
    main()
