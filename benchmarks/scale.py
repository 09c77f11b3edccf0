"""What does training a preset take on several GPUs: memory of each, FLOPs, tokens a day?

An estimate, made without a GPU. One process's step runs on tensors without data, as in launches.py.
Its floor is that of docs/performance.md: the larger of bytes over bandwidth and FLOPs over what
GEMMs reach on an H200, summed over calls, with nothing for the time between them. What processes
send each other is given beside it: it runs while the step computes. Memory is the sum of

    activations    the most that is alive at once of what the step makes, gradients aside, counted
    ddp            weights 4, gradients 4, their buckets 4, AdamW's moments 8 bytes a parameter
    fsdp           weights 4, gradients 4, moments 8 bytes a parameter over all processes; whole,
                   weights and gradients outside the blocks and of two blocks; in the first process
                   all weights once more

What kernels and libraries keep inside, and what an allocator loses, is not counted.

    python benchmarks/scale.py --markdown     the table of docs/scale.md
    python benchmarks/scale.py --measure gpt-l --batch 4 --steps 750     activation checkpointing on
                                              this CPU: the peak of memory and the time of a step
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import weakref
from typing import Any

import torch
from harness import MemoryMeter
from launches import Call, NoGpu, Recorder, as_on_a_gpu, inputs_of, phases, tensors_in
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from wgpt.config import STEP_RATE_HZ, TrainConfig
from wgpt.data.augment import scored_steps
from wgpt.data.batches import Batch
from wgpt.model import HybridModel, presets
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import DeviceStep
from wgpt.training.step import TrainingStep

LINK_BYTES_PER_S = 450e9  # NVLink of an H200, one way, as published
DAY_S = 86400


class Alive(TorchDispatchMode):
    """Bytes of what is made inside and still referred to; gradients aside."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        self._model = model

    def __enter__(self) -> Any:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._seen[tensor.untyped_storage()] = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._is_gradient)
            for p in self._model.parameters()
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs)):  # the optimizer's, and what was there before
            self._seen.setdefault(tensor.untyped_storage(), None)
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self.bytes += storage.nbytes()
                self._seen[storage] = weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, n_bytes: int) -> None:
        self.bytes -= n_bytes

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        counted = self._seen.get(parameter.grad.untyped_storage())
        if counted is not None and counted.alive:
            counted()


def inputs(model: HybridModel, batch: int, steps: int) -> dict[str, Tensor]:
    """Packed windows as in launches.py, with all codebooks where the model has them."""
    given, shape = inputs_of(model, batch, steps, packed=True), model.config
    if model.latent is not None:
        given["tokens"] = torch.zeros(batch, steps, 1 + shape.n_fine, dtype=torch.int64)
    if model.fine is not None:
        n_chosen = scored_steps(steps, TrainConfig.fine_share, 0, 1, range(batch)).shape[1]
        given["codes"] = torch.zeros(batch, 1 + shape.n_fine, steps, dtype=torch.int64)
        given["chosen"] = torch.zeros(batch, n_chosen, dtype=torch.int64)
    return given


def step_of(preset: str, batch: int, steps: int, recompute: bool) -> tuple[list[Call], int]:
    """The calls of one process's step in bf16, and the bytes of its activations at their most."""
    settings = TrainConfig(dtype="bf16", batch_size=batch, activation_checkpointing=recompute)
    with as_on_a_gpu(), FakeTensorMode():
        model = HybridModel(presets.preset(preset))
        step = DeviceStep(model, settings, ProcessGroup(), range(batch), NoGpu())  # type: ignore[arg-type]
        step.weights = None  # autocast casts, as under torchrun
        given = inputs(model, batch, steps)
        model.keep_angles(steps)
        step._compute(1, given)
        with Recorder() as recorder, phases(recorder, step):
            step._compute(2, given)
        with Alive(model) as alive:
            step._compute(3, given)
    return recorder.calls, alive.peak


def whole_at_once(model: HybridModel) -> int:
    """Parameters that a process of FSDP holds whole at a time."""
    blocks = sorted(sum(p.numel() for p in b.parameters()) for b in model.blocks)
    mel = model.fusion.mel
    in_mel = sum(p.numel() for p in mel.blocks.parameters()) if mel is not None else 0
    return model.n_parameters() - sum(blocks) - in_mel + sum(blocks[-2:])


