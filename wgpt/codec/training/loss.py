"""What a codec is trained to keep: the waveform, magnitudes at three resolutions, and envelopes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wgpt.audio.mel import mel_filterbank
from wgpt.config import SAMPLE_RATE_HZ, MelConfig


def third_octaves(n_fft: int, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Tensor:
    """The 15 third-octave bands from 150 Hz that STOI compares, float32 (F, 15) of 0 and 1."""
    centres_hz = 150 * 2 ** (torch.arange(15) / 3)
    bins_hz = torch.linspace(0, sample_rate_hz / 2, n_fft // 2 + 1)[:, None]
    return ((bins_hz >= centres_hz * 2 ** (-1 / 6)) & (bins_hz < centres_hz * 2 ** (1 / 6))).float()


class CodecLoss(nn.Module):
    """Weighted sum of wave, spectral-convergence, log-mel and envelope errors of each item.

    wave: normalised squared error e = |y - x|^2 / |x|^2, plus a log(e + 0.02) share, whose mean
    is what SI-SDR in dB measures. Items decoded from few codebooks cannot match the waveform, so
    the magnitudes weigh more there. envelope: one minus the correlation over time of the level in
    third-octave bands, weak bands counting as much as strong ones, which is what short-time
    intelligibility (STOI; Taal et al., 2011) rests on.
    """

    scales = ((2048, 512, 80), (1024, 256, 64), (512, 128, 40))  # window, hop, mel bands
    bands: Tensor
    log_floor = 0.05  # recordings hold digital silence, whose logarithm says nothing

    def __init__(self) -> None:
        super().__init__()
        for n_fft, _, n_mels in self.scales:
            filters = mel_filterbank(MelConfig(window_samples=n_fft, n_mels=n_mels))
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft))
            self.register_buffer(f"filters_{n_fft}", filters / filters.sum(0))
        self.register_buffer("bands", third_octaves(512))

    def _magnitude(self, wave: Tensor, n_fft: int, hop: int) -> Tensor:
        window = getattr(self, f"window_{n_fft}")
        spectrum = torch.stft(
            wave, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True
        )
        parts = torch.view_as_real(spectrum)
        return (parts.square().sum(-1) + 1e-7).sqrt()  # (B, F, T)

    def _envelope_gap(self, x: Tensor, y: Tensor) -> Tensor:
        """1 - mean correlation of the band levels of magnitudes (B, F, T), float32 (B,)."""
        levels = []
        for magnitude in (x, y):
            level = (magnitude.square().transpose(1, 2) @ self.bands + 1e-5).sqrt()
            level = level - level.mean(1, keepdim=True)
            levels.append(level / (level.square().sum(1, keepdim=True) + 1e-4).sqrt())
        return 1 - (levels[0] * levels[1]).sum(1).mean(1)

    def forward(
        self, decoded: Tensor, wave: Tensor, n_used: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of decoded against wave, both float32 (B, L); n_used int64 (B,) codebooks.

        Returns:
            the scalar loss, and its parts as numbers: by 1 and by all codebooks.
        """
        energy = wave.square().sum(1) + 1e-3 * wave.shape[1] ** 0.5
        error = (decoded - wave).square().sum(1) / energy
        rms = wave.square().mean(1).sqrt().clamp(min=1e-3)
        convergence, mel = torch.zeros_like(error), torch.zeros_like(error)
        envelope = torch.zeros_like(error)
        for n_fft, hop, _ in self.scales:
            filters = getattr(self, f"filters_{n_fft}")
            with torch.no_grad():
                x = self._magnitude(wave, n_fft, hop)
            y = self._magnitude(decoded, n_fft, hop)
            if n_fft == 512:
                envelope = self._envelope_gap(x, y)
            gap = (x - y).square().sum((1, 2)) / x.square().sum((1, 2))
            convergence = convergence + (gap + 1e-6).sqrt() / len(self.scales)
            # Levels relative to the crop's own, so that quiet crops count as much.
            unit = (rms * n_fft**0.5 * 0.5)[:, None, None]
            x_mel = (x / unit).transpose(1, 2) @ filters
            y_mel = (y / unit).transpose(1, 2) @ filters
            log_gap = ((x_mel + self.log_floor).log() - (y_mel + self.log_floor).log()).abs()
            mel = mel + log_gap.mean((1, 2)) / len(self.scales)
        few = (n_used <= 2).to(error)
        wave_part = error + 0.5 * (error + 0.02).log()
        wave_weight, magnitude_weight, envelope_weight = 1 - 0.4 * few, 0.3 + 0.5 * few, 1 + few / 2
        loss = wave_weight * wave_part + magnitude_weight * (convergence + mel)
        loss = (loss + envelope_weight * envelope).mean()
        with torch.no_grad():
            parts = {"loss": float(loss)}
            for name, mask in (("1", n_used == 1), ("8", n_used == 8)):
                if mask.any():
                    parts[f"nmse{name}"] = float(error[mask].mean())
                    parts[f"mel{name}"] = float(mel[mask].mean())
                    parts[f"sc{name}"] = float(convergence[mask].mean())
                    parts[f"env{name}"] = float(envelope[mask].mean())
        return loss, parts
