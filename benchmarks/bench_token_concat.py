"""How fast is token_concat against embedding + cat + add in torch, and against a copy?

Forward, and forward + backward through autograd (gradients of table, pos and mel_hidden), eager and
compiled, at the presets' sizes: batch 8 of 750 steps, 1025 entries, 128 + 128 channels, and 256
without mel. Memory-bound: forward reads and writes C elements a step, backward reads C and writes
the tables; the yardstick is torch's copy of y, and share_of_copy compares bytes per second (`bytes`
counts every input and output once; backward reads the token channels of d_y a second time).
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
    token_channels: int
    mel_channels: int
    batch: int = 8
    steps: int = 750
    vocab: int = 1025

    def n_bytes(self, passes: str, element_bytes: int) -> int:
        channels = self.token_channels + self.mel_channels
        wide = self.batch * self.steps * channels
        tables = self.vocab * self.token_channels + self.steps * channels
        forward = self.batch * self.steps * self.mel_channels + tables + wide
        backward = wide + tables
        tokens = 8 * self.batch * self.steps
        if passes == "fwd":
            return forward * element_bytes + tokens
        return (forward + backward) * element_bytes + 2 * tokens


CASES = [Case(128, 128), Case(256, 0), Case(64, 64)]
QUICK = CASES[:1]


@dataclass
class Inputs:
    tokens: Tensor
    table: Tensor
    mel_hidden: Tensor | None
    pos: Tensor
    d_y: Tensor

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, device: str) -> "Inputs":
        channels = case.token_channels + case.mel_channels
        shape = (case.batch, case.steps)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device).to(dtype)

        mel = random(*shape, case.mel_channels).requires_grad_() if case.mel_channels else None
        return cls(
            torch.randint(case.vocab, shape, device=device),
            random(case.vocab, case.token_channels).requires_grad_(),
            mel,
            random(1024, channels).requires_grad_(),
            random(*shape, channels),
        )

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.table, self.pos) + (() if self.mel_hidden is None else (self.mel_hidden,))


def ours(x: Inputs) -> Tensor:
    return ops.token_concat(x.tokens, x.table, x.mel_hidden, x.pos)


def composed(x: Inputs) -> Tensor:
    y = F.embedding(x.tokens, x.table)
    if x.mel_hidden is not None:
        y = torch.cat([y, x.mel_hidden], dim=-1)
    return y + x.pos[: x.tokens.shape[1]]


def runner(concat: Callable[[Inputs], Tensor], x: Inputs, passes: str) -> Callable[[], Any]:
    if passes == "fwd":

        def run() -> Any:
            with torch.no_grad():
                return concat(x)
    else:

        def run() -> Any:
            return torch.autograd.grad(concat(x), x.parameters, x.d_y)

    return run


def measure(case: Case, passes: str, dtype_name: str, args: argparse.Namespace) -> dict[str, Any]:
    x = Inputs.make(case, DTYPES[dtype_name], args.device)
    copy = torch.empty_like(x.d_y)
    runs = {"ours": runner(ours, x, passes), "eager": runner(composed, x, passes)}
    if not args.no_compile:
        runs["compiled"] = runner(
            torch.compile(functools.partial(composed), dynamic=False), x, passes
        )
    runs["copy"] = lambda: copy.copy_(x.d_y)
    timings = harness.interleave(
        runs,
        rounds=20 if args.quick else 80,
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
    key = ("device", "dtype", "pass", "token_channels", "mel_channels", "batch", "steps", "vocab")
    results = harness.Results(args.out, harness.machine_facts(args.device), key)
    if args.resume:
        results.resume()
    deadline = time.perf_counter() + args.time_limit
    for dtype_name in args.dtype or ["fp32"]:
        for case in QUICK if args.quick else CASES:
            for passes in ("fwd", "fwd_bwd"):
                done = results.has(
                    **({"device": args.device, "dtype": dtype_name, "pass": passes} | vars(case))
                )
                if done or time.perf_counter() > deadline:
                    continue
                row = measure(case, passes, dtype_name, args)
                results.add(row)
                say({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if not args.json:
        columns = [
            "dtype",
            "pass",
            "token_channels",
            "mel_channels",
            "ours_ms",
            "eager_ms",
            "compiled_ms",
            "copy_ms",
        ]
        ratios = ["eager_over_ours", "compiled_over_ours", "share_of_copy"]
        harness.print_table(results.rows, columns + ratios)
    results.print_json()


if __name__ == "__main__":
    main()
