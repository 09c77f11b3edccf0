"""Pictures: loss curves of runs, spectrograms of sounds, a prompt and its continuation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wgpt.config import HOP_SAMPLES, STEP_RATE_HZ
from wgpt.runs.metrics import read_metrics


def _axes(
    n_rows: int,
    n_columns: int,
    size: tuple[float, float],
    heights: Sequence[float] | None = None,
    sharex: bool = False,
) -> tuple[Any, Any]:
    """A figure and its (n_rows, n_columns) axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(
        n_rows, n_columns, squeeze=False, height_ratios=heights, sharex=sharex
    )


def loss_curves(
    run: str | Path, out: str | Path | None = None, others: Sequence[str | Path] = ()
) -> Path:
    """Training and validation NLL against step and epoch, to RUN/plots/loss.png or `out`.

    `others` are further run folders drawn into the same picture (validation only).
    """
    out = Path(out) if out else Path(run) / "plots" / "loss.png"
    figure, axes = _axes(1, 2, (11, 4))
    for index, folder in enumerate([run, *others]):
        rows = read_metrics(Path(folder) / "metrics.csv")
        name = Path(folder).name
        for axis, key in zip(axes[0], ("step", "epoch"), strict=True):
            train = [(float(r[key]), float(r["nll_nats"])) for r in rows if r["split"] == "train"]
            valid = [(float(r[key]), float(r["nll_nats"])) for r in rows if r["split"] == "valid"]
            if train and not others:
                axis.plot(*zip(*train, strict=True), color="0.75", lw=0.8, label="training batch")
            if valid:
                axis.plot(
                    *zip(*valid, strict=True), f"C{index}o-", ms=3, label=f"{name}, validation"
                )
            axis.set_xlabel(key)
            axis.set_ylabel("NLL, nats per coarse token")
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _draw_mel(axis: Any, mel: np.ndarray, start_s: float, loudest: float) -> None:
    """Log-mel (T, M) from start_s on, over the 10 nats below `loudest`."""
    end_s = start_s + len(mel) / STEP_RATE_HZ
    axis.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=loudest - 10,
        vmax=loudest,
        extent=(start_s, end_s, 0, mel.shape[1]),
    )


def spectrograms(sounds: Sequence[tuple[str, np.ndarray]], out: str | Path) -> Path:
    """Log-mel slices of several sounds, one under the other on one time axis.

    sounds: (title, log-mel float (T, M)) pairs, natural logarithm, T in steps of 1/75 s.
    """
    figure, axes = _axes(len(sounds), 1, (11, 2.2 * len(sounds)))
    high = max(float(mel.max()) for _, mel in sounds if mel.size)
    longest_s = max(len(mel) for _, mel in sounds) / STEP_RATE_HZ
    for axis, (title, mel) in zip(axes[:, 0], sounds, strict=True):
        _draw_mel(axis, mel, 0.0, high)
        axis.set_xlim(0, longest_s)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("mel bin")
    axes[-1, 0].set_xlabel("seconds")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return Path(out)


def continuation(
    wave: np.ndarray,
    mel: np.ndarray,
    *,
    n_prompt: int,
    n_steps: int,
    prompt_tokens: Sequence[int],
    tokens: Sequence[int],
    entropies: Sequence[float],
    codebook_size: int,
) -> Any:
    """A figure of a prompt and what was made of it: waveform, log-mel, coarse tokens, entropy.

    Time 0 is the end of the prompt, and the axis has room for all that is still to come.

    Args:
        wave: float (steps so far * 320,), prompt included, 24 kHz.
        mel: float (steps so far, M), natural logarithm.
        n_prompt, n_steps: steps of the prompt, and of the whole continuation.
        prompt_tokens: coarse tokens of the prompt's steps.
        tokens, entropies: of each step of the continuation so far; nats.
        codebook_size: entries V; ln(V) is the entropy of knowing nothing.
    """
    figure, axes = _axes(4, 1, (9.5, 6.2), heights=(1, 1.8, 0.9, 0.9), sharex=True)
    sound, spectrum, codes, doubt = axes[:, 0]
    start_s, end_s = -n_prompt / STEP_RATE_HZ, n_steps / STEP_RATE_HZ
    samples = wave[: len(mel) * HOP_SAMPLES].reshape(-1, HOP_SAMPLES)
    seconds = start_s + np.arange(len(mel)) / STEP_RATE_HZ
    for steps, colour in ((slice(n_prompt), "0.45"), (slice(n_prompt, None), "C1")):
        low, high = samples[steps].min(axis=1), samples[steps].max(axis=1)
        sound.fill_between(seconds[steps], low, high, color=colour, lw=0.5, step="post")
    sound.set_ylim(-1, 1)
    sound.set_ylabel("wave")
    loudest = float(mel.max()) if mel.size else 0.0
    _draw_mel(spectrum, mel, start_s, loudest)
    spectrum.set_ylabel("log-mel bin")
    steps_s = (np.arange(len(tokens)) + 0.5) / STEP_RATE_HZ
    prompt_s = start_s + (np.arange(len(prompt_tokens)) + 0.5) / STEP_RATE_HZ
    codes.plot(prompt_s, prompt_tokens, ".", ms=3.5, mew=0, color="0.45")
    codes.plot(steps_s, tokens, ".", ms=3.5, mew=0, color="C1")
    codes.set_ylim(0, codebook_size)
    codes.set_ylabel("coarse token")
    most = np.log(codebook_size)
    doubt.plot(steps_s[: len(entropies)], entropies, color="C0", lw=0.9)
    doubt.axhline(most, color="0.6", lw=0.8, ls=":")
    doubt.set_ylim(0, 1.05 * most)
    doubt.set_ylabel("entropy, nats")
    doubt.set_xlabel("seconds after the prompt")
    for axis in axes[:, 0]:
        axis.set_xlim(start_s, end_s)
        axis.axvline(0, color="0.2", lw=1.0)
    if n_prompt:
        sound.text(0, 1.06, "prompt ", ha="right", color="0.45", fontsize=9)
    sound.text(0, 1.06, " continuation", ha="left", color="C1", fontsize=9)
    figure.align_ylabels()
    return figure
