"""Which kernels does a training step launch on a GPU, what do they move, and what is their floor?

Counted without a GPU: the step that `wgpt train` captures runs on tensors without data, whose CUDA
branch the ops take; torch's ops are counted as they reach the device, ours by the table OURS, which
tests/emulated_gpu holds against the launches on the emulator. Bytes are each tensor that a call
reads or writes, once, and what our ops keep in memory inside; FLOPs are those of the formula. The
floor of a call is the larger of bytes over bandwidth and FLOPs over what GEMMs reach on an H200,
with nothing between calls.

    python benchmarks/launches.py --markdown     the table of docs/performance.md
"""

import argparse
import contextlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from wgpt.config import TrainConfig
from wgpt.model import HybridModel, presets
from wgpt.ops import cuda
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import DeviceStep

SMALL_BYTES = 1 << 16
BYTES_PER_S, FLOPS_PER_S = 4.3e12, 780e12  # H200: memory, and dense bf16 GEMMs as measured
# Tensors that one launch of ATen's multi_tensor_apply takes, by the lists it reads or writes, and
# its blocks of 65536 values (ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
BLOCKS_PER_LAUNCH, VALUES_PER_BLOCK = 320, 65536
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "promote_types",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call that reaches the device."""

    name: str
    phase: str
    gemms: int  # of a library
    kernels: int  # others
    bytes: int
    flops: float

    @property
    def launches(self) -> int:
        """Of all kinds."""
        return self.gemms + self.kernels

    @property
    def floor_s(self) -> float:
        """What it takes at least on an H200."""
        return max(self.bytes / BYTES_PER_S, self.flops / FLOPS_PER_S)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a call's arguments or results."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def multi_tensor_launches(tensors: list[Tensor], depth: int) -> int:
    """How often multi_tensor_apply launches for lists of these tensors."""
    launches = n_tensors = n_blocks = 0
    for tensor in tensors:
        n_tensors += 1
        for block in range(math.ceil(tensor.numel() / VALUES_PER_BLOCK)):
            n_blocks += 1
            is_whole = (block + 1) * VALUES_PER_BLOCK >= tensor.numel()
            full = n_tensors == TENSORS_PER_LAUNCH[depth] and is_whole
            if full or n_blocks == BLOCKS_PER_LAUNCH:
                launches, n_blocks = launches + 1, 0
                n_tensors = 0 if is_whole else 1
    return launches + (n_blocks > 0)


def _foreach(name: str, args: tuple[Any, ...]) -> int:
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if name == "_fused_adamw_":
        return multi_tensor_launches(args[0], 4)
    if name == "_foreach_norm":  # zeroed sums, each tensor's blocks, and their roots
        return 1 + multi_tensor_launches(args[0], 1) + 1
    mixed = len({t.dtype for tensors in lists for t in tensors}) > 1
    if mixed and name != "_foreach_copy_":  # no fast path: tensor by tensor
        return len(args[0])
    return multi_tensor_launches(args[0], len(lists))


def _attention_flops(q: Tensor, k: Tensor, causal: bool, window: int) -> float:
    batch, q_steps, heads, head_dim = q.shape
    pairs = q_steps * k.shape[1]
    if causal:
        seen = min(window or q_steps, q_steps)
        pairs = seen * (seen + 1) // 2 + (q_steps - seen) * seen
    return 4.0 * batch * heads * pairs * head_dim


# GEMMs, other kernels, FLOPs, and values moved to and from memory inside: of our ops, from their
# arguments.
OURS: dict[str, Callable[..., tuple[int, int, float, int]]] = {
    "flash_attention": lambda q, k, v, scale, causal, window, *_: (
        0, 1, _attention_flops(q, k, causal, window), 0
    ),
    # delta; dK and dV; dQ. Five GEMMs: two of them are made twice, which is not counted.
    "flash_attention_backward": lambda d, d_lse, q, k, v, o, lse, scale, causal, window, *_: (
        0, 3, 2.5 * _attention_flops(q, k, causal, window), 0
    ),
    "mel_embed": lambda x, m, s, weight, *_: (
        0, 1, 2.0 * x.shape[0] * x.shape[1] * weight.numel(), 0
    ),
    "mel_embed_backward": lambda d, slope, x, *_: (0, 2, 2.0 * d.numel() * x.shape[2], 0),
    "token_concat": lambda *_: (0, 1, 0.0, 0),
    "token_concat_backward": lambda *_: (0, 5, 0.0, 0),
    "token_concat_norm": lambda *_: (0, 1, 0.0, 0),
    # Both norms, their weights, and token_concat's; the gradient of the tokens' half both ways.
    "token_concat_norm_backward": lambda d_fused, d_normed, fused, *rest: (
        0, 7, 0.0, 2 * fused.numel() // fused.shape[-1] * (rest[6].shape[0] - rest[5].shape[0])
    ),
    "add_rms_norm": lambda *_: (0, 1, 0.0, 0),
    "add_rms_norm_backward": lambda *_: (0, 2, 0.0, 0),
    "rotary_qkv": lambda *_: (0, 1, 0.0, 0),
    "rotary_qkv_backward": lambda *_: (0, 1, 0.0, 0),
    # z again, and GELU's values both ways.
    "feed_forward": lambda x, up, down: (
        2, 1, 4.0 * x.shape[0] * up.numel(), 3 * x.shape[0] * up.shape[0]
    ),
    # GELU's values and their gradients both ways, d_z there and twice back.
    "feed_forward_backward": lambda d_y, x, z, up, down: (
        4, 1, 8.0 * x.shape[0] * up.numel(), 7 * x.shape[0] * up.shape[0]
    ),
    # Up to 16384 rows at once: logits both ways, their gradients there and twice back.
    "linear_cross_entropy": lambda x, weight, *_: (
        3, 2, 6.0 * x.shape[0] * weight.numel(), 5 * x.shape[0] * weight.shape[0]
    ),
    "linear_cross_entropy_backward": lambda *_: (0, 2, 0.0, 0),  # torch scales both gradients
}  # fmt: skip


def _gemm_flops(name: str, args: tuple[Any, ...]) -> float:
    a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    return 2.0 * a.numel() * b.shape[-1]


class Recorder(TorchDispatchMode):
    """The calls of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.phase = "forward"

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        library, name = op._schema.name.split("::")
        reads = any(a.alias_info and not a.alias_info.is_write for a in op._schema.arguments)
        if reads or library in ("prim", "profiler") or name in NO_KERNEL:  # a view, or no tensor
            return result
        if library.startswith("wgpt") and name.startswith("check_"):
            return result
        gemms, kernels, flops, inside = 0, 1, 0.0, 0
        if library.startswith("wgpt"):
            gemms, kernels, flops, inside = OURS[name](*args)
        elif name.startswith(("_foreach", "_fused")):
            kernels = _foreach(name, args)
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            gemms, kernels, flops = 1, 0, _gemm_flops(name, args)
        elif name == "nll_loss_backward":  # zeros, and one value a row
            kernels = 2
        given = tensors_in((args, kwargs))
        written = [t for t in tensors_in(result) if not any(t is g for g in given)]
        in_place = [
            t
            for argument, value in zip(op._schema.arguments, args, strict=False)
            if argument.alias_info and argument.alias_info.is_write
            for t in tensors_in(value)
        ]
        n_bytes = sum(_n_bytes(t) for t in (*given, *written, *in_place))
        n_bytes += inside * given[0].element_size() if inside else 0
        if name in ("zero_", "fill_"):
            n_bytes //= 2  # nothing is read
        called = f"{library}::{name}"
        self.calls.append(Call(called, self.phase, gemms, kernels, n_bytes, flops))
        return result


