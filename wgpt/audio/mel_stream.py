"""Log-mel slices of a wave that arrives in whole steps."""

from __future__ import annotations

import torch
from torch import Tensor

from wgpt import ops
from wgpt.audio.mel import MelFrontend, lookahead_samples
from wgpt.errors import ConfigError


class MelStream:
    """Slices of a wave that arrives in whole steps: the frontend's values up to rounding.

    Keeps one window of samples, so memory is constant; a push of n steps costs n steps, where
    `slices_from` always transforms 32 frames.
    """

    def __init__(self, frontend: MelFrontend) -> None:
        config = frontend.config
        if lookahead_samples(config):
            raise ConfigError("mel: a window that sees past its step cannot stream, got leaky=True")
        self._frontend = frontend
        # Frame f starts this many samples before f * hop.
        self._n_left = (
            config.window_samples // 2
            if config.centered
            else config.window_samples - config.frame_hop_samples
        )
        self._tail: Tensor | None = None  # (B, n_left), the samples before the next step
        self._filters: ops.PackedMatrix | None = None  # on the device of the first wave

    def push(self, wave: Tensor) -> Tensor:
        """float32 (B, n * hop) to (B, n * r, M), on the wave's device."""
        config, n_left = self._frontend.config, max(self._n_left, 0)
        if self._tail is None:
            self._tail = wave.new_zeros(len(wave), n_left)
        wave = torch.cat((self._tail, wave), 1)
        self._tail = wave[:, wave.shape[1] - n_left :]
        frames = wave[:, max(-self._n_left, 0) :]
        frames = frames.unfold(1, config.window_samples, config.frame_hop_samples)
        spectrum = torch.fft.rfft(frames * self._frontend.window.to(wave.device))
        power = spectrum.real.square() + spectrum.imag.square()
        if self._filters is None:
            self._filters = ops.PackedMatrix(self._frontend.filterbank.to(wave.device))
        mel = self._filters.mm(power.flatten(0, 1))
        return mel.clamp_min(config.floor).log().view(*power.shape[:2], -1)

    def clone(self) -> MelStream:
        """A stream at the same place that goes its own way from here."""
        twin = MelStream(self._frontend)
        twin._tail, twin._filters = self._tail, self._filters
        return twin

    @staticmethod
    def join(streams: list[MelStream]) -> MelStream:
        """One stream whose batch is that of the given ones, in order."""
        joined = streams[0].clone()
        tails = [s._tail for s in streams if s._tail is not None]
        if tails:  # a token-only model's streams read no mel
            joined._tail = torch.cat(tails)
        return joined
