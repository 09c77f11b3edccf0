"""The codec: audio to EnCodec tokens and back, with what causality a language model needs.

    codec = load("mini")                       # or "encodec_24khz", a folder, a .th file
    tokens = codec.encode(wave)                # float32 (L,)  -> int64 (K, T), T = L // 320
    wave = codec.decode(tokens[:1])            # int64 (k, T)  -> float32 (T * 320,)

Token t depends on the samples before (t + 1) * hop and on nothing later; samples before
(t + 1) * hop of the decoded wave depend on tokens 0..t only. Both hold to the last bit (tested).

Models padded by reflection (`pad_mode="reflect"`, as the released EnCodec 24 kHz is) would break
that at the start of a file: their narrow layers mirror up to six *later* frames into the place
before the first (measured: changing only samples after frame 0 changes frame 0). For them a few
frames of silence are put in front and cut off again, in both directions, so that mirrors hold
silence only. The first few tokens of a file then differ from what the bare model gives; in
exchange none of them knows the future. `identity["lead_frames"]` records it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wgpt.codec import stream as codec_stream
from wgpt.codec import weights as codec_weights
from wgpt.codec.stream import StreamDecoder, StreamEncoder
from wgpt.codec.weights import CodecError, CodecWeights

__all__ = ["Codec", "CodecError", "load"]

_FRAMES_AT_ONCE = 4096  # bounds the (frames, entries) distances of the quantiser to 16 MiB


@dataclass(frozen=True)
class _Network:
    """An EnCodec network by its four stages, whichever package runs it."""

    module: nn.Module
    embed: Callable[[Tensor], Tensor]  # (B, 1, L) -> (B, C, T)
    quantize: Callable[[Tensor], Tensor]  # (B, C, T) -> (K, B, T)
    dequantize: Callable[[Tensor], Tensor]  # (k, B, T) -> (B, C, T)
    render: Callable[[Tensor], Tensor]  # (B, C, T) -> (B, 1, L)


class Codec:
    """A neural audio codec with frozen weights.

    Attributes:
        name: "mini", "encodec_24khz" or the name of the folder it came from.
        sample_rate_hz: rate of the waves, 24 000.
        hop_samples: samples per frame, 320.
        frame_rate_hz: frames per second, 75.0.
        n_codebooks: K, codebooks per frame, from coarse to fine.
        codebook_size: V, entries per codebook.
        source: the name or absolute path that `load` finds these weights by.
        identity: JSON-able; two codecs with equal identities give equal tokens.
    """

    def __init__(self, network: _Network, weights: CodecWeights, implementation: str, config: Any):
        self._network = network
        self.name = weights.name
        self.source = weights.name
        self.sample_rate_hz = int(config.sampling_rate)
        self.hop_samples = 1
        for ratio in config.upsampling_ratios:
            self.hop_samples *= int(ratio)
        self.frame_rate_hz = self.sample_rate_hz / self.hop_samples
        self.n_codebooks = int(config.num_quantizers)
        self.codebook_size = int(config.codebook_size)
        self.device = torch.device("cpu")
        self._lead_frames = 0
        if config.pad_mode == "reflect":
            self._lead_frames = max(config.kernel_size, config.last_kernel_size) + 1
        self.identity: dict[str, Any] = {
            "name": self.name,
            "implementation": implementation,
            "sha256": weights.sha256,
            "sample_rate_hz": self.sample_rate_hz,
            "hop_samples": self.hop_samples,
            "n_codebooks": self.n_codebooks,
            "codebook_size": self.codebook_size,
            "lead_frames": self._lead_frames,
        }
        self._silence: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"Codec({self.name!r}, {self.sample_rate_hz} Hz, {self.frame_rate_hz:g} frames/s, "
            f"{self.n_codebooks} x {self.codebook_size}, {self.identity['implementation']})"
        )

    def to(self, device: str | torch.device) -> Codec:
        """Move the weights to a device, in place; returns the codec itself."""
        self._network.module.to(device)
        self.device = torch.device(device)
        self._silence = None
        return self

    @torch.no_grad()
    def codebooks(self) -> Tensor:
        """The codebooks, float32 (K, V, E); a frame's latent is the sum of an entry of each."""
        shape = (self.n_codebooks, 1, self.codebook_size)
        codes = torch.zeros(shape, dtype=torch.int64, device=self.device)
        found, zero = [], torch.zeros((), device=self.device)
        for k, one in enumerate(codes):
            one += torch.arange(self.codebook_size, device=self.device)
            latents = self._network.dequantize(codes[: k + 1])  # (1, E, V): entry 0 of those before
            found.append((latents - zero)[0].T)
            one.zero_()
            zero = latents[:, :, :1]
        return torch.stack(found)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Tokens of a wave. The whole wave goes through at once.

        Memory grows with its length (mini: 20 GiB for an hour, measured); cut or stream longer
        recordings.

        Args:
            wave: float (L,) or (B, L) at `sample_rate_hz`, finite, in [-1, 1] by convention.

        Returns:
            int64 (K, T) or (B, K, T) on the codec's device, T = L // hop_samples: what is left
            after the last whole frame is dropped, since its token would rest on padding.

        Raises:
            CodecError: wrong shape or type, or samples that are NaN or infinite.
        """
        wave = torch.as_tensor(wave)
        if wave.dim() not in (1, 2) or not wave.is_floating_point():
            raise CodecError(
                f"codec.encode: wave must be floating point (L,) or (B, L), got {wave.dtype} "
                f"{tuple(wave.shape)}"
            )
        batch = wave.to(self.device, torch.float32)
        batch = batch[None] if wave.dim() == 1 else batch
        if not torch.isfinite(batch).all():
            raise CodecError("codec.encode: wave holds NaN or infinite samples")
        n_frames = batch.shape[1] // self.hop_samples
        tokens = self._encode_frames(batch[:, : n_frames * self.hop_samples])
        return tokens[0] if wave.dim() == 1 else tokens

    def _encode_frames(self, batch: Tensor) -> Tensor:
        n_items, n_samples = batch.shape
        if n_items == 0 or n_samples == 0:
            shape = (n_items, self.n_codebooks, n_samples // self.hop_samples)
            return torch.zeros(shape, dtype=torch.int64, device=self.device)
        lead = self._lead_frames
        padded = nn.functional.pad(batch, (lead * self.hop_samples, 0))
        latents = self._network.embed(padded[:, None])[:, :, lead:]
        parts = [self._network.quantize(part) for part in latents.split(_FRAMES_AT_ONCE, 2)]
        return torch.cat(parts, 2).transpose(0, 1).contiguous()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Wave of the first k codebooks of some tokens.

        Args:
            codes: integer (k, T) or (B, k, T), 1 <= k <= K, entries in [0, V).

        Returns:
            float32 (T * hop_samples,) or (B, T * hop_samples) on the codec's device.

        Raises:
            CodecError: wrong shape or type, or entries out of range.
        """
        codes = torch.as_tensor(codes)
        if codes.dim() not in (2, 3) or codes.is_floating_point() or codes.is_complex():
            raise CodecError(
                f"codec.decode: codes must be integers (k, T) or (B, k, T), got {codes.dtype} "
                f"{tuple(codes.shape)}"
            )
        batch = codes.to(self.device, torch.int64)
        batch = batch[None] if codes.dim() == 2 else batch
        n_items, n_used, n_frames = batch.shape
        if not 1 <= n_used <= self.n_codebooks:
            raise CodecError(
                f"codec.decode: {self.name} has {self.n_codebooks} codebooks, got {n_used}"
            )
        if batch.numel() == 0:
            wave = torch.zeros(n_items, n_frames * self.hop_samples, device=self.device)
            return wave[0] if codes.dim() == 2 else wave
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or high >= self.codebook_size:
            raise CodecError(
                f"codec.decode: codes must lie in [0, {self.codebook_size}), got values from "
                f"{low} to {high}"
            )
        lead = self._lead_frames
        if lead:
            silence = self._silent_frame()[None, :n_used].expand(n_items, -1, lead)
            batch = torch.cat([silence, batch], 2)
        latents = self._network.dequantize(batch.transpose(0, 1))
        wave = self._network.render(latents)[:, 0, lead * self.hop_samples :]
        wave = wave[:, : n_frames * self.hop_samples].contiguous()
        return wave[0] if codes.dim() == 2 else wave

    def stream_encoder(self) -> StreamEncoder:
        """An encoder for a wave that arrives in pieces; together its tokens are `encode`'s.

        Raises CodecError for implementation="encodec".
        """
        return codec_stream.StreamEncoder(self._streamable(), self.n_codebooks, self._lead_frames)

    def stream_decoder(self, n_codebooks: int | None = None) -> StreamDecoder:
        """A decoder for tokens that arrive frame by frame; together its samples are `decode`'s.

        n_codebooks is the most a push may carry, all by default. Raises CodecError for
        implementation="encodec".
        """
        n_used = self.n_codebooks if n_codebooks is None else n_codebooks
        lead = None
        if self._lead_frames:
            lead = self._silent_frame()[:n_used].expand(-1, self._lead_frames)
        return codec_stream.StreamDecoder(self._streamable(), n_used, lead)

    def _streamable(self) -> nn.Module:
        if self.identity["implementation"] != "transformers":
            raise CodecError("codec: only implementation='transformers' can stream")
        return self._network.module

    def _silent_frame(self) -> Tensor:
        """Tokens (K, 1) of a frame of silence."""
        if self._silence is None:
            zeros = torch.zeros(1, 2 * self.hop_samples, device=self.device)
            self._silence = self._encode_frames(zeros)[0, :, -1:]
        return self._silence


