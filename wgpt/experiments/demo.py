"""The whole pipeline in minutes: shipped speech and rendered music in, a report out."""

from __future__ import annotations

import logging
import os
import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgpt import audio, codec
from wgpt.audio.mel import MelFrontend
from wgpt.codec.training import synth
from wgpt.config import SAMPLE_RATE_HZ, STEP_RATE_HZ
from wgpt.data import prepare
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.evaluation.codec_ceiling import codec_ceiling
from wgpt.evaluation.frechet import distances
from wgpt.evaluation.tables import distance_table
from wgpt.experiments import study
from wgpt.generation.generator import AudioGenerator
from wgpt.generation.sampling import Sampling
from wgpt.ops.runtime import one_thread
from wgpt.runs import plots, pretrained
from wgpt.training import train

log = logging.getLogger(__name__)

PROMPT_S = 3.0
CONTINUATION_S = 5.0
MUSIC_CLIPS = 24
MUSIC_CLIP_S = 15.0
GROUPS = ("speech", "music")
N_PROMPTS = 12  # of each kind, for the distance of continuations to real sound
SAMPLING = Sampling(top_k=100)  # as `wgpt generate` does
# Windows of 3.4 s and a high rate suit a million parameters and 25 minutes of sound.
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "context_s": 256 / STEP_RATE_HZ,
    "lr": 3e-3,
    "warmup_steps": 50,
    "eval_every": 100,
    "eval_audio_s": 60.0,
    "save_every": 0,
    "sample_s": 0.0,
}
# The package's model saw hours of music; it goes on gently, or it would forget them.
SPEAKING: dict[str, Any] = {"lr": 5e-4, "fine_weight": 1.0, "fine_share": 0.25}


def demo(out: str | Path, steps: int, device: str = "auto") -> dict[str, Any]:
    """Runs everything into `out` (which must be new or empty). Returns the study's result."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out: {out} is not empty; name a new folder, or remove it first")
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        seconds[stage] = time.monotonic() - began - sum(seconds.values())
        log.info("%s took %.0f s", stage, seconds[stage])

    gather_audio(out / "audio")
    done("gathering audio")
    jobs = os.cpu_count() or 1
    n_codebooks = codec.load("mini").n_codebooks
    spoken = f"decoded-{n_codebooks}"  # the mel that a model with all codebooks hears of itself
    prepare(out / "audio", out / "data", mel_sources=("wave", "decoded-1", spoken), jobs=jobs)
    done("preparing")
    result = study.study(
        out / "data", out / "runs", size="xs", arms=["tokens", "hybrid", "decoded-1"],
        max_steps=steps, device=device, **SETTINGS,
    )  # fmt: skip
    done("training and scoring")
    # From the package's model, one that speaks: all codebooks, and the mel that it will hear.
    speaking = {"max_steps": max(steps // 2, 1), "eval_every": 0, "device": device}
    train(
        out / "data", out / "runs" / "full", None, init=pretrained.NAME,
        **{**SETTINGS, **SPEAKING, **speaking, "mel_source": spoken},
    )  # fmt: skip
    done("training all codebooks")
    with one_thread():
        result["sounds"] = [sounds(out, group) for group in GROUPS]
        done("sampling")
        result["likeness"] = {group: compare(out, group) for group in GROUPS}
    done("comparing with real sound")
    result["codec"] = _ceiling(out)
    result["seconds"] = {stage: round(value, 1) for stage, value in seconds.items()}
    (out / "report.md").write_text(report(result, steps))
    return result


def gather_audio(folder: Path) -> None:
    """The package's speech and freshly rendered music, as folder/speech and folder/music."""
    (folder / "speech").mkdir(parents=True)
    (folder / "music").mkdir()
    with resources.as_file(resources.files("wgpt") / "assets" / "speech") as shipped:
        for path in audio.find(shipped):
            shutil.copy(path, folder / "speech" / path.name)
    for seed in range(MUSIC_CLIPS):
        wave = synth.render_music(MUSIC_CLIP_S, seed=seed)
        audio.write(folder / "music" / f"music-{seed:03d}.flac", wave)


