"""`wgpt generate`: continue a recording, or start from silence."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wgpt import audio
from wgpt.config import SAMPLE_RATE_HZ, STEP_RATE_HZ
from wgpt.errors import ConfigError
from wgpt.generation.generator import ENDLESS_STUCK_S, AudioGenerator, Step
from wgpt.generation.prompt import n_steps_of
from wgpt.generation.sampling import FINE_TEMPERATURE, Sampling
from wgpt.generation.stopping import StuckDetector
from wgpt.ops.runtime import one_thread

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt generate`."""
    output = parser.add_argument_group("output")
    sampling = parser.add_argument_group("sampling")
    parser.add_argument("run", metavar="RUN", help="run folder, its model folder, or starter")
    parser.add_argument("--prompt", metavar="AUDIO", help="recording to continue")
    output.add_argument("--seconds", type=float, help="length; --stream without it does not end")
    output.add_argument("--out", metavar="AUDIO", help="file to write (.wav, ...)")
    output.add_argument(
        "--stream",
        action="store_true",
        help="write raw sound to stdout as it is made, 24 kHz, one channel; for example "
        "`wgpt generate RUN --stream | aplay -t raw -f S16_LE -r 24000 -c 1`",
    )
    output.add_argument(
        "--format",
        choices=("s16le", "f32le"),
        default="s16le",
        help="samples of --stream: 16-bit integers or 32-bit floats (default s16le)",
    )
    output.add_argument("--n", type=int, default=1, help="continuations, seeds SEED, SEED+1, ...")
    output.add_argument("--with-prompt", action="store_true", help="write the prompt in front")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0: the likeliest token (default 1)",
    )
    sampling.add_argument(
        "--top-k", type=int, default=100, help="draw from the likeliest; 0: all (default 100)"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, help="share of probability kept (default 1)"
    )
    sampling.add_argument(
        "--fine-temperature",
        type=float,
        default=FINE_TEMPERATURE,
        help=f"temperature of the finer codebooks; 0: most likely (default {FINE_TEMPERATURE:g})",
    )
    sampling.add_argument(
        "--fine-top-k", type=int, default=0, help="top k of the finer codebooks; 0: all (default 0)"
    )
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same samples (default 0)")
    output.add_argument(
        "--end-when-stuck",
        type=float,
        metavar="S",
        help="end after S seconds of nothing but silence or a loop of at most 8 tokens; 0: never "
        f"(default {ENDLESS_STUCK_S:g} without --seconds, else 0)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    output.add_argument("--json", action="store_true", help="print one JSON object per file")


def run(args: argparse.Namespace) -> int:
    """`wgpt generate`."""
    if bool(args.out) == args.stream:
        raise ConfigError("generate: give one of --out AUDIO and --stream")
    if args.n < 1:
        raise ConfigError(f"generate: --n must be at least 1, got {args.n}")
    if args.stream and (args.n > 1 or args.json):
        raise ConfigError(
            "generate: --stream writes one sound and no text to stdout; --n and --json need --out"
        )
    if args.stream and sys.stdout.isatty():
        raise ConfigError(
            "generate: --stream writes raw sound, got a terminal as stdout; pipe it into a player, "
            "such as | aplay -t raw -f S16_LE -r 24000 -c 1"
        )
    if args.out and args.seconds is None:
        raise ConfigError("generate: --out needs --seconds")
    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.fine_temperature, args.fine_top_k
    )
    with one_thread():
        generator = AudioGenerator.load(args.run, args.device)
        prompt = audio.read(args.prompt) if args.prompt else np.zeros(0, np.float32)
        work = _stream if args.stream else _write
        return work(args, generator, prompt, sampling)


def _stream(
    args: argparse.Namespace, generator: AudioGenerator, prompt: np.ndarray, sampling: Sampling
) -> int:
    """Raw PCM to stdout until the end, or until nobody reads."""
    chunks = generator.stream(
        prompt, args.seconds, sampling, args.seed, end_when_stuck_s=args.end_when_stuck
    )
    out = sys.stdout.buffer
    bar = tqdm(total=args.seconds, desc="generate", unit="s", unit_scale=True, disable=None)
    try:
        if args.with_prompt:
            out.write(_pcm(prompt, args.format))
        for chunk in chunks:
            out.write(_pcm(chunk, args.format))
            out.flush()
            bar.update(len(chunk) / SAMPLE_RATE_HZ)
    except BrokenPipeError:  # the listener left, which is how an endless stream ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        bar.close()
    return 0


def _pcm(wave: np.ndarray, kind: str) -> bytes:
    """Little-endian samples; s16le clips at full scale."""
    if kind == "f32le":
        return wave.astype("<f4").tobytes()
    return np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()


def _write(
    args: argparse.Namespace, generator: AudioGenerator, prompt: np.ndarray, sampling: Sampling
) -> int:
    """--n continuations, each in a file of its own."""
    seeds = [args.seed + i for i in range(args.n)]
    ends: list[StuckDetector | None] = [
        StuckDetector(args.end_when_stuck) if args.end_when_stuck else None for _ in seeds
    ]
    items: list[list[Step]] = [[] for _ in seeds]
    ended = [False] * len(seeds)
    n_steps = n_steps_of(args.seconds)
    batches = generator.steps_batch([prompt], n_steps, sampling, seeds)
    for batch in tqdm(batches, "generate", n_steps, unit="step", disable=None):
        for i, step in enumerate(batch):
            if ended[i]:
                continue
            items[i].append(step)
            stuck = ends[i]
            reason = stuck.reason(step.wave, step.tokens[0]) if stuck else None
            if reason:
                ended[i] = True
                log.warning("ended after %.2f s: %s", len(items[i]) / STEP_RATE_HZ, reason)
        if all(ended):
            break
    path = Path(args.out)
    for i, steps in enumerate(items):
        out = path if args.n == 1 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}")
        wave = np.concatenate([step.wave for step in steps])
        audio.write(out, np.concatenate([prompt, wave]) if args.with_prompt else wave)
        if not args.json:
            sys.stdout.write(f"{out}\n")
            continue
        facts = {
            "out": str(out),
            "seed": seeds[i],
            "seconds": len(wave) / SAMPLE_RATE_HZ,
            "tokens": [step.tokens[0] for step in steps],
            "entropy_nats": [round(step.entropy_nats, 4) for step in steps],
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
