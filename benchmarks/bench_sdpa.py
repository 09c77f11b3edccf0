"""From how much work on is our attention faster than torch's behind scaled_dot_product_attention?

Below it, `wgpt.ops.use_for_sdpa` should leave a call to torch (`least_work` of wgpt/ops/sdpa.py,
multiply-adds of q k^T): the way into Python costs more than the kernel gains. Calls of growing
length, with and without the line and without its limit, taken in turns in one process; the median
ratio of each call and, by power of two of work, the smallest. The answer is the power from which on
no ratio is below 1. The last line of stdout is JSON.

    python benchmarks/bench_sdpa.py [--rounds 31] [--dtypes float32 bfloat16] [--threads 2]

With --head-dims, each of these numbers of channels instead, 4 heads and 512 steps, whether the line
would take it or not (`is_fast` of wgpt/ops/sdpa.py). With --decode, one query against growing
numbers of keys, the caches emptied before every call as a model's weights do, since what Python
costs then is several times what it costs in a loop. With --threads 1 times are CPU times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch.nn.functional import scaled_dot_product_attention

from wgpt import ops
from wgpt.ops import sdpa

# Batch, heads, channels per head: few and many heads, each size of ours.
LAYOUTS = [(1, 4, 32), (1, 8, 64), (8, 6, 64), (1, 8, 128), (4, 16, 64)]
STEPS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MOST_WORK = 1 << 28  # nothing is in doubt there
DECODE_LAYOUTS = [(1, 4, 64), (1, 8, 64), (4, 12, 64), (1, 8, 128)]
KEYS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def _seconds(function: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    function()
    return clock() - began


def measure(
    shape: tuple[int, int, int, int], causal: bool, trains: bool, dtype: torch.dtype, rounds: int
) -> float:
    """Torch's time over ours for a square call, the median of turns of some milliseconds each."""
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(trains) for _ in range(3))
    d_out = torch.ones_like(q)

    def once() -> None:
        out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        if trains:
            torch.autograd.grad(out, (q, k, v), d_out)

    once()
    n_calls = max(1, int(2e-3 / max(_seconds(once), 1e-6)))

    def many() -> None:
        for _ in range(n_calls):
            once()

    ratios = []
    for turn in range(rounds + 1):
        plain = _seconds(many)
        with ops.use_for_sdpa():
            ours = _seconds(many)
        if turn:  # the first warms up
            ratios.append(plain / ours)
    return statistics.median(ratios)


@torch.inference_mode()
def measure_decode(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> float:
    """Torch's time over ours for one query against (B, H, Tk, D) keys, from memory: median."""
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    weights = torch.zeros(1 << 24)  # 64 MB

    def once() -> float:
        weights.sum()
        return _seconds(lambda: scaled_dot_product_attention(q[:, :, -1:], k, v))

    ratios = []
    for turn in range(rounds + 1):
        plain = once()
        with ops.use_for_sdpa():
            ours = once()
        if turn:  # the first warms up
            ratios.append(plain / ours)
    return statistics.median(ratios)


def _decode_rows(dtype: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for batch, heads, head_dim in DECODE_LAYOUTS:
        for keys in KEYS:
            ratio = measure_decode((batch, heads, keys, head_dim), getattr(torch, dtype), rounds)
            work = batch * heads * keys * head_dim
            rows.append({
                "dtype": dtype, "keys": (batch, heads, keys, head_dim), "what": "decode",
                "log2_work": work.bit_length() - 1, "speedup": round(ratio, 3),
            })  # fmt: skip
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--head-dims", type=int, nargs="+")
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    sdpa.least_work = lambda queries, head_dim, dtype: 0
    layouts, lengths = LAYOUTS, STEPS
    if args.head_dims:
        layouts, lengths = [(1, 4, head_dim) for head_dim in args.head_dims], (512,)
        sdpa.is_fast = lambda head_dim, dtype, is_causal: True
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        if args.decode:
            rows += _decode_rows(dtype, args.rounds)
            continue
        for batch, heads, head_dim in layouts:
            for steps in lengths:
                work = batch * heads * steps * steps * head_dim
                if work > MOST_WORK and not args.head_dims:
                    continue
                for causal in (True, False):
                    for trains in (False, True):
                        shape = (batch, heads, steps, head_dim)
                        ratio = measure(shape, causal, trains, getattr(torch, dtype), args.rounds)
                        rows.append({
                            "dtype": dtype, "shape": shape, "causal": causal,
                            "what": "forward and backward" if trains else "forward",
                            "log2_work": work.bit_length() - 1, "speedup": round(ratio, 3),
                        })  # fmt: skip
                        sys.stderr.write(f"{rows[-1]}\n")
    smallest: dict[int, float] = {}
    for row in rows:
        power = row["log2_work"]
        smallest[power] = min(smallest.get(power, row["speedup"]), row["speedup"])
    lost = [power for power, ratio in smallest.items() if ratio < 1]
    result = {
        "question": __doc__.splitlines()[0],
        "machine": harness.machine_facts("cpu"),
        "smallest_speedup_by_log2_work": dict(sorted(smallest.items())),
        "faster_from_log2_work": max(lost) + 1 if lost else min(smallest),
        "rows": rows,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
