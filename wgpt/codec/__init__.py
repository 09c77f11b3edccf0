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
from typing import Any

import torch
from torch import Tensor, nn

from wgpt.codec import stream as codec_stream
from wgpt.codec import weights as codec_weights
from wgpt.codec.layers import Network
from wgpt.codec.stream import StreamDecoder, StreamEncoder
from wgpt.codec.weights import PACKAGED, CodecWeights
from wgpt.errors import CodecError

__all__ = ["PACKAGED", "Codec", "CodecError", "load", "same_tokens"]

IMPLEMENTATIONS = ("wgpt", "transformers", "encodec")


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

    def __init__(self, weights: CodecWeights, device: str | torch.device, implementation: str):
        architecture = weights.architecture
        self._weights = weights
        self.name = weights.name
        self.source = weights.name
        self.sample_rate_hz = architecture.sampling_rate
        self.hop_samples = architecture.hop_samples
        self.frame_rate_hz = self.sample_rate_hz / self.hop_samples
        self.n_codebooks = architecture.n_codebooks
        self.codebook_size = architecture.codebook_size
        self._lead_frames = 0
        if architecture.pad_mode == "reflect":
            self._lead_frames = max(architecture.kernel_size, architecture.last_kernel_size) + 1
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
        self.to(device)

    def __repr__(self) -> str:
        return (
            f"Codec({self.name!r}, {self.sample_rate_hz} Hz, {self.frame_rate_hz:g} frames/s, "
            f"{self.n_codebooks} x {self.codebook_size}, {self.identity['implementation']})"
        )

    def to(self, device: str | torch.device) -> Codec:
        """Move the weights to a device, in place; returns the codec itself."""
        self.device = torch.device(device)
        self._silence: Tensor | None = None
        self._network: Network | None = None
        self._encode: Callable[[Tensor], Tensor]  # waves (B, L) -> tokens (B, K, T)
        self._decode: Callable[[Tensor], Tensor]  # tokens (B, k, T) -> waves (B, L)
        implementation = self.identity["implementation"]
        if implementation == "wgpt":
            tensors = {k: v.to(self.device) for k, v in self._weights.tensors.items()}
            network = self._network = Network(self._weights.architecture, tensors)
            self._encode = lambda batch: codec_stream.encode(network, batch)
            self._decode = lambda codes: codec_stream.decode(network, codes)
        else:
            from wgpt.codec import other_implementations  # late: transformers takes seconds

            other = other_implementations.load(implementation, self._weights, self.device)
            self._encode, self._decode = other.encode, other.decode
        return self

    def codebooks(self) -> Tensor:
        """The codebooks, float32 (K, V, E); a frame's latent is the sum of an entry of each."""
        return self._weights.codebooks().to(self.device)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Tokens of a wave. It goes through block by block, so working memory stays small.

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
        return self._encode(padded)[:, :, lead:].contiguous()

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
        wave = self._decode(batch)[:, lead * self.hop_samples :]
        wave = wave[:, : n_frames * self.hop_samples].contiguous()
        return wave[0] if codes.dim() == 2 else wave

    def stream_encoder(self) -> StreamEncoder:
        """An encoder for a wave that arrives in pieces; together its tokens are `encode`'s.

        Raises CodecError for implementations other than "wgpt".
        """
        return codec_stream.StreamEncoder(self._streamable(), self.n_codebooks, self._lead_frames)

    def stream_decoder(self, n_codebooks: int | None = None) -> StreamDecoder:
        """A decoder for tokens that arrive frame by frame; together its samples are `decode`'s.

        n_codebooks is the most a push may carry, all by default. Raises CodecError for
        implementations other than "wgpt".
        """
        n_used = self.n_codebooks if n_codebooks is None else n_codebooks
        lead = None
        if self._lead_frames:
            lead = self._silent_frame()[:n_used].expand(-1, self._lead_frames)
        return codec_stream.StreamDecoder(self._streamable(), n_used, lead)

    def _streamable(self) -> Network:
        if self._network is None:
            raise CodecError("codec: only implementation='wgpt' can stream")
        return self._network

    def _silent_frame(self) -> Tensor:
        """Tokens (K, 1) of a frame of silence."""
        if self._silence is None:
            zeros = torch.zeros(1, 2 * self.hop_samples, device=self.device)
            self._silence = self._encode_frames(zeros)[0, :, -1:]
        return self._silence


def same_tokens(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two `Codec.identity` mean the same tokens, under whatever name or package."""
    return all(a.get(k) == b.get(k) for k in (a.keys() | b.keys()) - {"name", "implementation"})


def load(
    name_or_path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    download: bool = False,
    device: str | torch.device = "cpu",
    implementation: str = "wgpt",
) -> Codec:
    """Load a codec.

    Args:
        name_or_path: "mini" (in the package); "mini-v1" (what mini was in version 0.1.0);
            "encodec_24khz" (from the Hugging Face cache or torch's hub cache); a folder with
            config.json and model.safetensors; an original .th file, whose name carries the first
            8 hex digits of its sha256; user/codec on the Hugging Face Hub (docs/guide.md).
        sha256: what the weights file must hash to. Where the one named does not and another
            packaged codec does, that one is loaded: folders that name the old "mini" stay usable.
        download: allow a download of encodec_24khz or user/codec; without it the network is never
            touched.
        device: torch device of the weights.
        implementation: "wgpt", or the package "transformers" or "encodec", to compare with.

    Raises:
        CodecError: weights missing, damaged, not those of sha256, or of another architecture; a
            model that is not causal, not mono, or normalises each clip by its own level.
    """
    if implementation not in IMPLEMENTATIONS:
        raise CodecError(
            f"codec: implementation must be one of {', '.join(IMPLEMENTATIONS)}, got "
            f"{implementation!r}"
        )
    weights = codec_weights.read(name_or_path, download=download)
    if sha256 is not None and weights.sha256 != sha256:
        packaged = codec_weights.packaged_with(sha256)
        if packaged is None:
            raise CodecError(
                f"codec: the weights of {os.fspath(name_or_path)} must have sha256 {sha256}, got "
                f"{weights.sha256}; put back the codec that the data were prepared with, or "
                "prepare the data anew"
            )
        name_or_path = packaged
        weights = codec_weights.read(packaged)
    codec = Codec(weights, device, implementation)
    if os.path.exists(name_or_path):
        codec.source = os.path.abspath(name_or_path)
    return codec
