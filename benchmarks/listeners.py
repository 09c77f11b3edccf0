"""Trained listeners whose weights come inside a package.

PESQ, a speaker embedding, a recogniser of English, a music tagger. None of them had a part in any
training here. Each is optional: pip install pesq; pip install pocketsphinx; pip install librosa,
then pip install --no-deps resemblyzer webrtcvad-wheels musicnn.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import soxr

from wgpt.config import SAMPLE_RATE_HZ

Wave = np.ndarray  # float32 (L,), 24 kHz


class Listeners:
    """The optional measures; each is None where its package is not installed.

    Attributes:
        missing: names of the packages that are not there.
    """

    def __init__(self) -> None:
        self.missing = [name for name in ("pystoi", "pesq", "resemblyzer", "pocketsphinx")
                        if importlib.util.find_spec(name) is None]  # fmt: skip
        self._encoder: Any = None
        self._recogniser: Any = None

    @staticmethod
    def _at_16_khz(wave: Wave) -> Wave:
        return soxr.resample(wave, SAMPLE_RATE_HZ, 16_000).astype(np.float32)

    def pesq(self, copy: Wave, original: Wave) -> float | None:
        """Wideband PESQ (ITU-T P.862.2), 1 to 4.6; None where it finds no speech."""
        if "pesq" in self.missing:
            return None
        import pesq

        try:
            return float(pesq.pesq(16_000, self._at_16_khz(original), self._at_16_khz(copy), "wb"))
        except pesq.NoUtterancesError:
            return None

    def speaker(self, copy: Wave, original: Wave) -> float | None:
        """Cosine of the speaker embeddings of resemblyzer, whose trained weights it carries."""
        if "resemblyzer" in self.missing:
            return None
        from resemblyzer import VoiceEncoder

        if self._encoder is None:
            self._encoder = VoiceEncoder("cpu", verbose=False)
        one, other = (
            self._encoder.embed_utterance(self._at_16_khz(wave)) for wave in (copy, original)
        )
        return float(one @ other)

    def words(self, copy: Wave, original: Wave) -> float | None:
        """Share of the words heard in the original that are heard in the copy, in order."""
        if "pocketsphinx" in self.missing:
            return None
        heard, kept = self._heard(original), self._heard(copy)
        if not heard:
            return None
        # Longest common subsequence.
        best = np.zeros((len(heard) + 1, len(kept) + 1), int)
        for i, word in enumerate(heard):
            for j, other in enumerate(kept):
                best[i + 1, j + 1] = (
                    best[i, j] + 1 if word == other else max(best[i, j + 1], best[i + 1, j])
                )
        return float(best[-1, -1]) / len(heard)

    def confidence(self, wave: Wave) -> tuple[float, float] | None:
        """How sure pocketsphinx is of the English it hears, None without it.

        Returns:
            the mean posterior probability of its words, 0 if it hears none; words a second.
        """
        if "pocketsphinx" in self.missing:
            return None
        self._heard(wave)
        found = [s.prob for s in self._recogniser.seg() or () if s.word[0] not in "<["]
        seconds = len(wave) / SAMPLE_RATE_HZ
        return float(np.mean(found)) if found else 0.0, len(found) / seconds

    def _heard(self, wave: Wave) -> list[str]:
        from pocketsphinx import Decoder

        if self._recogniser is None:
            self._recogniser = Decoder(samprate=16_000, loglevel="FATAL")
        pcm = (np.clip(self._at_16_khz(wave), -1, 1) * 32767).astype("<i2").tobytes()
        self._recogniser.start_utt()
        self._recogniser.process_raw(pcm, full_utt=True)
        self._recogniser.end_utt()
        found = self._recogniser.hyp()
        return found.hypstr.split() if found else []
