"""How long does one optimizer step take in wgpt, in honest eager PyTorch, and in that compiled?

Same parameters, same data, same AdamW; the losses of the first two steps must agree before
anything is timed. Batch 8 of 10 s (750 steps) as in the presets' training. Every contestant lives
in a process of its own, so that its memory is its own: peak_memory_bytes is how far its steps raise
the resident set (on CUDA: the caching allocator) above what it held before its first step,
optimizer state included, and for `compiled` what compiling left behind. They still take turns
within a round. wgpt's process keeps freed memory, as `wgpt train` does. On CUDA there is also
`wgpt_graphed`: the step as `wgpt train` makes it, of one CUDA graph, its batch copied from pinned
memory each time.

`--profile FILE` writes where the time of wgpt's and of eager's step goes, as a markdown table.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import torch
from eager_model import EagerModel
from harness import say
from torch import Tensor, nn
from torch.nn import functional

from wgpt.config import TrainConfig
from wgpt.data.batches import Batch
from wgpt.model import HybridModel, presets
from wgpt.training.allocator import keep_freed_memory
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import training_step
from wgpt.training.optimizer import make_optimizer

COLUMNS = [
    "preset", "dtype", "device", "batch", "steps", "contestant", "step_ms", "tokens_per_s",
    "peak_memory_bytes",
]  # fmt: skip

# What a profile's operators belong to: the first name that an operator's starts with.
GROUPS = {
    "head and loss (products and softmax)": ("wgpt::linear_cross_entropy",),
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::linear",
        "wgpt::linear",
    ),
    "attention": ("wgpt::flash_attention", "aten::_scaled_dot_product"),
    "feed-forward (products and GELU)": ("wgpt::feed_forward",),
    "softmax and loss": ("aten::_log_softmax", "aten::nll_loss"),
    "norms and residual sums": ("wgpt::add_rms_norm",),
    "rotary positions": ("wgpt::rotary_qkv",),
    "GELU": ("aten::gelu",),
    "embedding": (
        "wgpt::mel_embed",
        "wgpt::token_concat",
        "aten::embedding",
        "aten::index",
    ),
    "AdamW and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "Optimizer"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::clone"),
    "elementwise (norms, rotary, residuals)": (
        "aten::mul", "aten::add", "aten::sub", "aten::div", "aten::pow", "aten::neg", "aten::sum",
        "aten::mean", "aten::rsqrt",
    ),
}  # fmt: skip


class Step:
    """One contestant: a call makes one whole optimizer step and keeps its loss."""

    def __init__(self, name: str, preset: str, dtype: str, device: str, batch: int, steps: int):
        shape = presets.preset(preset)
        torch.manual_seed(0)
        self.ours = HybridModel(shape).to(device)
        tokens = torch.randint(shape.codebook_size, (batch, steps + 1), device=device)
        self.frames = (
            torch.randn(batch, steps, shape.n_mels, device=device) if shape.mel_dim else None
        )
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.device, self.bf16 = device, dtype == "bf16"
        self.model: nn.Module = self.ours
        self.summed_loss = self.our_loss
        if name.startswith("wgpt"):
            keep_freed_memory()
        else:
            self.model = EagerModel(shape, steps).to(device)
            self.model.copy_weights(self.ours)
            del self.ours
            self.forward = torch.compile(self.model) if name == "compiled" else self.model
            self.summed_loss = self.eager_loss
        self.optimizer = make_optimizer(self.model, TrainConfig(lr=1e-4))
        self.loss: Tensor | None = None

    def our_loss(self) -> Tensor:
        hidden = self.ours.hidden(self.tokens, self.frames)
        return self.ours.score(hidden, self.targets)[0]

    def eager_loss(self) -> Tensor:
        logits = self.forward(self.tokens, self.frames).flatten(0, 1).float()
        return functional.cross_entropy(logits, self.targets.flatten(), reduction="sum")

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.summed_loss() / self.targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.detach()

    def first(self) -> list[float]:
        """The losses of two steps."""
        losses = []
        for _ in range(2):
            self()
            assert self.loss is not None
            losses.append(self.loss.item())
        return losses


class ProductStep:
    """The step of `wgpt train --device cuda`, on the inputs of Step."""

    def __init__(self, preset: str, dtype: str, device: str, batch: int, steps: int) -> None:
        inputs = Step("wgpt", preset, dtype, "cpu", batch, steps)
        self.device = device
        settings = TrainConfig(
            lr=1e-4, min_lr_ratio=1, warmup_steps=0, dtype=dtype, graph="on", batch_size=batch
        )
        self.batch = Batch(
            inputs.tokens, None if inputs.frames is None else inputs.frames.half(), inputs.targets,
            clips=inputs.targets, steps=inputs.targets,
        ).pin_memory()  # fmt: skip
        processes = ProcessGroup(device=torch.device(device, torch.cuda.current_device()))
        model = inputs.ours.to(processes.device)
        self.step = training_step(model, settings, processes, range(batch))
        self.n_steps = 0

    def first(self) -> list[float]:
        """The losses of two steps; afterwards the step is captured."""
        losses = []
        for _ in range(self.step.n_timed):
            self.n_steps += 1
            losses.append(self.step(self.n_steps, self.batch)[0]["nll_nats"])
        return losses[:2]

    def __call__(self) -> None:
        self.n_steps += 1
        self.step.run(self.n_steps, self.batch)


def serve(connection: Connection, threads: int, name: str, *settings: Any) -> None:
    """A contestant's process: answers "first" (two losses), "step" (ms), "profile" and "memory"."""
    torch.set_num_threads(threads)
    step: Any = ProductStep(*settings) if name == "wgpt_graphed" else Step(name, *settings)
    device = step.device
    meter = harness.MemoryMeter(device)
    clock = harness.cuda_wall_ms if device == "cuda" else harness.wall_ms
    for request in iter(connection.recv, "stop"):
        if request == "first":
            losses = step.first()
            meter.forget_peak()  # of compiling
            connection.send(losses)
        elif request == "step":
            connection.send(clock(step))
        elif request == "profile":
            connection.send(profile(step))
        elif request == "memory":
            connection.send(meter.peak_bytes())