def sounds(out: Path, group: str) -> dict[str, Any]:
    """Writes a validation prompt, its codec round trips, the hybrid's continuation, one with all
    codebooks, and their spectrograms. Returns their paths, relative to `out`."""
    dataset = Dataset(out / "data")
    source = next(
        s
        for s in dataset.manifest["sources"]
        if s["split"] == "valid" and s["group"] == group and s["steps"] > PROMPT_S * STEP_RATE_HZ
    )
    prompt = audio.read(out / "audio" / source["path"])[: int(PROMPT_S * SAMPLE_RATE_HZ)]
    generator = AudioGenerator.load(out / "runs" / "hybrid")
    codes = generator.codec.encode(torch.from_numpy(prompt))
    coarse, whole = generator.codec.decode(codes[:1]).numpy(), generator.codec.decode(codes).numpy()
    full = AudioGenerator.load(out / "runs" / "full")
    continued = [
        model.generate(prompt, CONTINUATION_S, SAMPLING, seed=0) for model in (generator, full)
    ]
    waves = {
        "prompt": prompt,
        "all_codebooks": whole,
        "codebook_0": coarse,
        "continuation": np.concatenate([coarse, continued[0]]),
        "full_continuation": np.concatenate([whole, continued[1]]),
    }
    folder = out / "sounds"
    folder.mkdir(exist_ok=True)
    for name, wave in waves.items():
        audio.write(folder / f"{group}_{name}.wav", wave)
    titles = {
        "prompt": f"{group}: prompt",
        "all_codebooks": "codec round trip, all codebooks",
        "codebook_0": "codec round trip, codebook 0",
        "continuation": f"codebook 0 of the prompt, then the model from {PROMPT_S:g} s on",
        "full_continuation": f"all codebooks, the model from {PROMPT_S:g} s on",
    }
    mels = [
        (titles[name], generator.frontend(torch.from_numpy(wave)).numpy())
        for name, wave in waves.items()
    ]
    picture = plots.spectrograms(mels, folder / f"{group}.png")
    return {
        "group": group,
        "source": source["path"],
        "picture": str(picture.relative_to(out)),
        "waves": {name: f"sounds/{group}_{name}.wav" for name in waves},
    }


def compare(out: Path, group: str) -> dict[str, dict[str, float]]:
    """distances, against the training split, of continuations of prompts that no model
    heard: without and with the finer codebooks."""
    split = Dataset(out / "data").split("train")
    clips = [clip for clip in range(split.n_clips) if split.groups[clip] == group]
    mel, offsets = split.mel_array("wave"), split.offsets
    reference = [np.asarray(mel[offsets[clip] : offsets[clip + 1]]) for clip in clips]
    runs = {"codebook 0 (hybrid)": "hybrid", "all codebooks (full)": "full"}
    generators = {title: AudioGenerator.load(out / "runs" / name) for title, name in runs.items()}
    return distances(_unheard(out, group), PROMPT_S, generators, reference, SAMPLING)


def _unheard(out: Path, group: str) -> list[np.ndarray]:
    """Up to N_PROMPTS sounds of a prompt's and a continuation's length: music rendered anew, speech
    from the validation split."""
    n_samples = round((PROMPT_S + CONTINUATION_S) * SAMPLE_RATE_HZ)
    if group == "music":
        seeds = range(MUSIC_CLIPS, MUSIC_CLIPS + N_PROMPTS)
        return [synth.render_music(PROMPT_S + CONTINUATION_S, seed=seed) for seed in seeds]
    waves = [
        audio.read(out / "audio" / source["path"])[:n_samples]
        for source in Dataset(out / "data").manifest["sources"]
        if source["split"] == "valid" and source["group"] == group
    ]
    return [wave for wave in waves if len(wave) == n_samples][:N_PROMPTS]


def _ceiling(out: Path) -> list[dict[str, Any]]:
    dataset = Dataset(out / "data")
    return codec_ceiling(
        dataset.split("valid"), codec.load("mini"), MelFrontend(dataset.mel_config)
    )


def report(result: dict[str, Any], steps: int) -> str:
    """report.md: the table, the curves, the pictures and links to the sounds."""
    totals = Dataset(result["data"]).manifest["totals"]
    minutes = sum(totals[name]["steps"] for name in totals) / STEP_RATE_HZ / 60
    lines = [
        "# wgpt demo",
        "",
        f"{minutes:.0f} minutes of audio; each model below about 1.1 M parameters, {steps} steps. "
        "The numbers are those of this run on this machine: small models, briefly trained.",
        "",
        "`hybrid` reads tokens and mel slices, `tokens` is its token-only twin, `decoded-1` reads "
        "the mel of audio decoded from codebook 0, which adds no information to the tokens.",
        "",
        study.as_markdown(result),
        "",
        "Codec ceiling, mean log-mel error of the decoded validation audio: "
        + ", ".join(
            f"{row['log_mel_error_db']:.2f} dB with {row['codebooks']} codebook(s)"
            for row in result["codec"]
        )
        + ".",
        "",
        "![loss curves](runs/loss.png)",
        "",
        "## Continuations",
        "",
        f"Of {CONTINUATION_S:g} s that follow prompts of {PROMPT_S:g} s which no model heard. "
        "*Frechet*: distance to the training audio, as distributions of log-mel slices and their "
        "changes. *Spectrum*: distance of a continuation's average log-mel to that of its true "
        "rest. *Periodicity*: how clearly voices and notes sound, 1 for a tone, 0.1 for noise. "
        "*codec* is the true rest decoded from its own codes, a model's ceiling. `hybrid` learnt "
        "all it knows in this run. `full` did not: it begins from `starter`, the package's model, "
        "which heard hours of other synthesised speech and music (its card says which), and goes "
        "on here for half as many steps.",
        "",
        distance_table(result["likeness"]),
    ]
    for item in result["sounds"]:
        lines += ["", f"## {item['group']}", "", f"![spectrograms]({item['picture']})", ""]
        lines += [f"- [{name}]({path})" for name, path in item["waves"].items()]
    lines += ["", "## Time", ""]
    lines += [f"- {stage}: {value:.0f} s" for stage, value in result["seconds"].items()]
    return "\n".join(lines) + "\n"
