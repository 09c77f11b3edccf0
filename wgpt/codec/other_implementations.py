"""The same networks in two other packages, to compare with: transformers, and the original encodec.

Both give the tokens of `wgpt.codec.layers` for the same weights. Neither streams.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wgpt.codec.network import Architecture
from wgpt.codec.weights import CodecWeights
from wgpt.errors import CodecError

_FRAMES_AT_ONCE = 4096  # bounds the (frames, entries) distances of the quantiser to 16 MiB


@dataclass(frozen=True)
class OtherNetwork:
    """An EnCodec network by its four stages, as one of the packages runs it."""

    module: nn.Module
    embed: Callable[[Tensor], Tensor]  # (B, 1, L) -> (B, C, T)
    quantize: Callable[[Tensor], Tensor]  # (B, C, T) -> (K, B, T)
    dequantize: Callable[[Tensor], Tensor]  # (k, B, T) -> (B, C, T)
    render: Callable[[Tensor], Tensor]  # (B, C, T) -> (B, 1, L)

    def encode(self, batch: Tensor) -> Tensor:
        """Waves (B, L) of whole frames to tokens (B, K, T)."""
        latents = self.embed(batch[:, None])
        parts = [self.quantize(part) for part in latents.split(_FRAMES_AT_ONCE, 2)]
        return torch.cat(parts, 2).transpose(0, 1).contiguous()

    def decode(self, codes: Tensor) -> Tensor:
        """Tokens (B, k, T) to waves (B, T * hop)."""
        return self.render(self.dequantize(codes.transpose(0, 1)))[:, 0]


def load(implementation: str, weights: CodecWeights, device: torch.device) -> OtherNetwork:
    """The network in "transformers" or "encodec"; CodecError if that package is missing."""
    if importlib.util.find_spec(implementation) is None:
        raise CodecError(
            f"codec: implementation={implementation!r} needs the package {implementation} (pip "
            f"install 'wgpt[{implementation}]'); the default gives the same tokens"
        )
    build = {"transformers": _transformers_network, "encodec": _encodec_network}[implementation]
    network = build(weights)
    network.module.eval().requires_grad_(False).to(device)
    return network


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load every tensor; only the codebooks' running means, which nothing reads, may miss."""
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    optional = ("embed_avg", "cluster_size", "inited")
    missing = [key for key in missing if not key.endswith(optional)]
    if missing or unexpected:
        raise CodecError(
            f"codec: weights of {name} do not fit this package's network: {len(missing)} missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )


def _transformers_network(weights: CodecWeights) -> OtherNetwork:
    """transformers' EncodecModel, built without its loader and its log lines."""
    from transformers.models.encodec.configuration_encodec import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecModel

    with torch.random.fork_rng(devices=[]):  # building draws random weights
        model = EncodecModel(EncodecConfig(**weights.architecture.to_config()))
    _load_strictly(model, weights.tensors, weights.name)
    return OtherNetwork(
        model, model.encoder, model.quantizer.encode, model.quantizer.decode, model.decoder
    )


# ------------------------------------------------------------------ the encodec package


@contextlib.contextmanager
def _importable_torchaudio() -> Iterator[None]:
    """Let `import torchaudio` succeed for the duration, with an empty module if it must.

    encodec imports torchaudio for its resampler and its command line, which are not used here,
    and torchaudio's common wheels do not import beside a CPU-only torch. The stand-in and
    whatever the failed import left behind are removed afterwards.
    """
    try:
        importlib.import_module("torchaudio")
    except Exception:  # a wheel for another torch fails with OSError or others
        for name in [m for m in sys.modules if m.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
    else:
        yield
        return
    stand_in = {name: types.ModuleType(name) for name in ("torchaudio", "torchaudio.transforms")}
    for name, module in stand_in.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules.update(stand_in)
    try:
        yield
    finally:
        for name in stand_in:
            sys.modules.pop(name, None)


def _original_name(key: str) -> str:
    """The name in the original release of a transformers name (the inverse renames)."""
    key = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", key)
    key = key.replace("quantizer.layers.", "quantizer.vq.layers.")
    key = key.replace(".codebook.", "._codebook.")
    return re.sub(r"parametrizations\.weight\.original([01])$",
                  lambda m: "weight_" + "gv"[int(m[1])], key)  # fmt: skip


def _encodec_network(weights: CodecWeights) -> OtherNetwork:
    """The network in the encodec package's own modules."""
    config: Architecture = weights.architecture
    with _importable_torchaudio():
        seanet = importlib.import_module("encodec.modules.seanet")
        quantization = importlib.import_module("encodec.quantization")
    shared: dict[str, Any] = dict(
        channels=1,
        dimension=config.hidden_size,
        n_filters=config.num_filters,
        n_residual_layers=config.num_residual_layers,
        ratios=list(config.upsampling_ratios),
        norm="weight_norm",
        kernel_size=config.kernel_size,
        last_kernel_size=config.last_kernel_size,
        residual_kernel_size=config.residual_kernel_size,
        dilation_base=config.dilation_growth_rate,
        causal=True,
        pad_mode=config.pad_mode,
        true_skip=not config.use_conv_shortcut,
        compress=config.compress,
        lstm=config.num_lstm_layers,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its old weight_norm warns once per layer
        model: Any = nn.Module()
        model.encoder = seanet.SEANetEncoder(**shared)
        model.decoder = seanet.SEANetDecoder(**shared, trim_right_ratio=1.0)
        model.quantizer = quantization.ResidualVectorQuantizer(
            dimension=config.hidden_size, n_q=config.n_codebooks, bins=config.codebook_size
        )
    # Its convolutions are wrapped once more (.conv.conv., .convtr.convtr.): match by the tail.
    theirs = {_flat_name(key): key for key in model.state_dict()}
    tensors = {theirs.get(k, k): v for k, v in
               ((_original_name(k), v) for k, v in weights.tensors.items())}  # fmt: skip
    for key in theirs.values():  # trained, not to be re-initialised from the first batch
        if key.endswith("inited"):
            tensors[key] = torch.ones(1)
    _load_strictly(model, tensors, weights.name)
    quantizer: Any = model.quantizer
    return OtherNetwork(
        model,
        model.encoder,
        lambda z: quantizer.vq.encode(z, n_q=config.n_codebooks),
        quantizer.vq.decode,
        model.decoder,
    )


def _flat_name(key: str) -> str:
    return key.replace(".convtr.convtr.", ".conv.").replace(".conv.conv.", ".conv.")
