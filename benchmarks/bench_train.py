"""How long does one optimizer step take in wgpt, in honest eager PyTorch, and in that compiled?

Same parameters, same data, same AdamW; the first losses must agree before anything is timed. Batch
8 of 10 s (750 steps) as in the presets' training. On CUDA also wgpt's step replayed from one CUDA
graph. `--profile` prints where wgpt's step goes.
"""

import argparse
import gc
from typing import Any

import harness
import torch
from eager_model import EagerModel
from harness import say
from torch import nn
from torch.nn import functional

from wgpt import config
from wgpt.config import TrainConfig
from wgpt.model import HybridModel
from wgpt.train import make_optimizer

COLUMNS = [
    "preset", "dtype", "device", "batch", "steps", "contestant", "step_ms", "tokens_per_s",
    "peak_memory_bytes",
]  # fmt: skip


class Step:
    """One contestant: a call makes one whole optimizer step and keeps its loss."""

    def __init__(
        self, model: nn.Module, forward: Any, batch: tuple, dtype: str, device: str
    ) -> None:
        self.model, self.forward, self.batch = model, forward, batch
        self.bf16, self.device = dtype == "bf16", device
        self.optimizer = make_optimizer(model, TrainConfig(lr=1e-4))
        self.loss: torch.Tensor | None = None

    def __call__(self) -> None:
        tokens, frames, targets = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = self.forward(tokens, frames)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.detach()


def contestants(preset: str, dtype: str, device: str, batch: int, steps: int, names: list[str]):
    """The contestants with equal weights and data; raises AssertionError if their losses differ."""
    shape = config.preset(preset)
    torch.manual_seed(0)
    ours = HybridModel(shape).to(device)
    tokens = torch.randint(shape.codebook_size, (batch, steps + 1), device=device)
    frames = torch.randn(batch, steps, shape.n_mels, device=device) if shape.mel_dim else None
    data = (tokens[:, :-1].contiguous(), frames, tokens[:, 1:].contiguous())
    made = {}
    for name in names:
        if name == "wgpt":
            made[name] = Step(ours, ours, data, dtype, device)
            continue
        eager = EagerModel(shape, steps).to(device)
        eager.copy_weights(ours)
        forward = torch.compile(eager) if name == "compiled" else eager
        made[name] = Step(eager, forward, data, dtype, device)
    losses = {}
    for name, step in made.items():
        say(f"{preset} {dtype}: first step of {name}")
        step()
        assert step.loss is not None
        losses[name] = step.loss.item()
    tolerance = 2e-2 if dtype == "bf16" else 1e-4
    spread = max(losses.values()) - min(losses.values())
    assert spread < tolerance, f"the contestants do not compute the same loss: {losses}"
    return made


class GraphedStep:
    """A Step captured once in a CUDA graph: forward, backward, clipping and AdamW in one launch."""

    def __init__(self, step: Step) -> None:
        for group in step.optimizer.param_groups:
            group["capturable"] = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        self.graph.replay()


def profile(step: Step) -> str:
    """Where the time of a step goes, by operator."""
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            step()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=22)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--presets", nargs="+", default=["gpt-s", "hybrid", "gpt-l"])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--contestants", nargs="+", default=["wgpt", "eager", "compiled"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="print the profile of wgpt's step")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = harness.Results(
        args.out, harness.machine_facts(args.device), ("preset", "dtype", "contestant")
    )
    if args.resume:
        results.resume()
    for preset in args.presets[:1] if args.quick else args.presets:
        for dtype in args.dtype:
            if results.has(preset=preset, dtype=dtype, contestant="wgpt"):
                continue
            made = contestants(preset, dtype, args.device, args.batch, args.steps, args.contestants)
            if args.device == "cuda":
                # A second wgpt model: the captured one's optimizer state must not move under it.
                twin = contestants(preset, dtype, "cuda", args.batch, args.steps, ["wgpt"])
                made["wgpt_graphed"] = GraphedStep(twin["wgpt"])
            clock = harness.cuda_wall_ms if args.device == "cuda" else None
            timings = harness.interleave(made, rounds=args.rounds, time_limit_s=90, clock=clock)
            for name, timing in timings.items():
                memory = harness.peak_memory_mib(made[name], args.device)
                results.add({
                    "preset": preset, "dtype": dtype, "device": args.device,
                    "batch": args.batch, "steps": args.steps, "contestant": name,
                    "step_ms": timing.median_ms,
                    "quartiles_ms": [timing.low_ms, timing.high_ms],
                    "tokens_per_s": args.batch * args.steps / timing.median_ms * 1e3,
                    "wgpt_speedup": harness.ratio(timing, timings["wgpt"]),
                    "peak_memory_bytes": None if memory is None else int(memory * 2**20),
                })  # fmt: skip
            if args.profile:
                say(profile(made["wgpt"]))
            del made
            gc.collect()
    if not args.json:
        harness.print_table(results.rows, [*COLUMNS, "wgpt_speedup"])
    results.print_json()


if __name__ == "__main__":
    main()
