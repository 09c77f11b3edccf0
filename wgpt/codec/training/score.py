"""Measure a codec on clips it never saw, and write its folder: config, weights, card, pictures."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgpt import codec

logger = logging.getLogger(__name__)


def si_sdr_db(estimate: np.ndarray, target: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019), no mean removed."""
    scale = float(estimate @ target) / max(float(target @ target), 1e-12)
    kept = scale * target
    error = estimate - kept
    return 10 * math.log10(max(float(kept @ kept), 1e-12) / max(float(error @ error), 1e-12))


def stoi(estimate: np.ndarray, target: np.ndarray, sample_rate_hz: int) -> float | None:
    """Short-time objective intelligibility (Taal et al., 2011), None without pystoi."""
    try:
        from pystoi import stoi as measure
    except ImportError:
        return None
    return float(measure(target, estimate, sample_rate_hz, extended=False))


def evaluate(
    model: codec.Codec,
    clips: list[tuple[str, str, np.ndarray]],
    n_used: tuple[int, ...] = (1, 2, 4, 8),
) -> dict[str, Any]:
    """Mean SI-SDR and, for speech, STOI by kind of clip and number of codebooks.

    Args:
        model: the codec.
        clips: (kind, speaker, float32 (L,)).
        n_used: numbers of codebooks to decode from; those above K are left out.

    Returns:
        {kind: {"n_clips": n, "<k>": {"si_sdr_db": mean, "stoi": mean}}} and, under "codebooks",
        the perplexity of each codebook's use over all clips.
    """
    sums: dict[str, Any] = {}
    counts = torch.zeros(model.n_codebooks, model.codebook_size)
    for kind, _, wave in clips:
        tokens = model.encode(torch.from_numpy(np.ascontiguousarray(wave)))
        for k in range(model.n_codebooks):
            counts[k] += torch.bincount(tokens[k].cpu(), minlength=model.codebook_size)
        target = wave[: tokens.shape[1] * model.hop_samples]
        entry = sums.setdefault(kind, {"n_clips": 0})
        entry["n_clips"] += 1
        for k in (k for k in n_used if k <= model.n_codebooks):
            decoded = model.decode(tokens[:k]).cpu().numpy()
            values = entry.setdefault(str(k), {"si_sdr_db": [], "stoi": []})
            values["si_sdr_db"].append(si_sdr_db(decoded, target))
            if kind != "music":
                values["stoi"].append(stoi(decoded, target, model.sample_rate_hz))
    for entry in sums.values():
        for key, values in entry.items():
            if key != "n_clips":
                entry[key] = {
                    name: round(float(np.mean(v)), 3) for name, v in values.items()
                    if v and None not in v
                }  # fmt: skip
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1)
    sums["codebooks"] = {"perplexity": [round(float(e), 1) for e in entropy.exp()]}
    return sums


def count_used_entries(model: codec.Codec, waves: list[np.ndarray]) -> int:
    """How many entries of codebook 0 the waves use."""
    used: set[int] = set()
    for wave in waves:
        used.update(model.encode(torch.from_numpy(wave))[0].tolist())
    return len(used)


def draw_spectrograms(path: Path, panels: list[tuple[str, np.ndarray]], rate_hz: int) -> None:
    """A small PNG with one spectrogram per panel, in dB below the first panel's maximum."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6, 1.4 * len(panels)), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    window = torch.hann_window(768)
    top = None
    for i, (title, wave) in enumerate(panels):
        spectrum = torch.stft(torch.from_numpy(wave), 768, 192, window=window, return_complex=True)
        level = 20 * torch.log10(spectrum.abs() + 1e-6)
        top = float(level.max()) if top is None else top
        axes = figure.add_subplot(len(panels), 1, i + 1)
        axes.imshow(
            level.numpy() - top, origin="lower", aspect="auto", vmin=-70, vmax=0, cmap="magma",
            extent=(0, wave.size / rate_hz, 0, rate_hz / 2000),
        )  # fmt: skip
        axes.set_title(title, fontsize=8)
        axes.set_ylabel("kHz", fontsize=7)
        axes.tick_params(labelsize=6)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    picture.quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)


def export(
    folder: Path,
    config: Any,
    tensors: dict[str, Tensor],
    corpus: Any,
    training: dict[str, Any],
) -> dict[str, Any]:
    """Write the model folder and measure the files just written; replaces an older one.

    Args:
        folder: becomes config.json, model.safetensors (float16), README.md and *.png.
        config: transformers' EncodecConfig.
        tensors: weights and codebooks under transformers' names.
        corpus: a codec_corpus.Corpus.
        training: how it was trained, for the card.

    Returns:
        the figures, as `evaluate` gives them.
    """
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        halves = {k: v.to(torch.float16).contiguous() for k, v in tensors.items()}
        save_file(halves, str(new / "model.safetensors"), metadata={"format": "pt"})
        fields = config.to_diff_dict() | {"architectures": ["EncodecModel"]}
        fields.pop("transformers_version", None)
        (new / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        model = codec.load(new)
        clips = list(corpus.evaluation_clips())
        figures = evaluate(model, clips)
        rng = np.random.default_rng(0)
        n_crops = min(240, math.ceil(sum(corpus.minutes.values()) * 60 / 8))
        figures["codebooks"]["n_crops"] = n_crops
        crops = corpus.crops(rng, n_crops, 8 * model.sample_rate_hz).numpy()
        figures["codebooks"]["entries_used_of_codebook_0"] = count_used_entries(model, list(crops))
        for kind in ("held_out", "music", "recording"):
            wave = next((w for k, _, w in clips if k == kind), None)
            if wave is None:
                continue
            wave = wave[: 4 * model.sample_rate_hz // model.hop_samples * model.hop_samples]
            tokens = model.encode(torch.from_numpy(wave))
            panels = [(f"{kind.replace('_', ' ')}: original", wave)]
            for k in (8, 1):
                panels.append((f"{k} codebook(s)", model.decode(tokens[:k]).numpy()))
            draw_spectrograms(new / f"{kind}.png", panels, model.sample_rate_hz)
        size = (new / "model.safetensors").stat().st_size
        (new / "README.md").write_text(write_card(model, figures, training, corpus.minutes, size))
        _replace(folder, new)
    return figures


def _replace(folder: Path, new: Path) -> None:
    """Put the files of `new` into `folder`, each atomically, the weights last but for the card."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(new.iterdir(), key=lambda p: p.name):
        staged = folder / f".{path.name}.new"
        shutil.copyfile(path, staged)
        os.replace(staged, folder / path.name)


