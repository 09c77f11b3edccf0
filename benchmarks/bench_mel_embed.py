"""How fast is mel_embed against the same formula composed of torch ops, eager and compiled?

Forward, and forward + backward through autograd (gradients of weight, bias and pos; frames are
data), at the presets' sizes: batch 8 of 750 steps, 64 mel bins, one frame a step and 0 to 3 frames
of context. FLOPs: 2 K Cm a step forward and as many backward, K = 64 (c + 1). At c = 0 the GELU,
frames in and y out cost as much as the product. share_of_copy compares the bytes per second that
must move (`bytes`: every input, output and saved slope once a pass) with a copy of y.
"""

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import DTYPES, say
from torch import Tensor

from wgpt import ops


@dataclass(frozen=True)
class Case:
    context_frames: int
    channels: int
    batch: int = 8
    steps: int = 750
    mels: int = 64

    def flops(self, passes: str) -> int:
        product = (
            2 * self.batch * self.steps * (1 + self.context_frames) * self.mels * self.channels
        )
        return product * (2 if passes == "fwd_bwd" else 1)

    def n_bytes(self, passes: str, element_bytes: int) -> int:
        steps = self.batch * self.steps
        frames, y = 4 * steps * self.mels, element_bytes * steps * self.channels
        weight = element_bytes * (1 + self.context_frames) * self.mels * self.channels
        forward = frames + weight + y
        return 2 * frames + 2 * weight + 4 * y if passes == "fwd_bwd" else forward


CASES = [Case(c, channels) for channels in (128, 64) for c in (0, 1, 2, 3)]
QUICK = [Case(0, 128), Case(3, 128)]


@dataclass
class Inputs:
    frames: Tensor  # (B, T, M)
    mean: Tensor
    inv_std: Tensor
    weight: Tensor
    bias: Tensor
    pos: Tensor
    d_y: Tensor

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, device: str) -> "Inputs":
        k = (1 + case.context_frames) * case.mels
        parameters = [
            torch.randn(case.channels, k, device=device) * k**-0.5,
            torch.randn(case.channels, device=device),
            torch.randn(1024, case.channels, device=device) * 0.02,
        ]
        return cls(
            torch.randn(case.batch, case.steps, case.mels, device=device),
            torch.randn(case.mels, device=device),
            torch.rand(case.mels, device=device) + 0.5,
            *(p.to(dtype).requires_grad_() for p in parameters),
            torch.randn(case.batch, case.steps, case.channels, device=device).to(dtype),
        )

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.pos


def ours(case: Case, x: Inputs) -> Tensor:
    return ops.mel_embed(
        x.frames, x.mean, x.inv_std, x.weight, x.bias, x.pos, context_frames=case.context_frames
    )


def composed(case: Case, x: Inputs) -> Tensor:
    """The formula as one would write it in torch: normalise, pad, unfold, linear, GELU, add."""
    normal = ((x.frames - x.mean) * x.inv_std).to(x.weight.dtype)
    if case.context_frames > 0:
        padded = F.pad(normal, (0, 0, case.context_frames, 0))
        normal = padded.unfold(1, 1 + case.context_frames, 1).transpose(2, 3).flatten(2)
    return F.gelu(F.linear(normal, x.weight, x.bias)) + x.pos[: case.steps]


def runner(embed: Callable[[Inputs], Tensor], x: Inputs, passes: str) -> Callable[[], Any]:
    if passes == "fwd":

        def run() -> Any:
            with torch.no_grad():
                return embed(x)
    else:

        def run() -> Any:
            return torch.autograd.grad(embed(x), x.parameters, x.d_y)

    return run


def measure(
    case: Case, passes: str, dtype_name: str, args: argparse.Namespace, peak: float
) -> dict[str, Any]:
    x = Inputs.make(case, DTYPES[dtype_name], args.device)
    formula = functools.partial(composed, case)
    runs = {
        "ours": runner(functools.partial(ours, case), x, passes),
        "eager": runner(formula, x, passes),
    }
    if not args.no_compile:
        runs["compiled"] = runner(torch.compile(formula, dynamic=False), x, passes)
    copy = torch.empty_like(x.d_y)
    runs["copy"] = lambda: copy.copy_(x.d_y)
    timings = harness.interleave(
        runs,
        rounds=15 if args.quick else 60,
        time_limit_s=args.case_limit,
        warmups=3,
        clock=harness.cuda_wall_ms if args.device == "cuda" else None,
    )
    row = {"device": args.device, "dtype": dtype_name, "pass": passes} | vars(case)
    for name, timing in timings.items():
        row |= {f"{name}_ms": timing.median_ms, f"{name}_best_ms": timing.best_ms}
        if name != "ours":
            row[f"{name}_over_ours"] = harness.ratio(timing, timings["ours"])
    row["bytes"] = case.n_bytes(passes, x.d_y.element_size())
    row["share_of_copy"] = harness.share_of_copy(
        row["bytes"], timings["ours"], x.d_y, timings["copy"]
    )
    row["share_of_peak"] = case.flops(passes) / (timings["ours"].median_ms * 1e-3) / peak
    row["peak_memory_mib"] = harness.peak_memory_mib(runs["ours"], args.device)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="may be repeated")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--case-limit", type=float, default=8.0, metavar="S", help="seconds for one row's rounds"
    )
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    key = ("device", "dtype", "pass", "context_frames", "channels", "batch", "steps", "mels")
    results = harness.Results(args.out, harness.machine_facts(args.device), key)
    if args.resume:
        results.resume()
    deadline = time.perf_counter() + args.time_limit
    for dtype_name in args.dtype or ["fp32"]:
        peak = harness.measured_peak_flops(args.device, DTYPES[dtype_name])
        results.facts[f"peak_gflops_{dtype_name}"] = round(peak * 1e-9)
        for case in QUICK if args.quick else CASES:
            for passes in ("fwd", "fwd_bwd"):
                done = results.has(
                    **({"device": args.device, "dtype": dtype_name, "pass": passes} | vars(case))
                )
                if done or time.perf_counter() > deadline:
                    continue
                row = measure(case, passes, dtype_name, args, peak)
                results.add(row)
                say({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if not args.json:
        columns = [
            "dtype",
            "pass",
            "context_frames",
            "channels",
            "ours_ms",
            "eager_ms",
            "compiled_ms",
        ]
        ratios = ["eager_over_ours", "compiled_over_ours", "share_of_peak", "share_of_copy"]
        harness.print_table(results.rows, columns + ratios)
    results.print_json()


if __name__ == "__main__":
    main()
