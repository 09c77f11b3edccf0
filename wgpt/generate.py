"""`wgpt generate`: continue a recording, or start from silence."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wgpt import audio
from wgpt.audio.writing import WRITERS
from wgpt.cli import one_line
from wgpt.config import SAMPLE_RATE_HZ, STEP_RATE_HZ, WEIGHT_DTYPES
from wgpt.errors import ConfigError
from wgpt.files import remove_leftovers
from wgpt.generation.generator import ENDLESS_STUCK_S, AudioGenerator
from wgpt.generation.listener import Listener
from wgpt.generation.prompt import n_steps_of
from wgpt.generation.sampling import FINE_TEMPERATURE, Sampler, Sampling
from wgpt.generation.state import Step
from wgpt.generation.stopping import StuckDetector
from wgpt.model.inference import check_weight_dtype
from wgpt.ops.runtime import one_thread, resolve_device

log = logging.getLogger(__name__)

CHUNK_STEPS = 6  # of --stream: 80 ms
MOST_TAKES = 1024  # of --n: they are made together
MOST_SECONDS = 86_400  # of --out: a day is 8 GB of samples
CLIP_ENDED = "the model ended the clip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt generate`."""
    output = parser.add_argument_group("output")
    sampling = parser.add_argument_group("sampling")
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run folder, RUN@step-500, a model folder, starter, or user/model of the Hub",
    )
    parser.add_argument(
        "--download", action="store_true", help="let a model of the Hub be downloaded"
    )
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
        help=f"that of the residual codebooks; 0: most likely (default {FINE_TEMPERATURE:g})",
    )
    sampling.add_argument(
        "--fine-top-k",
        type=int,
        default=0,
        help="top k of the residual codebooks; 0: all (default 0)",
    )
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same samples (default 0)")
    output.add_argument(
        "--end-when-stuck",
        type=float,
        metavar="S",
        help="end after S seconds of nothing but silence or a loop of at most 8 tokens; 0: never "
        f"(default {ENDLESS_STUCK_S:g} without --seconds, else 0)",
    )
    parser.add_argument(
        "--weight-dtype",
        choices=WEIGHT_DTYPES,
        default="fp32",
        help="how weights are held, on the CPU: bf16 and int8 are faster (default fp32)",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default cpu)")
    output.add_argument("--json", action="store_true", help="print one JSON object per file")