def write_card(
    model: codec.Codec,
    figures: dict[str, Any],
    training: dict[str, Any],
    minutes: dict[str, float],
    size_bytes: int,
) -> str:
    """The model card, in Markdown, of measured figures only."""
    names = {
        "seen": "training voices, new sentences",
        "held_out": "voices never heard in training",
        "music": "music pieces never heard",
        "recording": "recordings kept from training",
    }
    rows = []
    for kind, label in names.items():
        for k in ("1", "2", "4", "8"):
            if kind in figures and k in figures[kind]:
                values = figures[kind][k]
                intelligibility = values.get("stoi")
                rows.append(
                    f"| {label} ({figures[kind]['n_clips']} clips) | {k} | "
                    f"{values['si_sdr_db']:.1f} | "
                    + ("-" if intelligibility is None else f"{intelligibility:.3f}") + " |"
                )  # fmt: skip
    used = figures["codebooks"]["entries_used_of_codebook_0"]
    perplexities = ", ".join(f"{p:.0f}" for p in figures["codebooks"]["perplexity"])
    corpus = " and ".join(f"{m:.0f} minutes of {kind}" for kind, m in minutes.items())
    source = (
        "The speech was\nsynthesised by espeak-ng, the music by `wgpt.codec.training`; it never\n"
        "heard a human voice or an acoustic instrument."
        if training["synthetic"]
        else "The recordings came from a folder of the user."
    )
    pictures = "\n".join(
        f"![{kind}]({kind}.png)"
        for kind in ("held_out", "music", "recording") if kind in figures
    )  # fmt: skip
    note = "\n" + training["note"] + "\n" if training.get("note") else ""
    data = "" if training["synthetic"] else "--data RECORDINGS "
    limits = (
        """- Real recordings: it was trained on synthetic sound only. Expect audible noise and
  lost detail; use `encodec_24khz` for anything that matters.
- Above 11 kHz it learned nothing from speech: espeak-ng speaks at 22 050 Hz.
- Upper formants are smeared. Partials of music above 1 to 2 kHz are lost into noise, drum hits
  lose everything above 6 kHz, and with one codebook pitches wander."""
        if training["synthetic"]
        else "- Sound unlike the recordings it was trained on was not measured."
    )
    return f"""# {"mini" if training["synthetic"] else "A codec of your own"}: small and causal

EnCodec architecture, {model.sample_rate_hz} Hz mono, {model.frame_rate_hz:g} frames per second,
{model.n_codebooks} residual codebooks of {model.codebook_size} entries, {size_bytes / 1e6:.2f} MB
of float16 weights. Zero padding on the left only, so no token sees later audio. Load it with
`wgpt.codec.load(...)`, or with transformers' `EncodecModel.from_pretrained(...,
dtype=torch.float32)` (tokens are those of the float16-rounded weights, computed in float32).

## Measured

Means over whole clips, with the weights in this folder. SI-SDR in dB; STOI (pystoi) from 0 to 1.

| clips | codebooks | SI-SDR | STOI |
|---|---|---|---|
{chr(10).join(rows)}

Codebook 0 uses {used} of its {model.codebook_size} entries on
{figures["codebooks"]["n_crops"]} random training crops of 8 s.
Perplexity of the codebooks' use on the clips above: {perplexities}.

{pictures}

## Training

{corpus}; {training["steps"]} steps of {training["batch"]} crops of 0.507 s,
{training["minutes"]} minutes of training on a CPU. {source}
{note}
    python -m wgpt.codec.training.train {data}--work WORK --out OUT --steps {training["steps"]} \\
        --batch {training["batch"]} --seed {training["seed"]}

repeats the recipe (the schedule then runs by steps, and rounding depends on the machine, so the
weights come out similar, not equal).

## What it cannot do

{limits}
- It was judged by the measures above and by spectrograms, not by a listening test.
"""
