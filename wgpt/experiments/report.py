"""report.html of a demo: one file that plays. Sounds, pictures and script are inside it."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wgpt import audio
from wgpt.audio.mel import MelFrontend
from wgpt.config import STEP_RATE_HZ
from wgpt.data.dataset import Dataset
from wgpt.experiments.html_parts import inline, page, table, text
from wgpt.experiments.study_tables import shown_gap
from wgpt.files import write_atomically
from wgpt.runs import plots

# What is shown of each sound: (its name in `sounds`, title, what it is).
SHOWN = (
    ("recording", "The recording", "prompt, then its true rest: one right answer of many"),
    ("codec", "After the codec", "all codebooks of the recording: the ceiling of `full`"),
    ("full", "Continued by full", "the codec's prompt, then the model with all codebooks"),
    ("hybrid", "Continued by hybrid", "codebook 0 alone, of the prompt and of the model"),
)
DISTANCES = (
    ("frechet_db", "Frechet, dB"),
    ("spectrum_db", "spectrum, dB"),
    ("periodicity", "periodicity"),
)


def write_report(out: Path, result: dict[str, Any], steps: int, prompt_s: float) -> Path:
    """Writes out/report.html from the result of a demo and the sounds in `out`.

    Args:
        out: folder of the demo, with data, study/loss.png and sounds.
        result: what `demo` returns.
        steps: training steps of each arm.
        prompt_s: length of the prompts, s.
    """
    dataset = Dataset(out / "data")
    minutes = sum(total["steps"] for total in dataset.manifest["totals"].values()) / STEP_RATE_HZ
    frontend = MelFrontend(dataset.mel_config)
    parts = [
        f"<p class=lead>{minutes / 60:.0f} minutes of one reader's speech and of rendered music, "
        f"models of about a million parameters, {steps} training steps each. Everything below was "
        "made on this machine, and its numbers are of this run.</p>",
        "<h2>Listen</h2>",
        "<p>No model was trained on these recordings. They know other sentences of the reader; the "
        f"codec was trained on these sentences too. Up to the dashed line, {prompt_s:g} s, is the "
        "prompt. Click into a picture to play from there.</p>",
    ]
    for sound in result["sounds"]:
        parts.append(_example(out, sound, frontend, prompt_s))
    parts += [
        "<h2>What the mel slices are worth</h2>",
        "<p>NLL of the next coarse token on the validation split, in nats; lower is better. "
        "<b>tokens</b> reads tokens alone, <b>hybrid</b> reads mel slices too, <b>decoded-1</b> is "
        "the control: its slices come from codebook 0, which tells it nothing that the tokens do "
        "not. The interval is a 95&nbsp;% bootstrap over clips.</p>",
        _scores(result["rows"], result["gaps"]),
        f'<img class=wide alt="validation NLL, and differences to tokens" '
        f'src="{inline((out / "study" / "loss.png").read_bytes(), "image/png")}">',
        "<h2>How like real sound the continuations are</h2>",
        "<p><i>Frechet</i>: distance to the training audio as distributions of log-mel slices and "
        "their changes. <i>Spectrum</i>: distance of a continuation's average log-mel to that of "
        "its true rest. <i>Periodicity</i>: how clearly voices and notes sound, 1 for a tone, 0.1 "
        "for noise. <i>codec</i> rows are the true rest decoded from its own codes: a model's "
        "ceiling. <code>hybrid</code> learnt all it knows in this run; <code>full</code> began "
        "from <code>starter</code>, the package's model, and took half as many steps.</p>",
        _distances(result["likeness"]),
        "<p>Codec ceiling, mean log-mel error of the decoded validation audio: "
        + ", ".join(
            f"{row['log_mel_error_db']:.2f} dB with {row['codebooks']} codebook(s)"
            for row in result["codec"]
        )
        + ".</p>",
        "<h2>Time</h2>",
        table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in result["seconds"].items()]),
    ]
    path = out / "report.html"
    write_atomically(path, page("wgpt demo", parts))
    return path


def _example(out: Path, sound: dict[str, Any], frontend: MelFrontend, prompt_s: float) -> str:
    """One prompt: its true rest, the codec's version and the continuations, side by side."""
    waves = {name: audio.read(out / path) for name, path in sound["waves"].items()}
    mels = {name: frontend(torch.from_numpy(wave)).numpy() for name, wave in waves.items()}
    step = frontend.config.frames_per_step
    loudest = float(mels["recording"].max())
    left, _, width, _ = (100 * share for share in plots.AXES)
    cards = []
    for name, title, what in SHOWN:
        figure = plots.spectrogram(
            mels[name][::step], loudest, split_s=prompt_s, config=frontend.config
        )
        with tempfile.TemporaryDirectory() as folder:
            picture = plots.save(figure, Path(folder) / "s.png").read_bytes()
            audio.write(Path(folder) / "s.mp3", waves[name])
            voice = (Path(folder) / "s.mp3").read_bytes()
        warnings = "".join(
            f"<p class=warning>{html.escape(warning)}</p>"
            for warning in sound["warnings"].get(name, ())
        )
        cards.append(
            f"<figure><figcaption><b>{text(title)}</b><br>{text(what)}</figcaption>"
            f'<div class=picture data-left="{left:.2f}" data-width="{width:.2f}">'
            f'<img alt="log-mel spectrogram, Hz against seconds" '
            f'src="{inline(picture, "image/png")}"><i></i></div>'
            f'<audio controls preload=metadata src="{inline(voice, "audio/mpeg")}"></audio>'
            f"{warnings}</figure>"
        )
    heading = f"{sound['group']} <small>{html.escape(sound['source'])}</small>"
    return f"<h3>{heading}</h3>\n<div class=cards>\n" + "\n".join(cards) + "\n</div>"


def _scores(rows: Sequence[dict[str, Any]], gaps: Sequence[dict[str, Any]]) -> str:
    """NLL of every model by group, and the gap to the twin."""
    groups = sorted({row["group"] for row in rows} - {"all"}, key=lambda g: (g != "speech", g))
    groups = groups or ["all"]
    nats = {(row["model"], row["group"]): row["nll_nats"] for row in rows}
    by_arm = {(gap["arm"], gap["group"]): gap for gap in gaps}
    header = ["model"]
    for group in groups:
        header += [f"{group}: NLL", "minus tokens"]
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [model]
        for group in groups:
            gap = by_arm.get((model, group))
            cells += [f"{nats[model, group]:.3f}", "" if gap is None else _gap(gap)]
        body.append(cells)
    return table(header, body)


def _gap(gap: dict[str, Any]) -> str:
    """`-0.262 (-0.275 to -0.249)`, with minus signs."""
    return shown_gap(gap).replace("-", "\u2212")


def _distances(likeness: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ["continuation", *(f"{kind}: {title}" for kind in likeness for _, title in DISTANCES)]
    body = [
        [name, *(f"{of_kind[name][key]:.2f}" for of_kind in likeness.values()
                 for key, _ in DISTANCES)]
        for name in next(iter(likeness.values()))
    ]  # fmt: skip
    return table(header, body)
