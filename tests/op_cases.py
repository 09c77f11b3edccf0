"""Random calls of each op, and how to run one in a given type with its gradients."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from numerics import (
    RoundedTanh,
    assert_as_accurate_as_torch,
    assert_rows_as_accurate_as_torch,
    attention_roundings,
    nudge,
)
from torch import Tensor

from wgpt import ops
from wgpt.ops import cuda

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LSE_PLACES_16_BIT = 1 / 32  # measured: 1/108 of a bfloat16's last place with vdpbf16ps kernels

ATTENTION_SIZES = [  # batch, q_steps, kv_steps, heads, head_dim
    (1, 1, 1, 1, 32),
    (2, 7, 7, 3, 32),
    (1, 31, 31, 2, 64),
    (1, 32, 32, 1, 128),
    (1, 33, 33, 2, 64),
    (2, 127, 127, 1, 32),
    (1, 128, 128, 2, 128),
    (1, 129, 129, 1, 64),
    (1, 257, 257, 1, 32),
    (2, 1, 97, 2, 64),  # one decoded step
    (1, 13, 97, 2, 32),  # a chunk against a cache
]
ATTENTION_MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 17},
    "full window": {"causal": False, "window": 17},
    "own key only": {"window": 1},
    "scale": {"scale": 0.37},
}
MEL_SIZES = [  # batch, steps, mels, channels, frames_per_step, context_frames
    (1, 1, 1, 1, 1, 0),
    (2, 7, 13, 5, 1, 0),
    (3, 2, 80, 64, 1, 2),
    (1, 31, 64, 32, 2, 2),
    (2, 32, 64, 33, 2, 1),
    (1, 33, 17, 31, 3, 5),
    (2, 127, 80, 128, 1, 0),
    (1, 129, 65, 127, 4, 3),
]


def skip_float64_on_cuda(device: str, dtype: torch.dtype) -> None:
    import pytest

    if cuda.is_gpu(torch.device(device)) and dtype not in CUDA_DTYPES:
        pytest.skip("float64 runs on the CPU only")


@dataclass
class Call:
    """One call: tensors by argument name in order, which are parameters, and the options."""

    name: str
    tensors: dict[str, Tensor | None]
    parameters: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(ops.reference, self.name)

    def converted(self, dtype: torch.dtype) -> "Call":
        """The same numbers in another type; integer tensors stay."""
        tensors = {
            name: t if t is None or not t.is_floating_point() else t.to(dtype)
            for name, t in self.tensors.items()
        }
        return Call(self.name, tensors, self.parameters, self.options)


def _output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(y.shape, generator=generator, dtype=torch.float64)
        .to(torch.bfloat16)  # representable in every type, so that all see the same gradient
        .to(y.device, y.dtype)
        for y in outputs
    ]


def run(
    function: Callable[..., Any],
    call: Call,
    nudged_as: torch.dtype | None = None,
    *,
    rows: bool = False,
) -> dict[str, Tensor]:
    """Outputs and, for fixed random output gradients, the gradients of all parameters, by name.

    nudged_as: move every input (float64) by one rounding of that type's accumulation. rows: count
    what shows in single rows alone.
    """
    leaves: dict[str, Tensor | None] = {}
    for name, tensor in call.tensors.items():
        if tensor is not None and nudged_as and tensor.is_floating_point():
            tensor = nudge(tensor, nudged_as)
        wants_grad = tensor is not None and name in call.parameters
        leaves[name] = (
            tensor.detach().requires_grad_() if wants_grad and tensor is not None else tensor
        )
    with RoundedTanh(nudged_as) if nudged_as else nullcontext():
        result = function(*leaves.values(), **call.options)
    outputs = result if isinstance(result, tuple) else (result,)
    d_outputs = _output_gradients(outputs)
    if nudged_as and call.name == "flash_attention" and len(outputs) == 2:
        d_out, moved = attention_roundings(
            d_outputs[0], *(y.detach() for y in outputs), nudged_as, of_stored_out=rows
        )
        d_outputs = [d_out, d_outputs[1] + moved]
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), d_outputs)
    values = dict(zip(("y", "lse"), (y.detach() for y in outputs), strict=False))
    values.update({f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return values


def check_accuracy(call: Call, op: Callable[..., Any] | None = None, *, rows: bool = False) -> None:
    """The op against its reference in the same type, both against the reference in float64.

    op: what to run in its place. rows: hold every row to the rule too.
    """
    ours, plain = run(op or call.op, call), run(call.reference, call)
    double = call.converted(torch.float64)
    exact = run(call.reference, double)
    nudged = run(call.reference, double, nudged_as=ours["y"].dtype, rows=rows)
    if "lse" in ours and ours["lse"].dtype != plain["lse"].dtype:
        # lse is float32 for 16-bit inputs: hold it to what torch gets in float32, but let it show
        # that weights which are going to be 16-bit numbers need no float32 exponentials.
        plain["lse"] = run(call.reference, call.converted(torch.float32))["lse"]
        nudged["lse"] += LSE_PLACES_16_BIT * torch.finfo(ours["y"].dtype).eps
    check = assert_rows_as_accurate_as_torch if rows else assert_as_accurate_as_torch
    for name, value in ours.items():
        check(f"{call.name} {name}", value, plain[name], exact[name], nudged[name])


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(torch.nan_to_num(a[name]), torch.nan_to_num(b[name]))
        assert same and a[name].dtype == b[name].dtype, f"{name} differs"


def attention_call(
    batch: int = 2,
    q_steps: int = 7,
    kv_steps: int | None = None,
    heads: int = 3,
    head_dim: int = 32,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Call:
    kv_shape = (q_steps if kv_steps is None else kv_steps, heads if kv_heads is None else kv_heads)
    q, k, v = (
        torch.randn(batch, *shape, head_dim, dtype=torch.float64).to(device, dtype)
        for shape in ((q_steps, heads), kv_shape, kv_shape)
    )
    options.setdefault("return_lse", True)
    return Call("flash_attention", {"q": q, "k": k, "v": v}, ("q", "k", "v"), options)


def mel_call(
    batch: int = 2,
    steps: int = 7,
    mels: int = 13,
    channels: int = 5,
    frames_per_step: int = 1,
    context_frames: int = 0,
    *,
    pos_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    frames_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Call:
    width = (frames_per_step + context_frames) * mels
    constants = torch.float64 if dtype == torch.float64 else torch.float32
    frames = 3 * torch.randn(batch, steps * frames_per_step, mels) - 4  # log-mel's habitual offset
    tensors: dict[str, Tensor | None] = {
        "frames": frames.to(device, frames_dtype or constants),
        "mean": torch.full((mels,), -4.0).add(torch.randn(mels)).to(device, constants),
        "inv_std": torch.rand(mels).add(0.2).to(device, constants),
        "weight": torch.randn(channels, width).mul(width**-0.5).to(device, dtype),
        "bias": torch.randn(channels).to(device, dtype),
        "pos": None if pos_rows is None else torch.randn(pos_rows, channels).to(device, dtype),
    }
    options = {"frames_per_step": frames_per_step, "context_frames": context_frames}
    return Call("mel_embed", tensors, ("weight", "bias", "pos"), options)


def token_call(
    batch: int = 2,
    steps: int = 7,
    vocab: int = 13,
    token_channels: int = 5,
    mel_channels: int = 3,
    *,
    pos_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Call:
    channels = token_channels + mel_channels
    mel = torch.randn(batch, steps, mel_channels) if mel_channels else None
    tensors: dict[str, Tensor | None] = {
        "tokens": torch.randint(vocab, (batch, steps)).to(device),
        "table": torch.randn(vocab, token_channels).to(device, dtype),
        "mel_hidden": None if mel is None else mel.to(device, dtype),
        "pos": None if pos_rows is None else torch.randn(pos_rows, channels).to(device, dtype),
    }
    return Call("token_concat", tensors, ("table", "mel_hidden", "pos"))


MAKERS: dict[str, Callable[..., Call]] = {
    "flash_attention": attention_call,
    "mel_embed": mel_call,
    "token_concat": token_call,
}
SAMPLES: dict[str, dict[str, Any]] = {
    "flash_attention": {"window": 4},
    "mel_embed": {"frames_per_step": 2, "context_frames": 1, "pos_rows": 9},
    "token_concat": {"pos_rows": 9},
}