def _n_bytes(tensor: Tensor) -> int:
    """Of a tensor in memory: an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class NoGpu:
    """What DeviceStep asks of a GPU; nothing here launches anything."""

    def stepping(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The ops take CPU tensors for those of a GPU that our kernels serve."""
    before = cuda.DEVICE_TYPE, cuda.missing_kernels
    cuda.DEVICE_TYPE, cuda.missing_kernels = "cpu", lambda index: None
    try:
        yield
    finally:
        cuda.DEVICE_TYPE, cuda.missing_kernels = before


def inputs_of(model: HybridModel, batch: int, steps: int, packed: bool) -> dict[str, Tensor]:
    """What a step of `wgpt train` reads: mel as it is stored."""
    shape = model.config
    inputs = {
        "tokens": torch.zeros(batch, steps, dtype=torch.int64),
        "targets": torch.zeros(batch, steps, dtype=torch.int64),
    }
    if shape.mel_dim:
        n_frames = steps * shape.frames_per_step
        inputs["frames"] = torch.zeros(batch, n_frames, shape.n_mels, dtype=torch.float16)
    if packed:
        inputs["first_key"] = torch.zeros(batch, steps, dtype=torch.int32)
    return inputs


def record(preset: str, dtype: str, batch: int, steps: int, packed: bool = False) -> list[Call]:
    """The calls of one captured step, after one that makes the optimizer's state."""
    settings = TrainConfig(dtype=dtype, batch_size=batch)
    with as_on_a_gpu(), FakeTensorMode():
        model = HybridModel(presets.preset(preset))
        step = DeviceStep(model, settings, ProcessGroup(), range(batch), NoGpu())  # type: ignore[arg-type]
        inputs = inputs_of(model, batch, steps, packed)
        model.keep_angles(steps)
        step._compute(1, inputs)
        with Recorder() as recorder, phases(recorder, step):
            step._compute(2, inputs)
    return recorder.calls


