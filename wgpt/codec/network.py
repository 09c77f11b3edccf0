"""The layers of an EnCodec network, by the names that transformers' EncodecModel gives them.

    wave (L, 1) -> conv -> [residuals, ELU, strided conv] per ratio -> LSTM -> ELU, conv -> z
    z (T, E) -> conv -> LSTM -> [ELU, transposed conv, residuals] per ratio -> ELU, conv -> wave

after the SEANet of Defossez et al., 2022 (arXiv 2210.13438). Here stand the shapes alone: what runs
them is `wgpt.codec.layers` (streams and whole files) and `wgpt.codec.training.forward` (with
gradients).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from wgpt.errors import CodecError


@dataclass(frozen=True)
class Architecture:
    """The fields of transformers' EncodecConfig, with its defaults (the released 24 kHz model)."""

    sampling_rate: int = 24_000
    audio_channels: int = 1
    normalize: bool = False
    chunk_length_s: float | None = None
    overlap: float | None = None
    hidden_size: int = 128
    num_filters: int = 32
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    norm_type: str = "weight_norm"
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True
    pad_mode: str = "reflect"
    compress: int = 2
    num_lstm_layers: int = 2
    trim_right_ratio: float = 1.0
    codebook_size: int = 1024
    codebook_dim: int | None = None
    use_conv_shortcut: bool = True
    target_bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> Architecture:
        """Read the content of a config.json; fields that do not shape the network are ignored.

        Raises:
            CodecError: a field of the wrong type.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known
        }
        architecture = cls(**values)
        for key, value in asdict(architecture).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and not all(type(n) in (int, float) for n in value):
                raise CodecError(f"codec: config.json of {name}: {key} must hold numbers")
            # Far above any codec, far below what would be allocated for ever.
            if any(not isinstance(n, str) and n and not 0 < n <= 100_000 for n in numbers):
                raise CodecError(
                    f"codec: config.json of {name}: {key} must lie in (0, 100000], got {value}"
                )
            expected = type(getattr(cls, key))
            if key in ("chunk_length_s", "overlap", "codebook_dim"):
                continue
            if not isinstance(value, expected) and not (expected is float and type(value) is int):
                raise CodecError(
                    f"codec: config.json of {name} is not usable: {key} must be a "
                    f"{expected.__name__}, got {value!r}"
                )
        return architecture

    def check_causal(self, name: str) -> None:
        """Refuse what would let a token see later samples, or the loudness of the whole clip.

        Raises:
            CodecError: says which field of the config.json of `name` is in the way.
        """
        rules = (
            (self.use_causal_conv, "use_causal_conv must be true (or tokens see the future)"),
            (
                self.trim_right_ratio == 1.0,
                "trim_right_ratio must be 1.0 (output would shift)",
            ),
            (self.audio_channels == 1, f"must be mono, got {self.audio_channels} channels"),
            (not self.normalize, "normalize must be false (tokens would know the clip's loudness)"),
            (self.chunk_length_s is None, "chunk_length_s must be null (chunks forget the past)"),
            (self.norm_type == "weight_norm", "norm_type must be weight_norm (groups see ahead)"),
            (self.pad_mode in ("constant", "reflect"), "pad_mode must be constant or reflect"),
            (self.num_lstm_layers > 0, "num_lstm_layers must be at least 1"),
        )
        for holds, rule in rules:
            if not holds:
                raise CodecError(f"codec: {name} cannot be used: {rule}; use encodec_24khz or mini")

    def to_config(self) -> dict[str, Any]:
        """The content of a config.json that transformers' EncodecModel reads too."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return values | {"model_type": "encodec", "architectures": ["EncodecModel"]}

    @property
    def hop_samples(self) -> int:
        return math.prod(self.upsampling_ratios)

    @property
    def n_codebooks(self) -> int:
        """Codebooks at the highest bandwidth, in kbit/s."""
        frame_rate_hz = math.ceil(self.sampling_rate / self.hop_samples)
        bits = math.ceil(math.log2(self.codebook_size))
        return int(1000 * self.target_bandwidths[-1] // (frame_rate_hz * bits))


@dataclass(frozen=True)
class Conv:
    """A causal convolution, with an ELU in front or not.

    `stride` samples in give `up` samples out; one of the two is 1. A transposed convolution
    (up > 1) has a kernel of 2 up taps.
    """

    name: str
    n_in: int
    n_out: int
    kernel: int = 1
    stride: int = 1
    up: int = 1
    dilation: int = 1
    elu: bool = True

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """As torch's Conv1d, or ConvTranspose1d, keeps it."""
        first = (self.n_in, self.n_out) if self.up > 1 else (self.n_out, self.n_in)
        return (*first, self.kernel)


@dataclass(frozen=True)
class Residual:
    """x, or a 1x1 convolution of it, plus two convolutions of x."""

    inner: Conv
    outer: Conv
    shortcut: Conv | None


@dataclass(frozen=True)
class Lstm:
    """x plus `n_layers` of LSTM over x."""

    name: str
    width: int
    n_layers: int


Layer = Conv | Residual | Lstm


def _residual(a: Architecture, name: str, width: int, depth: int) -> Residual:
    dilation = a.dilation_growth_rate**depth
    hidden = width // a.compress
    inner = Conv(f"{name}.block.1.conv", width, hidden, a.residual_kernel_size, dilation=dilation)
    outer = Conv(f"{name}.block.3.conv", hidden, width)
    shortcut = Conv(f"{name}.shortcut.conv", width, width, elu=False)
    return Residual(inner, outer, shortcut if a.use_conv_shortcut else None)


def encoder_layers(a: Architecture) -> list[Layer]:
    """Layers of the encoder, (L, 1) to (L / hop, hidden_size)."""
    name, width = "encoder.layers.", a.num_filters
    layers: list[Layer] = [Conv(f"{name}0.conv", 1, width, a.kernel_size, elu=False)]
    i = 1
    for ratio in reversed(a.upsampling_ratios):
        for depth in range(a.num_residual_layers):
            layers.append(_residual(a, f"{name}{i}", width, depth))
            i += 1
        i += 1  # transformers counts the ELU
        layers.append(Conv(f"{name}{i}.conv", width, 2 * width, 2 * ratio, stride=ratio))
        i += 1
        width *= 2
    layers.append(Lstm(f"{name}{i}.lstm", width, a.num_lstm_layers))
    layers.append(Conv(f"{name}{i + 2}.conv", width, a.hidden_size, a.last_kernel_size))
    return layers


def decoder_layers(a: Architecture) -> list[Layer]:
    """Layers of the decoder, (T, hidden_size) to (T * hop, 1)."""
    name, width = "decoder.layers.", a.num_filters * 2 ** len(a.upsampling_ratios)
    layers: list[Layer] = [
        Conv(f"{name}0.conv", a.hidden_size, width, a.kernel_size, elu=False),
        Lstm(f"{name}1.lstm", width, a.num_lstm_layers),
    ]
    i = 2
    for ratio in a.upsampling_ratios:
        i += 1
        layers.append(Conv(f"{name}{i}.conv", width, width // 2, 2 * ratio, up=ratio))
        i += 1
        width //= 2
        for depth in range(a.num_residual_layers):
            layers.append(_residual(a, f"{name}{i}", width, depth))
            i += 1
    layers.append(Conv(f"{name}{i + 1}.conv", width, 1, a.last_kernel_size))
    return layers


def convolutions(layers: list[Layer]) -> Iterator[Conv]:
    """Every convolution of some layers, in the order that sound passes them."""
    for layer in layers:
        if isinstance(layer, Conv):
            yield layer
        elif isinstance(layer, Residual):
            yield from (c for c in (layer.inner, layer.outer, layer.shortcut) if c is not None)


def effective_weight(conv: Conv, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight behind torch's weight normalisation, gain times direction; `weight_shape`."""
    gain = tensors[f"{conv.name}.parametrizations.weight.original0"]
    direction = tensors[f"{conv.name}.parametrizations.weight.original1"]
    return direction * (gain / direction.flatten(1).norm(dim=1)[:, None, None])


def parameter_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that model.safetensors must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layers in (encoder_layers(a), decoder_layers(a)):
        for conv in convolutions(layers):
            shapes[f"{conv.name}.parametrizations.weight.original0"] = (conv.weight_shape[0], 1, 1)
            shapes[f"{conv.name}.parametrizations.weight.original1"] = conv.weight_shape
            shapes[f"{conv.name}.bias"] = (conv.n_out,)
        for layer in layers:
            if isinstance(layer, Lstm):
                for i in range(layer.n_layers):
                    for kind in ("ih", "hh"):
                        shapes[f"{layer.name}.weight_{kind}_l{i}"] = (4 * layer.width, layer.width)
                        shapes[f"{layer.name}.bias_{kind}_l{i}"] = (4 * layer.width,)
    width = a.codebook_dim or a.hidden_size
    for k in range(a.n_codebooks):
        shapes[f"quantizer.layers.{k}.codebook.embed"] = (a.codebook_size, width)
    return shapes