class Contestant:
    """The benchmark's end of a contestant's process."""

    def __init__(self, *settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        arguments = (other, torch.get_num_threads(), *settings)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()

    def ask(self, request: str) -> Any:
        self.connection.send(request)
        return self.answer()

    def answer(self) -> Any:
        while not self.connection.poll(1):
            if not self.process.is_alive():
                raise RuntimeError(f"a contestant's process ended with {self.process.exitcode}")
        return self.connection.recv()

    def stop(self) -> None:
        self.connection.send("stop")
        self.process.join()


def contestants(names: list[str], *settings: Any) -> dict[str, Contestant]:
    """Started and warm, all at once: one may compile for a minute. AssertionError if their first
    losses differ."""
    say(f"{' '.join(map(str, settings))}: first steps of {', '.join(names)}")
    made = {name: Contestant(name, *settings) for name in names}
    for contestant in made.values():
        contestant.connection.send("first")
    losses = {name: contestant.answer() for name, contestant in made.items()}
    tolerance = 2e-2 if settings[1] == "bf16" else 1e-4
    for values in zip(*losses.values(), strict=True):
        assert max(values) - min(values) < tolerance, f"the losses differ: {losses}"
    return made


def step_ms(contestant: Contestant) -> float:
    time.sleep(0.01)  # the last contestant's idle threads go to sleep
    return float(contestant.ask("step"))


def profile(step: Step, n_steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by group of operators, self time.

    The profiler's own records come to lie between the steps' tensors, so the heap grows: into
    memory that was touched before, or its page faults (up to 4 ms for 2 MiB on a virtual machine)
    would count as time of whatever op asks for the largest tensor.
    """
    torch.zeros(1 << 29, dtype=torch.uint8)  # freed at once, and kept by wgpt's process
    with torch.profiler.profile() as recorded:
        for _ in range(n_steps):
            step()
    groups = dict.fromkeys((*GROUPS, "other"), 0.0)
    for event in recorded.key_averages():
        if event.key.startswith("ProfilerStep"):
            continue
        key = event.key.replace("wgpt_kernels::", "wgpt::")
        owner = next((group for group, names in GROUPS.items() if key.startswith(names)), "other")
        groups[owner] += event.self_cpu_time_total / 1e3 / n_steps
    return groups


def profile_table(title: str, columns: dict[str, dict[str, float]]) -> str:
    """The profiles side by side, in markdown."""
    rows = [
        group for group in (*GROUPS, "other") if any(c[group] >= 0.05 for c in columns.values())
    ]
    lines = [f"### {title}", "", "| ms a step | " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    totals = {name: sum(column.values()) for name, column in columns.items()}
    for group in rows:
        cells = [
            f"{column[group]:.1f} ({100 * column[group] / totals[name]:.0f} %)"
            if column[group] >= 0.05
            else "-"
            for name, column in columns.items()
        ]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    lines.append("| **all** | " + " | ".join(f"{total:.0f}" for total in totals.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--presets", nargs="+", default=["gpt-s", "hybrid", "gpt-l"])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--contestants", nargs="+", default=["wgpt", "eager", "compiled"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="append profiles to FILE")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = harness.Results(
        args.out, harness.machine_facts(args.device), ("preset", "dtype", "contestant")
    )
    if args.resume:
        results.resume()
    names = [*args.contestants, *(["wgpt_graphed"] if args.device == "cuda" else [])]
    for preset in args.presets[:1] if args.quick else args.presets:
        for dtype in args.dtype:
            if results.has(preset=preset, dtype=dtype, contestant="wgpt"):
                continue
            made = contestants(names, preset, dtype, args.device, args.batch, args.steps)
            timings = harness.interleave(
                {name: lambda c=c: step_ms(c) for name, c in made.items()},
                rounds=args.rounds,
                time_limit_s=min(args.time_limit, 90),
                clock=lambda run: run(),
            )
            for name, timing in timings.items():
                results.add({
                    "preset": preset, "dtype": dtype, "device": args.device,
                    "batch": args.batch, "steps": args.steps, "contestant": name,
                    "step_ms": timing.median_ms,
                    "quartiles_ms": [timing.low_ms, timing.high_ms],
                    "tokens_per_s": args.batch * args.steps / timing.median_ms * 1e3,
                    "wgpt_speedup": harness.ratio(timing, timings["wgpt"]),
                    "peak_memory_bytes": made[name].ask("memory"),
                })  # fmt: skip
            if args.profile:
                columns = {n: made[n].ask("profile") for n in ("wgpt", "eager") if n in made}
                with args.profile.open("a") as file:
                    file.write("\n" + profile_table(f"`{preset}`, {dtype}", columns))
            for contestant in made.values():
                contestant.stop()
    if not args.json:
        harness.print_table(results.rows, [*COLUMNS, "wgpt_speedup"])
    results.print_json()


if __name__ == "__main__":
    main()
