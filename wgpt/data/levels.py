"""Mel slices in 8 or 5 bits: codes of equally spaced levels, the same for every bin and recording.

    level of code c = low + step * c, natural-log mel power
    a frame of 8 bits   M bytes, a bin each
    a frame of 5 bits   M / 2 bytes: the lower four bits of bins 2 i and 2 i + 1, lowest bit first;
                        M / 8 bytes: the fifth bits of bins 8 i, ..., 8 i + 7, likewise

The levels follow from the mel settings alone, so parts that are prepared apart fit together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from wgpt.audio.mel import mel_filterbank
from wgpt.config import MelConfig
from wgpt.data.mapped import read_rows
from wgpt.errors import ConfigError

MEL_BITS = (16, 8, 5)  # 16: float16, no levels


@dataclass(frozen=True)
class MelLevels:
    """How frames are coded. low and step are natural-log mel power, nats."""

    bits: int
    low: float
    step: float

    def __post_init__(self) -> None:
        finite = math.isfinite(self.low) and math.isfinite(self.step)
        if self.bits not in MEL_BITS[1:] or not finite or self.step <= 0:
            raise ConfigError(
                "mel_levels: bits must be 8 or 5, low finite and step positive, got "
                f"{self.bits}, {self.low}, {self.step}"
            )

    @classmethod
    def of(cls, mel: MelConfig, bits: int) -> MelLevels | None:
        """Levels from the floor, which is silence, to a full-scale sine in the narrowest band: its
        power is (W / 4)^2 in its bin and a quarter of that in both neighbours. None for 16 bits.

        Raises:
            ConfigError: bits must be 16, 8 or 5, and n_mels divisible by 8 for 5.
        """
        if bits not in MEL_BITS:
            raise ConfigError(f"prepare: mel_bits must be one of {MEL_BITS}, got {bits}")
        if bits == 5 and mel.n_mels % 8:
            raise ConfigError(
                f"prepare: mel n_mels must be divisible by 8 with mel_bits 5, got {mel.n_mels}; "
                "use another n_mels or 8 bits"
            )
        if bits == 16:
            return None
        loudest = 1.5 * (mel.window_samples / 4) ** 2 * float(mel_filterbank(mel).max())
        low = math.log(mel.floor)
        range_nats = max(math.log(loudest) - low, 1.0)
        # Rounded, since logarithms differ in their last places from machine to machine.
        return cls(bits, round(low, 4), round(range_nats / (2**bits - 1), 4))

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> MelLevels | None:
        """Those of a manifest's or a part's settings; None where mel is float16."""
        levels = settings.get("mel_levels")
        return cls(**levels) if levels else None

    def as_settings(self) -> dict[str, Any]:
        """What `from_settings` reads."""
        return asdict(self)

    def row_bytes(self, n_mels: int) -> int:
        """Bytes of a frame."""
        return n_mels * self.bits // 8

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """float (n, M) -> uint8 (n, M * bits / 8): the nearest levels."""
        codes = np.rint((frames.astype(np.float32) - np.float32(self.low)) / np.float32(self.step))
        codes = codes.clip(0, 2**self.bits - 1).astype(np.uint8)
        if self.bits == 8:
            return codes
        low, high = codes & 15, codes >> 4
        twos = high[:, 0::2] | high[:, 1::2] << 1  # of each pair
        eights = twos[:, 0::4] | twos[:, 1::4] << 2 | twos[:, 2::4] << 4 | twos[:, 3::4] << 6
        return np.concatenate([low[:, 0::2] | low[:, 1::2] << 4, eights], axis=1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 (n, M * bits / 8) -> float16 (n, M)."""
        if self.bits == 8:
            return self._table.take(codes)
        n_pairs = codes.shape[1] * 4 // 5
        index = np.empty((len(codes), n_pairs), np.uint16)
        for k in range(4):
            index[:, k::4] = codes[:, n_pairs:] >> 2 * k & 3
        index <<= 8
        index |= codes[:, :n_pairs]
        return self._table.take(index).view(np.float16)

    @cached_property
    def _table(self) -> np.ndarray:
        """The float16 of each code of 8 bits; of 5 bits the two of each pair, as one uint32."""
        levels = (self.low + self.step * np.arange(2**self.bits)).astype(np.float16)
        if self.bits == 8:
            return levels
        pair = np.arange(1 << 10)
        codes = np.stack([pair & 15 | pair >> 4 & 16, pair >> 4 & 15 | pair >> 5 & 16], axis=1)
        return levels[codes].view(np.uint32)[:, 0]


class CodedFrames:
    """An array of codes that reads as the float16 (n, M) frames that it stands for."""

    def __init__(self, codes: np.ndarray, levels: MelLevels) -> None:
        self.codes, self.levels = codes, levels
        self.shape = (len(codes), codes.shape[1] * 8 // levels.bits)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            return self.levels.decode(read_rows(self.codes, first, max(last, first)))
        return self.levels.decode(self.codes[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.levels.decode(self.codes).astype(dtype or np.float16)