def run(args: argparse.Namespace) -> int:
    """`wgpt generate`."""
    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.fine_temperature, args.fine_top_k
    )
    _check(args)
    seeds = range(args.seed, args.seed + args.n)
    Sampler(sampling, seeds)  # refuses a bad seed
    device = resolve_device(args.device)
    check_weight_dtype(args.weight_dtype, device)
    try:
        prompt = audio.read(args.prompt) if args.prompt else np.zeros(0, np.float32)
    except audio.AudioError as error:
        raise ConfigError(f"--prompt: {error}") from error
    with one_thread():
        generator = AudioGenerator.load(
            args.run, device, download=args.download, weight_dtype=args.weight_dtype
        )
        work = _stream if args.stream else _write
        work(args, generator, prompt, sampling, seeds)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what can be known to fail before a model is loaded."""
    if bool(args.out) == args.stream:
        raise ConfigError("generate: give one of --out AUDIO and --stream")
    if not 1 <= args.n <= MOST_TAKES:
        raise ConfigError(f"generate: --n must be in [1, {MOST_TAKES}], got {args.n}")
    if args.stream and (args.n > 1 or args.json):
        raise ConfigError(
            "generate: --stream writes one sound and no text to stdout; --n and --json need --out"
        )
    if args.stream and sys.stdout.isatty():
        raise ConfigError(
            "generate: --stream writes raw sound, got a terminal as stdout; pipe it into a player, "
            "such as | aplay -t raw -f S16_LE -r 24000 -c 1"
        )
    if args.seconds is not None:
        n_steps_of(args.seconds, "--seconds")
        if args.out and args.seconds > MOST_SECONDS:
            raise ConfigError(
                f"--seconds must be at most {MOST_SECONDS} with --out, which keeps the sound in "
                f"memory to its end, got {args.seconds:g}; --stream does not"
            )
    elif args.out:
        raise ConfigError("generate: --out needs --seconds")
    if args.end_when_stuck:
        StuckDetector(args.end_when_stuck)
    if args.out:
        _check_out(Path(args.out))


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(
            f"--out: the suffix must be one of {', '.join(WRITERS)}, got {out.suffix!r} in {out}"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}; make it first")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out: {out} cannot be written")


def _stream(
    args: argparse.Namespace,
    generator: AudioGenerator,
    prompt: np.ndarray,
    sampling: Sampling,
    seeds: Sequence[int],
) -> None:
    """Raw PCM to stdout until the end, or until nobody reads."""
    endless = args.seconds is None
    after_s = args.end_when_stuck
    if after_s is None:
        after_s = ENDLESS_STUCK_S if endless else 0.0
    stuck = StuckDetector(after_s) if after_s else None
    n_steps = None if endless else n_steps_of(args.seconds)
    listener, out, waiting = Listener(prompt, generator.prompt_gain(prompt)), sys.stdout.buffer, b""
    bar = tqdm(total=args.seconds, desc="generate", unit="s", unit_scale=True, disable=None)
    try:
        if args.with_prompt:
            out.write(_pcm(prompt, args.format))
        for n_done, step in enumerate(generator.steps(prompt, n_steps, sampling, args.seed), 1):
            listener.hear(step)
            waiting += _pcm(step.wave, args.format)
            reason = stuck.reason(step.made, step.tokens[0]) if stuck else None
            if n_done % CHUNK_STEPS == 0 or reason:
                out.write(waiting)
                out.flush()
                waiting = b""
            bar.update(1 / STEP_RATE_HZ)
            if reason:
                log.warning("ended after %.2f s: %s", n_done / STEP_RATE_HZ, reason)
                break
        out.write(waiting)
        out.flush()
    except BrokenPipeError:  # the listener left, which is how an endless stream ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        bar.close()
    for warning in listener.warnings():
        log.warning("%s", warning)


def _pcm(wave: np.ndarray, kind: str) -> bytes:
    """Little-endian samples; s16le clips at full scale."""
    if kind == "f32le":
        return wave.astype("<f4").tobytes()
    return np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()


class _Take:
    """One of --n continuations while it is made."""

    def __init__(self, listener: Listener, end_when_stuck_s: float | None) -> None:
        self.steps: list[Step] = []
        self.ended = ""  # why, before its time
        self.listener = listener
        self._stuck = StuckDetector(end_when_stuck_s) if end_when_stuck_s else None

    def add(self, step: Step) -> None:
        """The next step, unless it has ended."""
        if self.ended:
            return
        if step.ended:
            self.ended = CLIP_ENDED
            return
        self.steps.append(step)
        self.listener.hear(step)
        if self._stuck:
            self.ended = self._stuck.reason(step.made, step.tokens[0]) or ""


def _write(
    args: argparse.Namespace,
    generator: AudioGenerator,
    prompt: np.ndarray,
    sampling: Sampling,
    seeds: Sequence[int],
) -> None:
    """--n continuations, each in a file of its own."""
    gain = generator.prompt_gain(prompt)
    takes = [_Take(Listener(prompt, gain), args.end_when_stuck) for _ in seeds]
    n_steps = n_steps_of(args.seconds)
    batches = generator.steps_batch([prompt], n_steps, sampling, seeds)
    for batch in tqdm(batches, "generate", n_steps, unit="step", disable=None):
        for take, step in zip(takes, batch, strict=True):
            take.add(step)
        if all(take.ended for take in takes):
            break
    path = Path(args.out)
    for i, take in enumerate(takes):
        out = path if args.n == 1 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}")
        wave = np.concatenate([step.wave for step in take.steps])
        remove_leftovers(out.parent, out.name)
        audio.write(out, np.concatenate([prompt, wave]) if args.with_prompt else wave)
        if len(take.steps) < n_steps and not take.ended:
            take.ended = CLIP_ENDED
        seconds, warnings = len(wave) / SAMPLE_RATE_HZ, take.listener.warnings()
        if take.ended:
            log.warning("%s: ended after %.2f s: %s", out, seconds, take.ended)
        for warning in warnings:
            log.warning("%s: %s", out, warning)
        if not args.json:
            sys.stdout.write(f"{one_line(out)}\n")
            continue
        facts = {
            "out": str(out),
            "seed": seeds[i],
            "seconds": seconds,
            "tokens": [step.tokens[0] for step in take.steps],
            "entropy_nats": [round(step.entropy_nats, 4) for step in take.steps],
            "ended": take.ended,
            "warnings": warnings,
        }
        sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
