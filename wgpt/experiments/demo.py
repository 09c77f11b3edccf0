"""The whole pipeline in minutes: shipped speech and rendered music in, a report out."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgpt import audio, codec
from wgpt.audio.mel import MelFrontend
from wgpt.codec.training import synth
from wgpt.config import HOP_SAMPLES, SAMPLE_RATE_HZ, STEP_RATE_HZ, TrainConfig
from wgpt.data import prepare
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.evaluation.codec_ceiling import codec_ceiling
from wgpt.evaluation.frechet import distances
from wgpt.experiments.arms import PLANS, Plan
from wgpt.experiments.collected import run_folder
from wgpt.experiments.report import write_report
from wgpt.experiments.study import study
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.listener import Listener
from wgpt.generation.sampling import Sampling
from wgpt.ops.runtime import one_thread, resolve_device
from wgpt.runs import plots, pretrained
from wgpt.training import train

log = logging.getLogger(__name__)

GROUPS = ("speech", "music")
CODEC = "mini"  # that of `starter`, from which the model of all codebooks is fine-tuned
HELD_OUT = 6  # every sixth sentence, and piece of music, is for validation
SAMPLING = Sampling(top_k=100, end_of_clip=False)  # as long as the true rest
# Windows of 3.4 s and a high rate suit a million parameters and 25 minutes of sound.
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "context_s": 256 / STEP_RATE_HZ,
    "lr": 3e-3,
    "warmup_steps": 50,
    "eval_every": 50,
    "eval_audio_s": 60.0,
    "patience": 0,  # all arms take all steps
    "save_every": 0,
    "sample_s": 0.0,
}
PLAN = Plan(
    "demo",
    tuple(PLANS["quick"].arm(name) for name in ("tokens", "hybrid", "decoded-1")),
    twin="tokens",
    model={},
    train=SETTINGS,
)
# The package's model saw hours of music: it is fine-tuned gently, or it would forget them.
FINE_TUNING: dict[str, Any] = {"lr": 5e-4, "fine_weight": 1.0, "fine_share": 0.25}


@dataclass(frozen=True)
class Sizes:
    """How much sound a demo takes in and makes."""

    speech_clips: int = 0  # of those in the package; 0: all
    music_clips: int = 24
    music_clip_s: float = 15.0
    prompt_s: float = 3.0
    continuation_s: float = 5.0
    n_prompts: int = 12  # of each kind, for the distance of continuations to real sound
    n_shown: int = 2  # of those, in the report

    @property
    def sound_samples(self) -> int:
        """Length of a prompt and its rest, whole steps."""
        return round((self.prompt_s + self.continuation_s) * STEP_RATE_HZ) * HOP_SAMPLES

    @property
    def prompt_samples(self) -> int:
        return round(self.prompt_s * STEP_RATE_HZ) * HOP_SAMPLES


def demo(
    out: str | Path,
    steps: int,
    device: str = "auto",
    sizes: Sizes | None = None,
    jobs: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Runs everything into `out` and writes out/report.html.

    Args:
        out: a folder, new or empty.
        steps: training steps of each arm; the model of all codebooks takes half as many.
        device: of the training; sound is made on the CPU.
        sizes: how much sound; Sizes() by default.
        jobs: processes that prepare; 0: one for each core.
        settings: TrainConfig fields of every training, instead of SETTINGS.

    Returns the study's result with {sounds, likeness, codec, seconds}.
    """
    out, sizes = Path(out), sizes or Sizes()
    if steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {steps}")
    settings = {**SETTINGS, **settings}
    TrainConfig(**settings, max_steps=steps, device=resolve_device(device))  # before any work
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out: {out} is not empty; name a new folder, or remove it first")
    plots.require("wgpt demo")
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        seconds[stage] = time.monotonic() - began - sum(seconds.values())
        log.info("%s took %.0f s", stage, seconds[stage])

    recordings = gather_audio(out / "audio", sizes)
    done("gathering audio")
    n_codebooks = codec.load(CODEC).n_codebooks
    decoded_all = f"decoded-{n_codebooks}"  # the mel of what a model of all codebooks makes
    prepare(
        recordings,
        out / "data",
        codec=CODEC,
        mel_sources=("wave", "decoded-1", decoded_all),
        jobs=jobs or os.cpu_count() or 1,
    )
    done("preparing")
    result = study(out / "data", out / "study", PLAN, max_steps=steps, device=device, **settings)
    done("training and scoring")
    # From the package's model, fine-tuned: all codebooks, and the mel that it will read.
    full = {**settings, **FINE_TUNING, "max_steps": max(steps // 2, 1), "eval_every": 0,
            "device": device, "mel_source": decoded_all}  # fmt: skip
    train(out / "data", out / "full", None, init=pretrained.NAME, **full)
    done("training all codebooks")
    with one_thread():
        result["sounds"] = [sound for group in GROUPS for sound in sounds(out, group, sizes)]
        done("sampling")
        result["likeness"] = {group: compare(out, group, sizes) for group in GROUPS}
    done("comparing with real sound")
    dataset = Dataset(out / "data")
    frontend = MelFrontend(dataset.mel_config)
    result["codec"] = codec_ceiling(dataset.split("valid"), codec.load(CODEC), frontend)
    result["seconds"] = {stage: round(value, 1) for stage, value in seconds.items()}
    write_report(out, result, steps, sizes.prompt_s)
    return result


def gather_audio(folder: Path, sizes: Sizes | None = None) -> Path:
    """The package's speech and freshly rendered music, as folder/speech and folder/music.

    The speech is one reader's: the package holds no second human voice whose licence allows it.

    Returns folder/recordings.csv, which lists them and holds out every sixth sentence and piece.
    """
    sizes = sizes or Sizes()
    (folder / "speech").mkdir(parents=True)
    (folder / "music").mkdir()
    with resources.as_file(resources.files("wgpt") / "assets" / "speech") as shipped:
        for path in audio.find(shipped)[: sizes.speech_clips or None]:
            shutil.copy(path, folder / "speech" / path.name)
    for seed in range(sizes.music_clips):
        wave = synth.render_music(sizes.music_clip_s, seed=seed)
        audio.write(folder / "music" / f"music-{seed:03d}.flac", wave)
    lines = ["path,group,split"]
    for group in GROUPS:
        for number, path in enumerate(audio.find(folder / group)):
            split = "train" if number % HELD_OUT else "valid"
            lines.append(f"{group}/{path.name},{group},{split}")
    listed = folder / "recordings.csv"
    listed.write_text("\n".join(lines) + "\n")
    return listed


def _runs(out: Path) -> tuple[Path, Path]:
    """The runs that speak: hybrid, and full."""
    return run_folder(out / "study", "hybrid", 0), out / "full"


def unheard(out: Path, group: str, sizes: Sizes) -> list[tuple[str, np.ndarray]]:
    """Names and waves of up to n_prompts sounds, a prompt and its rest, that no model was
    trained on: music rendered anew, sentences held out."""
    n_samples = sizes.sound_samples
    if group == "music":
        seeds = range(sizes.music_clips, sizes.music_clips + sizes.n_prompts)
        length_s = n_samples / SAMPLE_RATE_HZ
        return [(f"music of seed {seed}", synth.render_music(length_s, seed=seed)[:n_samples])
                for seed in seeds]  # fmt: skip
    waves = [
        (source["path"], audio.read(out / "audio" / source["path"])[:n_samples])
        for source in Dataset(out / "data").manifest["sources"]
        if source.get("split") == "valid" and source["group"] == group
    ]
    return [(name, wave) for name, wave in waves if len(wave) == n_samples][: sizes.n_prompts]


def sounds(out: Path, group: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Writes sounds that no model was trained on, their codec round trips and their continuations.

    Returns for each {group, source, waves: paths relative to `out`, warnings: of continuations}.
    """
    hybrid, full = (AudioGenerator.load(run) for run in _runs(out))
    folder, found = out / "sounds", []
    folder.mkdir(exist_ok=True)
    for number, (source, wave) in enumerate(unheard(out, group, sizes)[: sizes.n_shown], 1):
        prompt = wave[: sizes.prompt_samples]
        codes = full.codec.encode(torch.from_numpy(wave))
        waves = {
            "recording": wave,
            "codec": full.codec.decode(codes).numpy(),
            "codec_codebook_0": full.codec.decode(codes[:1]).numpy(),
        }
        warnings = {}
        for name, model, heard in (
            ("full", full, "codec"),
            ("hybrid", hybrid, "codec_codebook_0"),
        ):
            n_steps = (len(wave) - len(prompt)) // HOP_SAMPLES
            listener = Listener(prompt, model.prompt_gain(prompt))
            made = [waves[heard][: len(prompt)]]
            for step in model.steps(prompt, n_steps, SAMPLING, seed=0):
                listener.hear(step)
                made.append(step.wave)
            waves[name], warnings[name] = np.concatenate(made), listener.warnings()
        paths = {name: f"sounds/{group}_{number}_{name}.wav" for name in waves}
        for name, path in paths.items():
            audio.write(out / path, waves[name])
        found.append({"group": group, "source": source, "waves": paths, "warnings": warnings})
    return found


def compare(out: Path, group: str, sizes: Sizes) -> dict[str, dict[str, float]]:
    """distances, against the training split, of continuations of held-out prompts:
    without and with the residual codebooks."""
    split = Dataset(out / "data").split("train")
    clips = [clip for clip in range(split.n_clips) if split.groups[clip] == group]
    mel, offsets = split.mel_array("wave"), split.offsets
    reference = [np.asarray(mel[offsets[clip] : offsets[clip + 1]]) for clip in clips]
    titles = "codebook 0 (hybrid)", "all codebooks (full)"
    generators = {title: AudioGenerator.load(run)
                  for title, run in zip(titles, _runs(out), strict=True)}  # fmt: skip
    waves = [wave for _, wave in unheard(out, group, sizes)]
    return distances(waves, sizes.prompt_s, generators, reference, SAMPLING)
