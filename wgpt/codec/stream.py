"""Stream an EnCodec network: encode sound as it arrives, decode tokens as they are sampled.

A stream starts each layer from what the last call left: the left context of a convolution, the
previous input of a transposed convolution, the state of an LSTM. The outputs are the same
whatever the chunks, a whole file being one chunk, and memory does not grow with the stream.

With reflect padding every layer mirrors its first samples, so the first frames depend on later
ones and have to wait for them. A lead, frames of silence that are coded first and not given,
removes the wait; `codec.Codec` puts the same lead before whole files.

Stream with `torch.set_num_threads(1)`: a frame is too small to share between threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from wgpt.codec.layers import Layer, Network, State, concatenate, repeat
from wgpt.errors import CodecError

# Longer pushes are cut into blocks of this many frames (0.85 s), which bounds working memory.
BLOCK_FRAMES = 64

AnyStream = TypeVar("AnyStream", bound="_Stream")


class _Stream:
    """Layers and, for each, its state: the part that both directions share."""

    _rate_in: int  # samples per frame that enter the first layer
    _n_lead: int  # frames put in front of every stream, whose outputs are not given

    def __init__(self, network: Network, layers: list[Layer], n_codebooks: int | None) -> None:
        n_most = network.architecture.n_codebooks
        self.n_codebooks = n_most if n_codebooks is None else n_codebooks
        if not 1 <= self.n_codebooks <= n_most:
            raise CodecError(
                f"codec_stream: n_codebooks must lie in [1, {n_most}], got {n_codebooks}"
            )
        self.hop_samples = network.architecture.hop_samples
        self._layers = layers
        self._embed = network.codebooks[: self.n_codebooks]  # (K, V, C)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next push is the start of a new one, of any batch size."""
        self._states: list[State] = [None] * len(self._layers)
        self._held: dict[int, Tensor] = {}  # inputs of layers that cannot start yet
        self._tail: Tensor | None = None
        self._n_batch: int | None = None  # None until the first push
        self._batched = False
        self._flushed = False

    def clone(self: AnyStream, n_batch: int | None = None) -> AnyStream:
        """A stream at the same place that goes its own way from here.

        Costs no copy of parameters, nor of the state, which steps replace and never write to.
        With n_batch, a stream of one becomes n_batch equal ones, pushed as (n_batch, ...): code
        a prompt once, then sample many continuations. Raises CodecError if it is not of one.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._states, twin._held = list(self._states), dict(self._held)
        if n_batch is None:
            return twin
        if self._n_batch not in (None, 1) or n_batch < 1:
            raise CodecError(
                "codec_stream: clone(n_batch) takes a stream of one to at least one, got a "
                f"stream of {self._n_batch} and n_batch {n_batch}"
            )
        if self._n_batch is not None:
            twin._states = [repeat(state, n_batch) for state in self._states]
            twin._held = {i: repeat(x, n_batch) for i, x in self._held.items()}
            twin._tail = repeat(self._tail, n_batch)
            twin._n_batch, twin._batched = n_batch, True
        return twin

    @staticmethod
    def join(streams: list[AnyStream]) -> AnyStream:
        """One stream whose batch is that of the given ones, in order.

        They must be batched streams of one codec that have started and hold nothing back; those
        given keep their own way. Raises CodecError otherwise.
        """
        first = streams[0]
        for s in streams:
            tail = 0 if s._tail is None else s._tail.shape[1]
            if not s._batched or s._held or tail or any(x is None for x in s._states):
                raise CodecError(
                    "codec_stream: only batched streams that have started and wait for nothing "
                    f"can join, got one {s._describe()} with {tail} samples waiting"
                )
        twin = first.clone()
        rows = zip(*(s._states for s in streams), strict=True)
        twin._states = [concatenate(list(row)) for row in rows]
        twin._tail = None
        twin._n_batch = sum(s._n_batch or 0 for s in streams)
        return twin

    def _accept(self, x: Tensor, n_dims: int, what: str) -> Tensor:
        """x with a batch dimension, once it is known to continue this stream."""
        if x.dim() not in (n_dims, n_dims + 1):
            raise CodecError(
                f"codec_stream: {what} must have {n_dims} dimensions, or {n_dims + 1} with a "
                f"batch, got shape {tuple(x.shape)}"
            )
        if x.device != self._embed.device:
            raise CodecError(
                f"codec_stream: {what} must be on the model's device {self._embed.device}, got "
                f"{x.device}"
            )
        if self._flushed:
            raise CodecError("codec_stream: nothing can follow flush(); call reset() first")
        batched = x.dim() > n_dims
        n_batch = x.shape[0] if batched else 1
        if n_batch == 0:
            raise CodecError(f"codec_stream: {what} must not be a batch of none, got {x.shape}")
        if self._n_batch is None:
            self._n_batch, self._batched = n_batch, batched
        elif (n_batch, batched) != (self._n_batch, self._batched):
            raise CodecError(
                f"codec_stream: this stream is {self._describe()}, got {what} of shape "
                f"{tuple(x.shape)}; call reset() to start another"
            )
        return x if batched else x[None]

    def _describe(self) -> str:
        return f"a batch of {self._n_batch}" if self._batched else "without a batch"

    def _advance(self, x: Tensor | None, final: bool = False) -> Tensor | None:
        """Push samples (B, n, C) or nothing through all layers; None if nothing comes out."""
        for i, layer in enumerate(self._layers):
            state = self._states[i]
            if state is None:
                if i in self._held:
                    held = self._held.pop(i)
                    x = held if x is None else torch.cat((held, x), 1)
                if x is None:
                    continue
                if x.shape[1] < layer.n_start and not final:
                    self._held[i] = x
                    return None
                state = layer.start(x)
            if x is not None:
                x, self._states[i] = layer.step(x, state)
        return x

    def _check_lead(self, n_lead_frames: int) -> int:
        if n_lead_frames != 0 and n_lead_frames < self._n_mirrored:
            raise CodecError(
                f"codec_stream: a lead must have 0 or at least {self._n_mirrored} frames, got "
                f"{n_lead_frames}"
            )
        return n_lead_frames

    def flush(self) -> Tensor:
        """What is still held back at the end, in the shape that push returns.

        There is something only if fewer than n_start_frames frames came in all, so never if that
        is 1. The layers then start from what they have, followed by zeros, as for a whole file.
        An incomplete last frame is dropped. Afterwards only reset() is allowed.
        """
        self._flushed = True
        return self._run(lambda x: self._give([self._advance(x, final=True)]), None)

    def _run(self, function: Callable[[Any], Tensor], x: Tensor | None) -> Tensor:
        """function(x) in inference mode (0.03 ms less per frame than under no_grad)."""
        with torch.inference_mode():
            out = function(x)
        # The copy is an ordinary tensor: it can be changed in place or saved for a backward.
        return (out if self._batched else out[0]).clone()

    def _give(self, outputs: list[Tensor | None]) -> Tensor:
        """Join what the last layer gave, (B, n, C) each, into what push returns, batched."""
        raise NotImplementedError

    @property
    def n_start_frames(self) -> int:
        """Frames a new stream waits for before it gives the first; later ones come at once.

        1 with zero padding or a lead; 7 for EnCodec 24 kHz (reflect padding) without a lead.
        """
        return 1 if self._n_lead else self._n_mirrored

    @property
    def _n_mirrored(self) -> int:
        """Frames that every layer's first samples depend on."""
        rate, n_frames = self._rate_in, 1
        for layer in self._layers:
            n_frames = max(n_frames, -(-layer.n_start // rate))
            rate = rate * layer.up // layer.down
        return n_frames


class StreamEncoder(_Stream):
    """Encode a 24 kHz wave that arrives in pieces.

    n_codebooks is the number of codebooks K to give, all of them by default; n_lead_frames the
    frames of silence to encode before every stream.
    """

    def __init__(
        self, network: Network, n_codebooks: int | None = None, n_lead_frames: int = 0
    ) -> None:
        super().__init__(network, network.encoder, n_codebooks)
        self._rate_in = self.hop_samples
        self._n_lead = self._check_lead(n_lead_frames)
        self._half_norm = -0.5 * self._embed.square().sum(2)  # (K, V)
        self._embed_t = self._embed.transpose(1, 2).contiguous()  # (K, C, V)

    def push(self, wave: Tensor) -> Tensor:
        """Codes of the frames that wave completes.

        wave is float32 (n,) or (B, n) with any n >= 0. Returns int64 (K, t) or (B, K, t): all
        pushes together give n_total // hop_samples frames, those of the whole wave up to there
        (up to ties between codes within float32 rounding). The first n_start_frames come
        together. Raises CodecError if the shape or dtype does not fit or a sample is not finite.
        """
        if wave.dtype != torch.float32:
            raise CodecError(f"codec_stream: wave must be float32, got {wave.dtype}")
        if not wave.isfinite().all():  # one such sample would stay in the state for ever
            raise CodecError("codec_stream: wave holds NaN or infinite samples")
        n_lead = self._n_lead if self._n_batch is None else 0
        # pad copies, even by 0: what stays in the state must not share the caller's memory.
        wave = F.pad(self._accept(wave, 1, "wave"), (n_lead * self.hop_samples, 0))
        return self._run(self._push, wave)[..., n_lead:]

    def _push(self, wave: Tensor) -> Tensor:
        if self._tail is not None:
            wave = torch.cat((self._tail, wave), 1)
        n_whole = wave.shape[1] // self.hop_samples * self.hop_samples
        blocks = wave[:, :n_whole, None].split(BLOCK_FRAMES * self.hop_samples, 1)
        codes = self._give([self._advance(x) for x in blocks if n_whole])
        self._tail = wave[:, n_whole:].clone()  # a view would keep all of wave alive
        return codes

    def _give(self, outputs: list[Tensor | None]) -> Tensor:
        codes = [self._quantize(z) for z in outputs if z is not None]
        if codes:
            return torch.cat(codes, 2)
        return self._embed.new_zeros((self._n_batch or 1, self.n_codebooks, 0), dtype=torch.int64)

    def _quantize(self, latent: Tensor) -> Tensor:
        """Latent frames (B, t, C) to codes (B, K, t): the nearest entry, then of what remains."""
        n_batch, n_frames, _ = latent.shape
        residual, codes = latent.flatten(0, 1), []
        for k in range(self.n_codebooks):
            # argmin |r - e|^2 = argmax r.e - |e|^2 / 2
            code = torch.addmm(self._half_norm[k], residual, self._embed_t[k]).argmax(1)
            residual = residual - self._embed[k][code]
            codes.append(code)
        return torch.stack(codes).view(-1, n_batch, n_frames).transpose(0, 1)


class StreamDecoder(_Stream):
    """Decode codes that arrive a few frames at a time.

    n_codebooks is the most codebooks a push may carry, all of them by default; lead the codes of
    silence, int64 (n_codebooks, n_lead_frames), to decode before every stream.
    """

    _rate_in = 1

    def __init__(
        self, network: Network, n_codebooks: int | None = None, lead: Tensor | None = None
    ) -> None:
        super().__init__(network, network.decoder, n_codebooks)
        self._n_lead = self._check_lead(0 if lead is None else lead.shape[1])
        self._lead = lead
        n_entries = self._embed.shape[1]
        self._offsets = n_entries * torch.arange(self.n_codebooks, device=self._embed.device)
        self._table = self._embed.flatten(0, 1)  # (K * V, C)

    def push(self, codes: Tensor) -> Tensor:
        """The samples of these frames.

        codes is int64 (k, t) or (B, k, t), 1 <= k <= n_codebooks, any t >= 0. Returns float32
        (t * hop_samples,) or (B, t * hop_samples), equal to decoding all codes at once within
        1e-5. The first n_start_frames come together, so if that is not 1 early pushes give
        nothing. The lead has the k codebooks of the first push. Raises CodecError if the shape,
        dtype or range does not fit.
        """
        if codes.dtype != torch.int64:
            raise CodecError(f"codec_stream: codes must be int64, got {codes.dtype}")
        if codes.dim() > 1 and not 1 <= codes.shape[-2] <= self.n_codebooks:
            raise CodecError(
                f"codec_stream: codes must have 1 to {self.n_codebooks} codebooks in dimension "
                f"-2, got shape {tuple(codes.shape)}"
            )
        if codes.numel():
            low, high = (int(x) for x in codes.aminmax())
            if low < 0 or high >= self._embed.shape[1]:
                raise CodecError(
                    f"codec_stream: codes must lie in [0, {self._embed.shape[1]}), got values "
                    f"from {low} to {high}"
                )
        n_lead = self._n_lead if self._n_batch is None else 0
        codes = self._accept(codes, 2, "codes")
        if n_lead and self._lead is not None:
            lead = self._lead[: codes.shape[1]].expand(len(codes), -1, -1)
            codes = torch.cat((lead, codes), 2)
        return self._run(self._push, codes)[..., n_lead * self.hop_samples :]

    def _push(self, codes: Tensor) -> Tensor:
        rows = codes.transpose(1, 2) + self._offsets[: codes.shape[1]]
        blocks = rows.split(BLOCK_FRAMES, 1)
        return self._give(
            [self._advance(F.embedding(x, self._table).sum(2)) for x in blocks if x.numel()]
        )

    def _give(self, outputs: list[Tensor | None]) -> Tensor:
        waves = [x[:, :, 0] for x in outputs if x is not None]
        return torch.cat(waves, 1) if waves else self._embed.new_zeros(self._n_batch or 1, 0)


def encode(network: Network, batch: Tensor) -> Tensor:
    """Tokens int64 (B, K, T) of waves (B, L) of T whole frames."""
    encoder = StreamEncoder(network)
    return torch.cat((encoder.push(batch), encoder.flush()), 2)


def decode(network: Network, codes: Tensor) -> Tensor:
    """Waves float32 (B, T * hop) of tokens (B, k, T)."""
    decoder = StreamDecoder(network)
    return torch.cat((decoder.push(codes), decoder.flush()), 1)