def rows(preset: str, n_gpus: int, batch: int, steps: int) -> list[dict[str, Any]]:
    """The four ways to train it on so many GPUs."""
    with torch.device("meta"):
        model = HybridModel(presets.preset(preset))
    n, others = model.n_parameters(), (n_gpus - 1) / n_gpus
    found = []
    for recompute in (False, True):
        calls, activations = step_of(preset, batch, steps, recompute)
        floor_s = sum(call.floor_s for call in calls)
        for strategy in ("ddp", "fsdp"):
            if strategy == "ddp":
                memory, sent = 20 * n, 2 * 4 * n * others
                first = memory
            else:  # gathered for forward and backward, then summed and scattered
                memory, sent = 16 * n / n_gpus + 8 * whole_at_once(model), 3 * 4 * n * others
                first = memory + 4 * n
            tokens_per_s = n_gpus * batch * steps / floor_s
            found.append({
                "preset": preset, "parameters": n, "gpus": n_gpus, "windows_a_gpu": batch,
                "steps_a_window": steps, "strategy": strategy,
                "activation_checkpointing": recompute,
                "activations_gb": round(activations / 1e9, 2),
                "memory_gb": round((memory + activations) / 1e9, 2),
                "memory_first_gb": round((first + activations) / 1e9, 2),
                "tflop_a_step": round(sum(call.flops for call in calls) / 1e12, 1),
                "floor_ms": round(1e3 * floor_s, 1),
                "sent_gb": round(sent / 1e9, 2),
                "sent_ms": round(1e3 * sent / LINK_BYTES_PER_S, 1),
                "tokens_a_day_at_floor": round(tokens_per_s * DAY_S),
                "hours_of_sound_a_day_at_floor": round(tokens_per_s * DAY_S / STEP_RATE_HZ / 3600),
            })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    lines = [
        "| strategy | activation checkpointing | memory a GPU, GB | TFLOP a step | floor, ms "
        "| sent, GB (ms) | tokens a day at the floor | at half its speed |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        billions = row["tokens_a_day_at_floor"] / 1e9
        lines.append(
            f"| {row['strategy']} | {'yes' if row['activation_checkpointing'] else 'no'} "
            f"| {row['memory_gb']:.1f} | {row['tflop_a_step']} "
            f"| {row['floor_ms']} | {row['sent_gb']:.1f} ({row['sent_ms']}) "
            f"| {billions:.0f} G | {billions / 2:.0f} G |"
        )
    return "\n".join(lines)


def measure(preset: str, batch: int, steps: int, recompute: bool, connection: Any) -> None:
    """In a process of its own: how far steps in fp32 raise its memory, and what one takes."""
    torch.manual_seed(0)
    model = HybridModel(presets.preset(preset))
    shape = model.config
    settings = TrainConfig(dtype="fp32", batch_size=batch, activation_checkpointing=recompute)
    tokens = torch.randint(shape.codebook_size, (batch, steps + 1))
    frames = torch.randn(batch, steps, shape.n_mels) if shape.mel_dim else None
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    given = Batch(inputs, frames, targets, clips=targets, steps=targets)
    few = [t[:, :8] for t in (inputs, targets)]
    short = Batch(few[0], None if frames is None else frames[:, :8], few[1], few[1], few[1])
    step = TrainingStep(model, settings, ProcessGroup(), range(batch))
    step(1, short)  # makes moments and gradients
    meter = MemoryMeter("cpu")
    meter.forget_peak()
    times = []
    for i in range(2, 5):
        began = time.process_time()
        step(i, given)
        times.append(time.process_time() - began)
    connection.send((meter.peak_bytes(), statistics.median(times)))


def measured(preset: str, batch: int, steps: int) -> list[dict[str, Any]]:
    """Without and with activation checkpointing."""
    found = []
    for recompute in (False, True):
        spawned = multiprocessing.get_context("spawn")
        ours, theirs = spawned.Pipe()
        process = spawned.Process(target=measure, args=(preset, batch, steps, recompute, theirs))
        process.start()
        peak, seconds = ours.recv()
        process.join()
        found.append({
            "preset": preset, "activation_checkpointing": recompute,
            "peak_mib": round(peak / 2**20, 1), "cpu_s_a_step": round(seconds, 2),
        })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="voice-l")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="windows a GPU")
    parser.add_argument("--steps", type=int, default=1500, help="length of a window")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--measure", metavar="PRESET", help="one without residual codebooks")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.batch, args.steps)))
        return 0
    found = rows(args.preset, args.gpus, args.batch, args.steps)
    if args.markdown:
        print(table(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
