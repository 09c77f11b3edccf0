"""The two packages that can run an EnCodec network: transformers, and the original encodec."""

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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.encodec.configuration_encodec import EncodecConfig
from transformers.models.encodec.modeling_encodec import EncodecModel

from wgpt.codec.weights import CodecError, CodecWeights

Stage = Callable[[Tensor], Tensor]


def make_config(weights: CodecWeights) -> EncodecConfig:
    """The architecture, with transformers' defaults (EnCodec 24 kHz) for absent fields."""
    config = {k: v for k, v in weights.config.items() if k not in ("torch_dtype", "dtype")}
    try:
        return EncodecConfig(**config)
    except (TypeError, ValueError) as error:
        raise CodecError(f"codec: config.json of {weights.name} is not usable: {error}") from error


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load every tensor; only the codebooks' running means, which nothing reads, may miss."""
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CodecError(f"codec: weights of {name} do not fit its config: {error}") from error
    optional = ("embed_avg", "cluster_size", "inited")
    missing = [key for key in missing if not key.endswith(optional)]
    if missing or unexpected:
        raise CodecError(
            f"codec: weights of {name} do not fit its config: {len(missing)} missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )


def transformers_stages(
    weights: CodecWeights, config: EncodecConfig
) -> tuple[nn.Module, Stage, Stage, Stage, Stage]:
    """The network in transformers' EncodecModel, built without its loader and its log lines."""
    with torch.random.fork_rng(devices=[]):  # building draws random weights
        model = EncodecModel(config)
    _load_strictly(model, weights.tensors, weights.name)
    return model, model.encoder, model.quantizer.encode, model.quantizer.decode, model.decoder


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


def encodec_stages(
    weights: CodecWeights, config: EncodecConfig
) -> tuple[nn.Module, Stage, Stage, Stage, Stage]:
    """The network in the encodec package's own modules."""
    if importlib.util.find_spec("encodec") is None:
        raise CodecError(
            "codec: implementation='encodec' needs the package encodec (pip install encodec); "
            "implementation='transformers' gives the same tokens"
        )
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
            dimension=config.hidden_size, n_q=config.num_quantizers, bins=config.codebook_size
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
    return (
        model,
        model.encoder,
        lambda z: quantizer.vq.encode(z, n_q=config.num_quantizers),
        quantizer.vq.decode,
        model.decoder,
    )


def _flat_name(key: str) -> str:
    return key.replace(".convtr.convtr.", ".conv.").replace(".conv.conv.", ".conv.")
