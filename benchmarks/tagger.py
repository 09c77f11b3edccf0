"""A music tagger as a listener: what its last pooled layer says of a sound, for a Frechet distance.

The VGG-like network of musicnn (Pons and Serra, 2019, arXiv 1909.06654; trained on MagnaTagATune),
whose weights come inside the package: pip install librosa; pip install --no-deps musicnn. The
package runs on TensorFlow; here its five convolutions are torch's and its checkpoint is read as
what it is, float32 arrays one after the other in the order of their names.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn import functional as F

from wgpt.config import SAMPLE_RATE_HZ

RATE_HZ, N_FFT, HOP, N_MELS = 16_000, 512, 256, 96
PATCH, PATCH_HOP = 187, 62  # frames; a patch is 3 s, as in training
WIDTH, N_TAGS = 128, 50
POOLS = ((4, 1, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (4, 4, 4))  # time, frequency, stride

Wave = np.ndarray  # float32 (L,), 24 kHz


def is_installed() -> bool:
    """Whether the packages are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("musicnn", "librosa"))


def _shapes() -> dict[str, tuple[int, ...]]:
    """Every variable of the checkpoint, without what the optimiser kept."""
    shapes: dict[str, tuple[int, ...]] = {
        "dense/kernel": (2 * WIDTH, N_TAGS),
        "dense/bias": (N_TAGS,),
    }
    for i in range(1, 6):
        shapes[f"{i}CNN/kernel"] = (3, 3, 1 if i == 1 else WIDTH, WIDTH)
        shapes[f"{i}CNN/bias"] = (WIDTH,)
    for i in range(6):
        name = f"batch_normalization{'' if i == 0 else f'_{i}'}"
        for part in ("beta", "gamma", "moving_mean", "moving_variance"):
            shapes[f"{name}/{part}"] = (1 if i == 0 else WIDTH,)
    return shapes


def read_variables(path: Path) -> dict[str, Tensor]:
    """The arrays of the checkpoint's data file.

    Raises:
        ValueError: the file has another length than these variables give.
    """
    data = np.fromfile(path, "<f4")
    shapes: dict[str, tuple[int, ...]] = {"beta1_power": (), "beta2_power": ()}
    for name, shape in _shapes().items():
        shapes[name] = shape
        if "moving" not in name:  # trained, so Adam kept two arrays beside it
            shapes |= {f"{name}/Adam": shape, f"{name}/Adam_1": shape}
    variables, start = {}, 0
    for name in sorted(shapes):
        end = start + math.prod(shapes[name])
        variables[name] = torch.from_numpy(data[start:end].copy()).view(shapes[name])
        start = end
    if start != data.size:
        raise ValueError(
            f"{path} must hold {start} numbers, got {data.size}; install musicnn 0.1.0"
        )
    return variables


class Tagger:
    """The network. Needs `is_installed()`."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("musicnn")  # its own import would load TensorFlow
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent / "MTT_vgg"
        self._variables = read_variables(folder / ".data-00000-of-00001")

    @staticmethod
    def patches(wave: Wave) -> Tensor:
        """Patches (n, 1, PATCH, N_MELS) of log-mel power; short waves are padded by zeros."""
        import librosa

        wave = soxr.resample(wave, SAMPLE_RATE_HZ, RATE_HZ).astype(np.float32)
        wave = np.pad(wave, (0, max(0, (PATCH - 1) * HOP - len(wave))))
        power = librosa.feature.melspectrogram(
            y=wave, sr=RATE_HZ, n_fft=N_FFT, hop_length=HOP, n_mels=N_MELS
        ).T
        level = torch.from_numpy(np.log10(10_000 * power + 1))
        return level.float().unfold(0, PATCH, PATCH_HOP).transpose(1, 2)[:, None]

    def _normalize(self, x: Tensor, name: str) -> Tensor:
        parts = ("moving_mean", "moving_variance", "gamma", "beta")
        return F.batch_norm(x, *(self._variables[f"{name}/{part}"] for part in parts), eps=1e-3)

    @torch.no_grad()
    def embed(self, wave: Wave) -> np.ndarray:
        """Two embeddings of 1.5 s for each patch, (2 n, 128)."""
        x = self._normalize(self.patches(wave), "batch_normalization")
        for i, (time, frequency, stride) in enumerate(POOLS, 1):
            kernel = self._variables[f"{i}CNN/kernel"].permute(3, 2, 0, 1)
            x = F.conv2d(x, kernel, self._variables[f"{i}CNN/bias"], padding=1).relu()
            x = self._normalize(x, f"batch_normalization_{i}")
            x = F.max_pool2d(x, (time, frequency), stride)
        return x[:, :, :, 0].transpose(1, 2).flatten(0, 1).contiguous().numpy()

    @torch.no_grad()
    def tags(self, wave: Wave) -> np.ndarray:
        """Likelihood of MagnaTagATune's 50 tags, (50,), mean over patches."""
        pooled = torch.from_numpy(self.embed(wave)).view(-1, 2 * WIDTH)
        scores = pooled @ self._variables["dense/kernel"] + self._variables["dense/bias"]
        return scores.sigmoid().mean(0).numpy()
