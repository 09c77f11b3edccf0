"""Models, inputs and comparisons for the tests of codec streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wgpt.codec.layers import Network
from wgpt.codec.network import Architecture, parameter_shapes

HOP = 320
ATOL = 1e-5

MINI = {
    "target_bandwidths": [0.75, 1.5, 3.0, 6.0],
    "pad_mode": "constant",
    "num_filters": 8,
    "hidden_size": 48,
    "num_lstm_layers": 1,
    "upsampling_ratios": [2, 4, 5, 8],
    "last_kernel_size": 5,
    "use_conv_shortcut": False,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mini": MINI,
    "dilated": MINI
    | {
        "upsampling_ratios": [8, 5, 4, 2],
        "num_residual_layers": 2,
        "residual_kernel_size": 5,
        "use_conv_shortcut": True,
        "num_lstm_layers": 2,
    },
    "mini-reflect": MINI | {"pad_mode": "reflect"},
    "encodec": {},
}
_MODELS: dict[str, Any] = {}


def to_unit_variance(module: Any, _inputs: Any, out: Tensor) -> Tensor:
    """A forward hook that rescales a convolution so that what it gives has unit variance."""
    scale = 1 / out.std()
    module.parametrizations.weight.original0.data *= scale
    module.bias.data *= scale
    return out * scale


@torch.no_grad()
def model_of(name: str) -> Any:
    """A model with random weights whose signals keep unit variance from layer to layer."""
    if name not in _MODELS:
        modeling = pytest.importorskip("transformers.models.encodec.modeling_encodec")
        torch.manual_seed(7)
        model = modeling.EncodecModel(modeling.EncodecConfig(**SETTINGS[name])).eval()
        convolutions = [x for x in model.modules() if hasattr(x, "dilation")]
        hooks = [x.register_forward_hook(to_unit_variance) for x in convolutions]
        z = model.encoder(noise(40 * HOP)[None, None])
        model.decoder(torch.randn_like(z))
        for hook in hooks:
            hook.remove()
        for parameter in model.decoder.layers[-1].conv.parameters():
            parameter *= 0.2  # the level of sound
        for i, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.normal_(0, 0.8**i)
        _MODELS[name] = model
    return _MODELS[name]


def network_of(model: Any) -> Network:
    """Our network with the weights of transformers' model."""
    architecture = Architecture.from_config(model.config.to_dict(), "the test's")
    state = model.state_dict()
    return Network(architecture, {name: state[name] for name in parameter_shapes(architecture)})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encode_whole(model: Any, wave: Tensor, n_codebooks: int = 8) -> Tensor:
    """Codes (K, T) of the whole frames of wave (L,), by transformers."""
    wave = wave[: wave.shape[0] // HOP * HOP]
    return model.quantizer.encode(model.encoder(wave[None, None]), 0.75 * n_codebooks)[:, 0]


@torch.no_grad()
def decode_whole(model: Any, codes: Tensor) -> Tensor:
    """Samples (T * 320,) of codes (K, T), by transformers."""
    return model.decode(codes[None, None], [None])[0][0, 0]


def cut(n: int, lengths: Callable[[], int]) -> Iterator[slice]:
    start = 0
    while start < n:
        end = min(n, start + lengths())
        yield slice(start, end)
        start = end


def assert_same_codes(model: Any, wave: Tensor, got: Tensor, expected: Tensor) -> None:
    """Equal codes, but where rounding decides between two entries (then not the later ones)."""
    assert got.dtype == torch.int64 and got.shape == expected.shape
    with torch.no_grad():
        residual = model.encoder(wave[None, None, : got.shape[1] * HOP])[0].double()  # (C, T)
    n_ties, alike = 0, torch.ones(got.shape[1], dtype=torch.bool)
    for k in range(got.shape[0]):
        entries = model.quantizer.layers[k].codebook.embed.double()
        for t in torch.nonzero(alike & (got[k] != expected[k])).flatten().tolist():
            pair = entries[[int(got[k, t]), int(expected[k, t])]]
            near, far = (residual[:, t] - pair).norm(dim=1).sort().values.tolist()
            assert far - near < 1e-5 * far, f"codebook {k}, frame {t}: not a tie"
            alike[t], n_ties = False, n_ties + 1
        residual = residual - entries[expected[k]].T
    assert n_ties <= 2


def stored_bytes(stream: Any) -> int:
    """Bytes of memory that the state of a stream keeps alive."""
    tensors = [stream._tail, *stream._held.values()]
    for state in stream._states:
        tensors += state if isinstance(state, tuple) else [state]
    storages = [x.untyped_storage() for x in tensors if x is not None]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())
