"""Spectrograms to look at: a small picture of several sounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def draw_spectrograms(path: Path, panels: list[tuple[str, np.ndarray]], rate_hz: int) -> None:
    """A small PNG with one spectrogram per panel, in dB below the first panel's maximum."""
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
