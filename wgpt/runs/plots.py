"""Pictures: loss curves of runs, spectrograms of sounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wgpt.config import STEP_RATE_HZ
from wgpt.runs.metrics import read_metrics


def _axes(n_rows: int, n_columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its (n_rows, n_columns) axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


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
