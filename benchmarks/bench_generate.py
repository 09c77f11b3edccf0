"""How fast does a model speak, and how soon after its prompt's end? One core, torch threads 1.

A step is 1/75 s of sound: draw the token(s), decode 320 samples, take the mel slice, run the model.
speed_over_realtime is 13.33 ms over the median step; the shares are of the same steps, timed around
the codec's push, the mel slice's and the rest (model, fine head and drawing). What limits a step is
reading every weight once (4 bytes a parameter; --weight-dtype bf16 2, int8 1) and the overhead of a
few hundred small operations. Times are the thread's CPU time, which on an idle core is the wall
clock's; step_wall_ms says how far others were in the way. Weights of several types take turns.

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
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ, STEP_RATE_HZ, WEIGHT_DTYPES, MelConfig
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.generation.state import PREFILL_STEPS, GenerationState
from wgpt.model import HybridModel
from wgpt.model.presets import PRESETS

KEY = ("preset", "codec", "n_fine", "weights")
PROMPT_STEPS = 231  # 3.08 s: 28 blocks of 8 and 7, the most that can be left at the end
CHUNK_S = 0.08
SAMPLING = Sampling(top_k=100)
N_WARM_UP = 10  # steps at the begin of each turn


class Clock:
    """Adds up the time spent inside wrapped methods."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            result = inner(*arguments)
            self.spent_s += time.process_time() - start
            return result

        setattr(owner, name, timed)


def random_encodec(folder: Path) -> str:
    """A folder in the Hugging Face layout with EnCodec 24 kHz's architecture, random weights."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    EncodecModel(EncodecConfig()).save_pretrained(folder)
    return str(folder)


def generators_of(
    preset: str, loaded: codec.Codec, n_fine: int, weight_dtypes: list[str]
) -> dict[str, AudioGenerator]:
    torch.manual_seed(0)
    model = HybridModel(dataclasses.replace(PRESETS[preset][0], n_fine=n_fine)).eval()
    frontend = MelFrontend(MelConfig())
    return {name: AudioGenerator(model, loaded, frontend, "wave", weight_dtype=name)
            for name in weight_dtypes}  # fmt: skip


def first_chunk_ms(generator: AudioGenerator, prompt: np.ndarray, streamed: bool) -> float:
    heard = generator.new_state()
    if streamed:
        n = round(CHUNK_S * SAMPLE_RATE_HZ)
        pieces = [prompt[i : i + n] for i in range(0, len(prompt), n)]
        for piece in pieces[:-1]:
            heard.feed(piece)
        prompt = pieces[-1]
    start = time.process_time()
    heard.feed(prompt)
    for _ in heard.steps(round(CHUNK_S * STEP_RATE_HZ), SAMPLING):
        pass
    return (time.process_time() - start) * 1e3


class Stream:
    """One continuation, and the seconds of its steps: of the CPU, of the wall clock, and of the CPU
    inside the codec and the mel slice."""

    def __init__(self, generator: AudioGenerator, prompt: np.ndarray) -> None:
        heard: GenerationState = generator.new_state()
        heard.feed(prompt)
        self._clocks = {"codec": Clock(), "mel": Clock()}
        self._clocks["codec"].wrap(heard._decoder, "push")
        self._clocks["mel"].wrap(heard._mel, "push")
        self._steps = heard.steps(None, SAMPLING)
        self.times: dict[str, list[float]] = {"cpu": [], "wall": [], "codec": [], "mel": []}

    def advance(self, n_steps: int) -> None:
        for _ in range(N_WARM_UP):
            next(self._steps)
        for _ in range(n_steps):
            for clock in self._clocks.values():
                clock.spent_s = 0.0
            start = time.process_time(), time.perf_counter()
            next(self._steps)
            self.times["cpu"].append(time.process_time() - start[0])
            self.times["wall"].append(time.perf_counter() - start[1])
            for name, clock in self._clocks.items():
                self.times[name].append(clock.spent_s)


def measure(
    generators: dict[str, AudioGenerator], rounds: int, n_steps: int
) -> dict[str, dict[str, Any]]:
    """Figures of each, from rounds in which they take turns."""
    rng = np.random.default_rng(0)
    prompt = (0.1 * rng.standard_normal(PROMPT_STEPS * HOP_SAMPLES)).astype(np.float32)
    for generator in generators.values():
        first_chunk_ms(generator, prompt[:SAMPLE_RATE_HZ], True)
    firsts: dict[tuple[str, bool], list[float]] = {}
    streams = {name: Stream(generator, prompt) for name, generator in generators.items()}
    for _ in range(rounds):
        for name, generator in generators.items():
            for streamed in (True, False):
                took_ms = first_chunk_ms(generator, prompt, streamed)
                firsts.setdefault((name, streamed), []).append(took_ms)
            streams[name].advance(n_steps // rounds)
    return {name: figures(streams[name].times, firsts[name, True], firsts[name, False])
            for name in generators}  # fmt: skip


def figures(
    times: dict[str, list[float]], streamed_ms: list[float], whole_ms: list[float]
) -> dict[str, Any]:
    step_s = statistics.median(times["cpu"])
    total, in_codec, in_mel = (sum(times[name]) for name in ("cpu", "codec", "mel"))
    return {
        "speed_over_realtime": 1 / STEP_RATE_HZ / step_s,
        "step_ms": step_s * 1e3,
        "step_wall_ms": statistics.median(times["wall"]) * 1e3,
        "first_chunk_ms": statistics.median(streamed_ms),
        "whole_prompt_first_chunk_ms": statistics.median(whole_ms),
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
    parser.add_argument("--weight-dtype", nargs="+", default=["fp32"], choices=WEIGHT_DTYPES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)
    rounds, n_steps = (3, 100) if args.quick else (5, 200)
    results = Results(args.out, machine_facts("cpu"), KEY)
    if args.resume:
        results.resume()
    deadline = time.monotonic() + args.time_limit
    with tempfile.TemporaryDirectory() as folder:
        for name in args.codecs:
            loaded = codec.load(random_encodec(Path(folder)) if name != "mini" else name)
            for preset in args.presets:
                for n_fine in args.fine:
                    key = {"preset": preset, "codec": name, "n_fine": n_fine}
                    wanted = [weights for weights in args.weight_dtype
                              if not results.has(**key, weights=weights)]  # fmt: skip
                    if not wanted or time.monotonic() > deadline:
                        continue
                    say(key)
                    generators = generators_of(preset, loaded, n_fine, wanted)
                    for weights, row in measure(generators, rounds, n_steps).items():
                        results.add(
                            key | {"weights": weights} | row | {"hear_steps": PREFILL_STEPS}
                        )
    if not args.json:
        print_table(results.rows, [*KEY, "speed_over_realtime", "step_ms", "step_wall_ms",
                                   "first_chunk_ms", "whole_prompt_first_chunk_ms", "model_share",
                                   "codec_share", "mel_share"])  # fmt: skip
    results.print_json()


if __name__ == "__main__":
    main()