def load(
    name_or_path: str | os.PathLike[str],
    *,
    download: bool = False,
    device: str | torch.device = "cpu",
    implementation: str = "transformers",
) -> Codec:
    """Load a codec.

    Args:
        name_or_path: "mini" (in the package); "encodec_24khz" (from the Hugging Face cache or
            torch's hub cache); a folder with config.json and model.safetensors; an original
            .th file, whose name carries the first 8 hex digits of its sha256.
        download: allow a download of encodec_24khz; without it the network is never touched.
        device: torch device of the weights.
        implementation: "transformers", or "encodec" for the package of that name.

    Raises:
        CodecError: weights missing, damaged or of another architecture; a model that is not
            causal, not mono, or normalises each clip by its own level.
    """
    if implementation not in ("transformers", "encodec"):
        raise CodecError(
            f"codec: implementation must be 'transformers' or 'encodec', got {implementation!r}"
        )
    weights = codec_weights.read(name_or_path, download=download)
    from wgpt.codec import networks as codec_networks  # late: importing transformers takes seconds

    config = codec_networks.make_config(weights)
    _check_causal(weights.name, config)
    build = getattr(codec_networks, f"{implementation}_stages")
    module, *stages = build(weights, config)
    module.eval().requires_grad_(False)
    codec = Codec(_Network(module, *stages), weights, implementation, config).to(device)
    if os.path.exists(name_or_path):
        codec.source = os.path.abspath(name_or_path)
    return codec


def _check_causal(name: str, config: Any) -> None:
    """Refuse what would let a token see later samples, or the loudness of the whole clip."""
    rules = (
        (bool(config.use_causal_conv), "use_causal_conv must be true (or tokens see the future)"),
        (config.trim_right_ratio == 1.0, "trim_right_ratio must be 1.0 (output would be shifted)"),
        (config.audio_channels == 1, f"must be mono, got {config.audio_channels} channels"),
        (not config.normalize, "normalize must be false (tokens would know the clip's loudness)"),
        (config.chunk_length_s is None, "chunk_length_s must be null (chunks forget the past)"),
        (config.norm_type == "weight_norm", "norm_type must be weight_norm (groups see ahead)"),
    )
    for holds, rule in rules:
        if not holds:
            raise CodecError(f"codec: {name} cannot be used: {rule}; use encodec_24khz or mini")