@contextlib.contextmanager
def phases(recorder: Recorder, step: DeviceStep) -> Iterator[None]:
    """Says to the recorder where the backward begins, and where the update does."""
    backward, clip = torch.autograd.backward, step._clip

    def named(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.phase = phase
            return function(*args, **kwargs)

        return call

    torch.autograd.backward = named("backward", backward)
    step._clip = named("update", clip)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd.backward = backward


def table(calls: list[Call]) -> str:
    """The calls by name, in markdown: launches in each phase, and what they move. Those on a few
    numbers share a row."""
    names: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        is_small = call.bytes < SMALL_BYTES
        names["scalars, figures" if is_small else call.name.replace("wgpt_kernels", "wgpt")].append(
            call
        )
    lines = ["| kernels of | forward | backward | update | MB | GFLOP | floor, us |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    order = sorted(names.items(), key=lambda item: -sum(c.floor_s for c in item[1]))
    for name, of in [*order, ("**all**", calls)]:
        counts = [sum(c.launches for c in of if c.phase == phase)
                  for phase in ("forward", "backward", "update")]  # fmt: skip
        figures = [sum(c.bytes for c in of) / 1e6, sum(c.flops for c in of) / 1e9,
                   sum(c.floor_s for c in of) * 1e6]  # fmt: skip
        label = f"`{name}`" if "::" in name else name
        cells = [label, *(str(n or "-") for n in counts), *(f"{x:.1f}" for x in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="hybrid")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--packed", action="store_true", help="several segments a row")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    calls = record(args.preset, args.dtype, args.batch, args.steps, args.packed)
    if args.markdown:
        print(table(calls))
    print(json.dumps({
        "preset": args.preset, "dtype": args.dtype, "batch": args.batch, "steps": args.steps,
        "launches": sum(call.launches for call in calls),
        "bytes": sum(call.bytes for call in calls), "flops": sum(call.flops for call in calls),
        "floor_ms": round(1e3 * sum(call.floor_s for call in calls), 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
