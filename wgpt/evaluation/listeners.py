"""Trained listeners: whether a sound keeps the voice of its prompt, and how sure a recogniser is.

Each needs a package that carries its trained weights; none had a part in any training of ours.

    speaker      cosine of speaker embeddings, at most 1: resemblyzer's network (Wan et al., 2018,
                 arXiv 1710.10467), of which only the file of weights is read
    confidence   mean posterior probability of the English words that pocketsphinx hears, 0 to 1,
                 and how many they are
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgpt.audio.mel import mel_filterbank
from wgpt.config import SAMPLE_RATE_HZ, MelConfig
from wgpt.errors import ConfigError

PACKAGES = {  # measure: its package, and how to get it
    "speaker": ("resemblyzer", "pip install --no-deps resemblyzer"),
    "confidence": ("pocketsphinx", "pip install 'wgpt[metrics]'"),
}
RATE_HZ = 16_000  # of what both were trained on
PATCH, PATCH_HOP = 160, 77  # frames of 10 ms that one embedding is of, and from one to the next
LEAST_OF_PATCH = 0.75  # a last patch with less of the sound is left out

Wave = np.ndarray  # float32 (L,), 24 kHz


class SpeakerEncoder(torch.nn.Module):
    """resemblyzer's network: mel power (n, 160, 40) to unit vectors (n, 256), none negative.

    Imported, the package would need librosa and webrtcvad; its answers here are equal to rounding.
    """

    def __init__(self, weights: Path) -> None:
        """weights: its pretrained.pt, read with weights_only=True."""
        super().__init__()
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self._filterbank = mel_filterbank(
            MelConfig(RATE_HZ, PATCH, window_samples=400, n_mels=40, f_max_hz=RATE_HZ / 2)
        )
        self._window = torch.hann_window(400, periodic=True)

    def forward(self, mel: Tensor) -> Tensor:
        last = self.linear(self.lstm(mel)[1][0][-1]).relu()
        return last / last.norm(dim=1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def embed(self, wave: Wave) -> np.ndarray:
        """Unit vector float32 (256,): the mean over patches of 1.6 s, 0.77 s apart."""
        sound = torch.from_numpy(_at_16_khz(wave))
        hop = RATE_HZ // 100
        n_frames = -(-(len(sound) + 1) // hop)
        starts = list(range(0, max(1, n_frames - PATCH + PATCH_HOP + 1), PATCH_HOP))
        if len(starts) > 1 and len(sound) - starts[-1] * hop < LEAST_OF_PATCH * PATCH * hop:
            starts.pop()
        n_samples = max(len(sound), (starts[-1] + PATCH) * hop)
        sound = torch.nn.functional.pad(sound, (0, n_samples - len(sound)))
        spectrum = torch.stft(
            sound, 400, hop, window=self._window, pad_mode="constant", return_complex=True
        )
        mel = spectrum.abs().square().T @ self._filterbank  # (frames, 40)
        mean = self(torch.stack([mel[start : start + PATCH] for start in starts])).mean(0)
        return (mean / mean.norm().clamp_min(1e-12)).numpy()


class Listeners:
    """The listeners whose packages are installed; a measure without its package is None.

    Attributes:
        missing: the pip command that brings each measure that is not there.
    """

    def __init__(self) -> None:
        self.missing = {
            measure: command
            for measure, (package, command) in PACKAGES.items()
            if importlib.util.find_spec(package) is None
        }
        self._encoder: SpeakerEncoder | None = None
        self._recogniser: Any = None

    def speaker(self, sound: Wave, other: Wave) -> float | None:
        """Cosine of the speaker embeddings of two sounds."""
        if "speaker" in self.missing:
            return None
        if self._encoder is None:
            found = importlib.util.find_spec("resemblyzer")
            assert found is not None and found.origin is not None
            self._encoder = SpeakerEncoder(Path(found.origin).with_name("pretrained.pt"))
        return float(self._encoder.embed(sound) @ self._encoder.embed(other))

    def confidence(self, wave: Wave) -> tuple[float, float] | None:
        """How sure the recogniser is of the English it hears.

        Returns:
            the mean posterior probability of its words, 0 if it hears none; words a second.
        """
        if "confidence" in self.missing:
            return None
        self._hear(wave)
        found = [s.prob for s in self._recogniser.seg() or () if s.word[0] not in "<["]
        seconds = len(wave) / SAMPLE_RATE_HZ
        return float(np.mean(found)) if found else 0.0, len(found) / seconds

    def words(self, copy: Wave, original: Wave) -> float | None:
        """Share of the words heard in the original that are heard in the copy, in order; None too
        where none is heard in the original."""
        if "confidence" in self.missing:
            return None
        heard, kept = self._hear(original), self._hear(copy)
        if not heard:
            return None
        best = np.zeros((len(heard) + 1, len(kept) + 1), int)  # longest common subsequence
        for i, word in enumerate(heard):
            for j, other in enumerate(kept):
                best[i + 1, j + 1] = (
                    best[i, j] + 1 if word == other else max(best[i, j + 1], best[i + 1, j])
                )
        return float(best[-1, -1]) / len(heard)

    def _hear(self, wave: Wave) -> list[str]:
        from pocketsphinx import Decoder

        if self._recogniser is None:
            # Noise of half a bit, always the same: in digital silence it would be sure of words.
            self._recogniser = Decoder(samprate=RATE_HZ, dither=True, seed=1, loglevel="FATAL")
        pcm = (np.clip(_at_16_khz(wave), -1, 1) * 32767).astype("<i2").tobytes()
        self._recogniser.start_utt()
        self._recogniser.process_raw(pcm, full_utt=True)
        self._recogniser.end_utt()
        found = self._recogniser.hyp()
        return found.hypstr.split() if found else []

    def judge(self, pairs: Sequence[tuple[Wave, Wave]]) -> dict[str, float]:
        """Of sounds, each with its prompt, the means of what is installed: `speaker` of sound and
        prompt, `confidence` in the sound, `words_per_s`."""
        voices = [cosine for pair in pairs if (cosine := self.speaker(*pair)) is not None]
        found = {"speaker": float(np.mean(voices))} if voices else {}
        sure = [both for sound, _ in pairs if (both := self.confidence(sound)) is not None]
        if sure:
            confidence, words_per_s = np.mean(sure, axis=0)
            found |= {"confidence": float(confidence), "words_per_s": float(words_per_s)}
        return found


def installed_listeners() -> Listeners:
    """Raises ConfigError where no package of any listener is installed."""
    found = Listeners()
    if len(found.missing) == len(PACKAGES):
        raise ConfigError(
            "eval: --metrics needs a trained listener: "
            + "; ".join(f"{command} ({measure})" for measure, command in found.missing.items())
        )
    return found


def _at_16_khz(wave: Wave) -> np.ndarray:
    import soxr  # here: training on prepared data needs none

    return soxr.resample(wave, SAMPLE_RATE_HZ, RATE_HZ).astype(np.float32)
