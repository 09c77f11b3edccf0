"""Pictures: loss curves of runs, spectrograms of sounds.

Functions that return a figure draw; `save` and those that take `out` write a PNG.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wgpt.audio.mel import hz_to_mel
from wgpt.config import STEP_RATE_HZ, MelConfig
from wgpt.errors import ConfigError
from wgpt.files import replacing
from wgpt.runs.metrics import read_metrics

DPI = 110
DB_PER_NEPER = 10 / np.log(10)  # mel values are natural logarithms of power
RANGE_DB = 10 * DB_PER_NEPER  # shown below the loudest bin: 43 dB
TICKS_HZ = (250, 500, 1000, 2000, 4000, 8000)
# Where `spectrogram` puts its axes, in shares of the picture: left, bottom, width, height. A page
# can lay a playhead over them.
AXES = (0.115, 0.2, 0.765, 0.72)


def require(what: str) -> None:
    """Raises ConfigError where `what` cannot be drawn: before the work whose picture it is."""
    if not can_draw():
        raise ConfigError(f"{what} needs matplotlib for its pictures: pip install 'wgpt[plots]'")


def can_draw() -> bool:
    """Whether there is a matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(size: tuple[float, float], **options: Any) -> Any:
    """An empty figure that needs no display. size: inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def _axes(n_rows: int, n_columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its (n_rows, n_columns) axes."""
    figure = _figure(size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def save(figure: Any, out: str | Path) -> Path:
    """Writes a figure as PNG, with the folders above it."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, durable=False) as temporary:
        figure.savefig(temporary, format="png")
    return out


# -- losses ----------------------------------------------------------------------------------------


def loss_curves(run: str | Path, out: str | Path | None = None) -> Path:
    """`loss_figure` of a run, to RUN/plots/loss.png or `out`."""
    return save(loss_figure(run), out or Path(run) / "plots" / "loss.png")


def loss_figure(run: str | Path) -> Any:
    """NLL of the training batches and of validation against steps, epochs on the upper axis.

    The axis leaves out the first tenth of the training, whose fall would flatten all the rest.
    """
    rows = read_metrics(Path(run) / "metrics.csv")
    figure, axes = _axes(1, 1, (7, 4))
    axis = axes[0, 0]
    train, valid = (_curve(rows, split) for split in ("train", "valid"))
    axis.plot(*train, color="0.75", lw=0.8, label="training batch")
    axis.plot(*valid, "C0o-", ms=4, label="validation")
    _zoom(axis, [train, valid])
    if rows and float(rows[-1]["epoch"]) > 0:
        per_step = float(rows[-1]["epoch"]) / float(rows[-1]["step"])
        upper = axis.secondary_xaxis(
            "top", functions=(lambda step: step * per_step, lambda epoch: epoch / per_step)
        )
        upper.set_xlabel("epochs")
    axis.set_xlabel("steps")
    axis.set_ylabel("NLL, nats per coarse token")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def comparison_figure(
    runs: Mapping[str, Sequence[str | Path]], twin: str, step_s: Mapping[str, float]
) -> Any:
    """Validation NLL of several models by epoch and by minute, and each one's difference to one of
    them, its twin.

    runs: by name the run folders of each seed, all trained on the same batches; step_s: what a step
    takes. Without the twin among them the panel of differences is left out.
    """
    curves = {name: _mean_curve(folders) for name, folders in runs.items()}
    has_twin = twin in curves and len(curves) > 1
    figure, axes = _axes(1, 2 + has_twin, (5 * (2 + has_twin), 3.8))
    nats_axis, minutes_axis = axes[0, 0], axes[0, -1]
    for index, (name, (steps, epochs, nats)) in enumerate(curves.items()):
        style, label = f"C{index % 10}o-" if index < 10 else f"C{index % 10}s--", name
        nats_axis.plot(epochs, nats, style, ms=4, label=label)
        minutes_axis.plot([s * step_s[name] / 60 for s in steps], nats, style, ms=4, label=label)
        if has_twin and name != twin:
            reference = dict(zip(curves[twin][0], curves[twin][2], strict=True))
            shared = [(e, n - reference[s]) for s, e, n in zip(steps, epochs, nats, strict=True)
                      if s in reference]  # fmt: skip
            axes[0, 1].plot(*zip(*shared, strict=True), style, ms=4, label=label)
    for axis, column in ((nats_axis, 1), (minutes_axis, 0)):
        _zoom(axis, [(curve[column], curve[2]) for curve in curves.values()])
    nats_axis.set_title("validation NLL", fontsize=10, loc="left")
    minutes_axis.set_title("the same by time", fontsize=10, loc="left")
    for axis in (nats_axis, minutes_axis):
        axis.set_ylabel("nats per coarse token")
    if has_twin:
        axes[0, 1].axhline(0, color="0.3", lw=1.2)
        axes[0, 1].set_title(f"minus that of {twin}; below 0 is better", fontsize=10, loc="left")
    for axis in axes[0]:
        axis.set_xlabel("minutes of training" if axis is minutes_axis else "epochs")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    return figure


def _mean_curve(folders: Sequence[str | Path]) -> tuple[list[float], list[float], list[float]]:
    """Steps, epochs and mean validation NLL, at the steps that all runs reached."""
    by_run = []
    for folder in folders:
        rows = read_metrics(Path(folder) / "metrics.csv")
        by_run.append({float(row["step"]): row for row in rows if row["split"] == "valid"})
    steps = [step for step in by_run[0] if all(step in rows for rows in by_run)]
    return (
        steps,
        [float(by_run[0][step]["epoch"]) for step in steps],
        [float(np.mean([float(rows[step]["nll_nats"]) for rows in by_run])) for step in steps],
    )


def _curve(rows: list[dict[str, str]], split: str) -> tuple[list[float], list[float]]:
    """Steps and NLL of a split's rows."""
    chosen = [row for row in rows if row["split"] == split]
    return [float(row["step"]) for row in chosen], [float(row["nll_nats"]) for row in chosen]


def _zoom(axis: Any, curves: Sequence[tuple[list[float], list[float]]]) -> None:
    """Limits the y axis to the values after a tenth of the steps."""
    last = max((steps[-1] for steps, _ in curves if steps), default=0.0)
    late = [n for steps, nats in curves for s, n in zip(steps, nats, strict=True) if s >= last / 10]
    if late and last:
        low, high = min(late), max(late)
        margin = 0.06 * (high - low) or 0.1
        axis.set_ylim(low - margin, high + margin)


# -- sounds ----------------------------------------------------------------------------------------


def bin_of(hz: float, config: MelConfig) -> float:
    """Height of a frequency on an axis of mel bins, where bin i is centred at i + 0.5."""
    low, high, at = hz_to_mel(torch.tensor([config.f_min_hz, config.f_max_hz, hz])).tolist()
    return (at - low) / ((high - low) / (config.n_mels + 1)) - 0.5


def draw_mel(
    axis: Any,
    mel: np.ndarray,
    loudest: float,
    *,
    config: MelConfig | None = None,
) -> Any:
    """Log-mel float (T, M), one slice a step, over the 43 dB below `loudest`; returns the image.

    The y axis is labelled in Hz by `config`, MelConfig() by default.
    """
    config = config or MelConfig()
    image = axis.imshow(
        (mel.T - loudest) * DB_PER_NEPER,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        extent=(0, len(mel) / STEP_RATE_HZ, 0, mel.shape[1]),
    )
    ticks = [hz for hz in TICKS_HZ if config.f_min_hz < hz < config.f_max_hz]
    names = [f"{hz / 1000:g}k" if hz >= 1000 else str(hz) for hz in ticks]
    axis.set_yticks([bin_of(hz, config) for hz in ticks], names)
    axis.set_ylabel("Hz")
    return image


def spectrogram(
    mel: np.ndarray, loudest: float, *, split_s: float = 0.0, config: MelConfig | None = None
) -> Any:
    """A figure of one sound, axes at AXES, small enough to stand beside others.

    mel: float (T, M), natural logarithm, one slice a step; loudest: what 0 dB is; split_s: where
    a prompt ends, 0 for none.
    """
    figure = _figure((5, 2.2))
    axis = figure.add_axes(AXES)
    image = draw_mel(axis, mel, loudest, config=config)
    if split_s:
        axis.axvline(split_s, color="white", lw=1.2, ls="--")
    axis.set_xlabel("seconds")
    bar = figure.add_axes((AXES[0] + AXES[2] + 0.015, AXES[1], 0.018, AXES[3]))
    figure.colorbar(image, cax=bar, ticks=[-40, -20, 0])
    bar.set_title("dB", fontsize=9, pad=3)
    return figure


def spectrograms(
    sounds: Sequence[tuple[str, np.ndarray]], out: str | Path, config: MelConfig | None = None
) -> Path:
    """`spectrograms_figure`, to `out`."""
    return save(spectrograms_figure(sounds, config), out)


def spectrograms_figure(
    sounds: Sequence[tuple[str, np.ndarray]], config: MelConfig | None = None
) -> Any:
    """Log-mel slices of several sounds, one under the other on one time axis and one scale.

    sounds: (title, log-mel float (T, M)) pairs, natural logarithm, T in steps of 1/75 s.
    """
    figure, axes = _axes(len(sounds), 1, (11, 2.2 * len(sounds)))
    loudest = max(float(mel.max()) for _, mel in sounds if mel.size)
    longest_s = max(len(mel) for _, mel in sounds) / STEP_RATE_HZ
    image = None
    for axis, (title, mel) in zip(axes[:, 0], sounds, strict=True):
        image = draw_mel(axis, mel, loudest, config=config)
        axis.set_xlim(0, longest_s)
        axis.set_title(title, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("seconds")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="dB below the loudest", pad=0.01)
    return figure
