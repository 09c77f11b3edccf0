"""Log-mel slices, one group per codec step, that never see past their step's last sample.

Frame f of r frames per step (hop h = 320 / r samples) reads samples [(f+1)h - W, (f+1)h), with
zeros before the file, so the r frames of step t end at or before sample (t+1) * 320: exactly what
codec token t depends on. The usual centred window of 1024 samples would look 192 samples ahead.

    samples   0        320       640       960
              |---t=0---|---t=1---|---t=2---|
    W = 600   ....[=====)                       slice 0: zeros, then samples 0..319
                   [=========)                  slice 1
                             [=========)        slice 2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from wgpt.config import MelConfig
from wgpt.errors import ConfigError

# Frames are always computed in blocks of this many, aligned to multiples of it: see MelFrontend.
BLOCK_FRAMES = 32


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's scale: 200/3 Hz per mel below 1 kHz (15 mel), then 27 mel per factor of 6.4."""
    linear = hz * 3.0 / 200.0
    logarithmic = 15.0 + torch.log(hz.clamp_min(1e-10) / 1000.0) * (27.0 / math.log(6.4))
    return torch.where(hz < 1000.0, linear, logarithmic)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of `hz_to_mel`."""
    linear = mel * 200.0 / 3.0
    logarithmic = 1000.0 * torch.exp((mel - 15.0) * (math.log(6.4) / 27.0))
    return torch.where(mel < 15.0, linear, logarithmic)


def band_edges_hz(config: MelConfig) -> Tensor:
    """float64 (M + 2,), equally spaced on the mel scale; band m lies around edge m + 1."""
    limits = torch.tensor([config.f_min_hz, config.f_max_hz], dtype=torch.float64)
    low, high = hz_to_mel(limits).tolist()
    return mel_to_hz(torch.linspace(low, high, config.n_mels + 2, dtype=torch.float64))


def mel_filterbank(config: MelConfig) -> Tensor:
    """Triangular filters from power-spectrum bins to mel bands.

    Band m rises linearly in Hz from edge m to edge m+1 and falls to edge m+2, where the M + 2
    edges are equally spaced on Slaney's mel scale; each triangle is scaled by 2 / (its width in
    Hz), so that it has unit area over frequency. Source: M. Slaney, Auditory Toolbox, Interval
    Research report 1998-010; the same values as librosa's default (htk=False, norm="slaney").
    n_fft equals window_samples.

    Returns:
        float32 (n_fft // 2 + 1, M), computed in float64.

    Raises:
        ConfigError: a band is so narrow that no bin falls inside it.
    """
    n_fft = config.window_samples
    bins_hz = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (config.sample_rate_hz / n_fft)
    edges_hz = band_edges_hz(config)
    left, centre, right = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz[:, None] - left) / (centre - left)
    falling = (right - bins_hz[:, None]) / (right - centre)
    bank = torch.minimum(rising, falling).clamp_min(0.0) * (2.0 / (right - left))
    empty = (bank.sum(dim=0) == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"mel: every band must hold a bin of the {n_fft}-sample spectrum, "
            f"got none in band {empty[0]} of {config.n_mels} "
            f"({left[empty[0]]:.1f} to {right[empty[0]]:.1f} Hz); "
            "use fewer n_mels or a longer window_samples"
        )
    return bank.float()


def lookahead_samples(config: MelConfig) -> int:
    """Samples that the last frame of a step sees past the step's end (0 when causal)."""
    if not config.centered:
        return 0
    # The last frame of a step is centred one frame hop before the step's end.
    after_centre = config.window_samples - config.window_samples // 2
    return max(0, after_centre - config.frame_hop_samples)


class MelFrontend:
    """Wave to natural-log mel power: log(max(|STFT|^2 @ filterbank, floor)).

    The window is a periodic Hann window of window_samples, n_fft is the same, and nothing depends
    on the rest of the clip (no per-clip normalisation). Frames are transformed in blocks of 32
    whose borders lie at fixed frame numbers, padded with zero frames, so each value comes out of
    the same instructions whether one slice or a whole file is asked for: `slices_from` equals the
    full computation bit for bit.
    """

    def __init__(self, config: MelConfig) -> None:
        ahead = lookahead_samples(config)
        if ahead and not config.leaky:
            raise ConfigError(
                f"mel: frames must not see past their step, got a centred window of "
                f"{config.window_samples} samples at {config.frames_per_step} frames per step, "
                f"which sees {ahead} samples ahead; use centered=False or say leaky=True"
            )
        self.config = config
        self.filterbank = mel_filterbank(config)  # (n_fft // 2 + 1, M)
        self.window = torch.hann_window(config.window_samples, periodic=True)  # (W,)

    @property
    def silence(self) -> Tensor:
        """float32 (M,): a frame of digital silence, also used for the step before the start."""
        return torch.full((self.config.n_mels,), self.config.floor).log()

    def __call__(self, wave: Tensor) -> Tensor:
        """Slices of every whole step of a wave.

        Args:
            wave: float32 (L,) or (B, L); T = L // hop, the remainder is ignored.

        Returns:
            float32 (T * r, M) or (B, T * r, M), on the wave's device.
        """
        return self.slices_from(wave, 0, wave.shape[-1] // self.config.hop_samples)

    def slices_from(self, wave: Tensor, start_step: int, n_steps: int) -> Tensor:
        """Slices of steps [start_step, start_step + n_steps) of a wave given from its beginning.

        Costs about n_steps, not the length of the wave.

        Args:
            wave: float32 (L,) or (B, L).
            start_step, n_steps: (start_step + n_steps) * hop must not exceed L.

        Returns:
            float32 (n_steps * r, M) or (B, n_steps * r, M), equal bit for bit to those rows of
            the full computation. A leaky window at the end sees zeros where the wave ends.

        Raises:
            ValueError: wrong shape or dtype, or steps outside the wave.
        """
        config = self.config
        if wave.ndim not in (1, 2) or wave.dtype != torch.float32:
            raise ValueError(
                f"mel: wave must be float32 (L,) or (B, L), got {wave.dtype} {tuple(wave.shape)}"
            )
        have = wave.shape[-1] // config.hop_samples
        if start_step < 0 or n_steps < 0 or start_step + n_steps > have:
            raise ValueError(
                f"mel: steps must lie in [0, {have}) of a wave of {wave.shape[-1]} samples, "
                f"got {n_steps} from {start_step}"
            )
        if wave.ndim == 2:
            rows = [self.slices_from(row, start_step, n_steps) for row in wave]
            return torch.stack(rows) if rows else wave.new_zeros(0, n_steps, config.n_mels)
        if self.window.device != wave.device:
            self.window, self.filterbank = self.window.to(wave.device), self.filterbank.to(wave)
        first = start_step * config.frames_per_step
        end = (start_step + n_steps) * config.frames_per_step
        out = wave.new_empty(end - first, config.n_mels)
        for block in range(first - first % BLOCK_FRAMES, end, BLOCK_FRAMES):
            from_, to = max(first, block), min(end, block + BLOCK_FRAMES)
            out[from_ - first : to - first] = self._block(wave, block)[from_ - block : to - block]
        return out

    def _block(self, wave: Tensor, first: int) -> Tensor:
        """Frames [first, first + 32) -> (32, M), with zeros outside the wave."""
        config = self.config
        hop, window = config.frame_hop_samples, config.window_samples
        begin = first * hop - window // 2 if config.centered else (first + 1) * hop - window
        end = begin + (BLOCK_FRAMES - 1) * hop + window
        # Only samples of whole steps count, so a trailing remainder never changes a result.
        length = wave.shape[0] - wave.shape[0] % config.hop_samples
        part = wave[max(begin, 0) : max(min(end, length), 0)]
        part = pad(part, (max(-begin, 0), end - max(begin, 0) - part.shape[0]))
        spectrum = torch.fft.rfft(part.unfold(0, window, hop) * self.window)  # (32, n_fft // 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        frames: Tensor = (power @ self.filterbank).clamp_min(config.floor).log()
        return frames
