"""How fast is flash_attention against torch's own attention, and how far from the machine's limit?

Causal attention, forward and forward + backward through autograd, q, k, v as slices of one fused
projection (B, T, 3, H, D), as the model has them. FLOPs over visible pairs: 4 D forward, 10 D more
backward (5 products); the share of peak divides by a measured one (see harness).

CPU: ours, torch SDPA, and eager (the T x T matrix written out; skipped where it would not fit).
Packed documents (`documents` > 1) also run as one causal document of the same length: what packing
saves is `over_causal`, their time over its (`one_thread_over_causal`: CPU time of one thread).
SDPA has the block-diagonal mask there.
CUDA: ours against SDPA pinned to each backend, compiled flex_attention and eager; device time by
events around a replayed graph (`*_ms`), and the wall time of an eager call (`*_wall_ms`). One row a
backend. --quick: twelve cases, against SDPA alone. A run that stops at --time-limit goes on with
--resume.

--adversarial (CPU) instead asks what the lazy softmax maximum costs at its worst: scores that rise
along the keys, so that it is raised again and again, over flat scores of the same shape.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from attention_contestants import (
    SDPA_BACKENDS,
    Case,
    Inputs,
    eager,
    eager_fits,
    flex,
    flex_block_mask,
    ours,
    runner,
    sdpa,
    visible_mask,
)
from harness import DTYPES, say
from torch import Tensor

CPU_CASES = [
    Case(4, 4, 750, 32),
    Case(4, 4, 750, 64),
    Case(8, 8, 1024, 64),
    Case(1, 8, 3000, 64),
    Case(2, 4, 2048, 128),
    Case(1, 1, 3000, 64),
    Case(4, 4, 1024, 32, documents=8),
    Case(4, 4, 1024, 64, documents=8),
]
CPU_SWEEP = [Case(1, 2, steps, 64, window) for steps in (4096, 8192, 32768) for window in (0, 1024)]
CPU_QUICK = [
    Case(4, 4, 750, 32),
    Case(2, 4, 1024, 64),
    Case(4, 4, 1024, 32, documents=8),
    Case(4, 4, 1024, 64, documents=8),
]


# The first minutes of a GPU: shapes of the training step and those that papers quote, D 64 first.
CUDA_QUICK = [
    Case(8, 4, 750, 64),
    Case(16, 8, 1024, 64),
    Case(8, 8, 2048, 64),
    Case(16, 8, 1024, 64, documents=8),
    Case(5, 8, 3000, 64),
    Case(2, 8, 8192, 64),
    Case(2, 8, 8192, 64, 1024),
    Case(8, 4, 750, 32),
    Case(16, 16, 1024, 32),
    Case(8, 16, 2048, 32),
    Case(16, 4, 1024, 128),
    Case(8, 4, 2048, 128),
]


def cuda_cases() -> list[Case]:
    """About 16k steps a batch, and small batches, at the lengths the models use and beyond."""
    cases = []
    for head_dim in (32, 64, 128):
        heads = 512 // head_dim
        for n in (500, 512, 750, 1000, 1024, 2048, 3000, 8192, 32768):
            cases.append(Case(max(1, 16384 // n), heads, n, head_dim))
            if n <= 3000:
                cases.append(Case(2, heads, n, head_dim))
            if n >= 8192:
                cases.append(Case(1, heads, n, head_dim, 1024))
            if n == 1024:
                cases.append(Case(16, heads, n, head_dim, documents=8))
    return list(dict.fromkeys(cases))


# ---- CPU


def cpu_rows(
    case: Case, passes: str, dtype_name: str, args: argparse.Namespace, peak: float
) -> Iterator[dict]:
    inputs = Inputs.make(case, DTYPES[dtype_name], "cpu")
    device = torch.device("cpu")
    first_key = case.first_key(device)
    mask = visible_mask(case, device) if case.steps <= 8192 else None
    contestants = {"ours": runner(functools.partial(ours, case, first_key), inputs, passes)}
    if case.window == 0 or mask is not None:
        contestants["sdpa"] = runner(functools.partial(sdpa, mask, None), inputs, passes)
    if case.documents > 1:
        contestants["causal"] = runner(functools.partial(ours, case, None), inputs, passes)
    timings = harness.interleave(
        contestants, rounds=5 if args.quick else 60, time_limit_s=args.case_limit
    )
    if eager_fits(case, passes):  # 10 to 30 times slower, so it would eat the others' rounds
        run_eager = runner(functools.partial(eager, case, first_key), inputs, passes)
        timings |= harness.interleave({"eager": run_eager}, rounds=3, time_limit_s=args.case_limit)
    # For a busy machine: the kernel alone, one thread's CPU time against one thread's peak.
    rounds = 2 if case.steps > 8192 else 5 if args.quick else 9
    one_thread_ms = harness.one_thread_ms(contestants["ours"], rounds)
    row = row_of(case, passes, dtype_name, "cpu", "sdpa", timings, peak)
    if "causal" in contestants:
        causal_ms = harness.one_thread_ms(contestants["causal"], rounds)
        row["one_thread_over_causal"] = one_thread_ms / causal_ms
    yield row | {
        "one_thread_ms": one_thread_ms,
        "one_thread_share_of_peak": case.flops(passes)
        / (one_thread_ms * 1e-3)
        / (peak / torch.get_num_threads()),
        "peak_memory_mib": harness.peak_memory_mib(contestants["ours"], "cpu"),
    }


def row_of(
    case: Case,
    passes: str,
    dtype_name: str,
    device: str,
    backend: str,
    timings: dict[str, harness.Timing],
    peak: float,
) -> dict[str, Any]:
    ours_ms = timings["ours"].median_ms
    row = {
        "device": device,
        "dtype": dtype_name,
        "pass": passes,
        "batch": case.batch,
        "heads": case.heads,
        "steps": case.steps,
        "head_dim": case.head_dim,
        "window": case.window,
        "documents": case.documents,
        "ours_ms": ours_ms,
        "ours_quartiles_ms": [timings["ours"].low_ms, timings["ours"].high_ms],
        "ours_best_ms": timings["ours"].best_ms,
        "sdpa_ms": None,
        "eager_ms": None,
        "share_of_peak": case.flops(passes) / (ours_ms * 1e-3) / peak,
        "share_of_peak_best": case.flops(passes) / (timings["ours"].best_ms * 1e-3) / peak,
        "backend": backend,
    }
    other = next((name for name in (backend, "sdpa") if name in timings and name != "ours"), None)
    if other is not None:
        row["sdpa_ms"] = timings[other].median_ms
        row["sdpa_over_ours"] = harness.ratio(timings[other], timings["ours"])
    if "causal" in timings:
        row["causal_ms"] = timings["causal"].median_ms
        row["over_causal"] = harness.ratio(timings["ours"], timings["causal"])
    if "eager" in timings:
        row["eager_ms"] = timings["eager"].median_ms
        row["eager_over_ours"] = timings["eager"].median_ms / ours_ms
    return row


def adversarial_row(
    case: Case, dtype_name: str, rise: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Forward over scores that rise by `rise` nats every 64 keys, against scores near 0."""
    dtype = DTYPES[dtype_name]
    flat = Inputs.make(case, dtype, "cpu")
    rising = Inputs.make(case, dtype, "cpu")
    ramp = torch.arange(case.steps)[:, None] * (rise / 64 * case.head_dim**0.5)
    with torch.no_grad():
        for tensor in (flat.q, flat.k, rising.q, rising.k):
            tensor.mul_(0.01)
        rising.q[..., 0] = 1.0
        rising.k[..., 0] = ramp.to(dtype)
    runs = {
        name: runner(functools.partial(ours, case, None), inputs, "fwd")
        for name, inputs in (("rising", rising), ("flat", flat))
    }
    timings = harness.interleave(runs, rounds=5 if args.quick else 60, time_limit_s=args.case_limit)
    return (
        {"device": "cpu", "dtype": dtype_name, "pass": "fwd", "rise_nats": rise}
        | vars(case)
        | {
            "flat_ms": timings["flat"].median_ms,
            "rising_ms": timings["rising"].median_ms,
            "rising_over_flat": harness.ratio(timings["rising"], timings["flat"]),
        }
    )


# ---- CUDA


def cuda_contestants(
    case: Case, inputs: Inputs, passes: str, quick: bool
) -> dict[str, Callable[[], Any]]:
    """Every contestant that runs this case; stderr names the backends that refuse it.

    quick: SDPA alone, and one that takes a mask only where there is one.
    """
    device = torch.device("cuda")
    first_key = case.first_key(device)
    mask = visible_mask(case, device) if case.steps <= 8192 else None
    attends: dict[str, Callable[..., Tensor]] = {"ours": functools.partial(ours, case, first_key)}
    if case.window == 0 or mask is not None:
        attends |= {
            name: functools.partial(sdpa, mask, backend)
            for name, backend in SDPA_BACKENDS.items()
            if not (quick and name == ("efficient" if mask is None else "flash"))
        }
    if case.head_dim >= 16 and not quick:
        attends["flex"] = functools.partial(flex, flex_block_mask(case))
    if eager_fits(case, passes) and not quick:
        attends["eager"] = functools.partial(eager, case, first_key)
    contestants = {}
    for name, attend in attends.items():
        run = runner(attend, inputs, passes)
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            if name == "ours":
                raise
            say(f"  {name} does not run {case}: {str(error).splitlines()[0]}")
            continue
        contestants[name] = run
    return contestants


def cuda_rows(
    case: Case, passes: str, dtype_name: str, args: argparse.Namespace, peak: float
) -> Iterator[dict]:
    inputs = Inputs.make(case, DTYPES[dtype_name], "cuda")
    contestants = cuda_contestants(case, inputs, passes, args.quick)
    rounds = 5 if args.quick else 15
    walls = harness.interleave(
        contestants, rounds=rounds, time_limit_s=args.case_limit / 2, clock=harness.cuda_wall_ms
    )
    graphs: dict[str, Callable[[], float]] = {}
    for name, run in contestants.items():
        try:
            graphs[name] = harness.CapturedCalls(run).ms
        except Exception as error:
            torch.cuda.synchronize()
            say(f"  {name} cannot be captured: {str(error).splitlines()[0]}")
    devices = harness.interleave(
        graphs,
        rounds=rounds,
        time_limit_s=args.case_limit / 2,
        warmups=2,
        clock=lambda replay: replay(),
    )
    if "ours" not in devices:
        raise RuntimeError(f"ours could not be captured in a CUDA graph for {case}")
    state = harness.gpu_state()
    memory_mib = harness.peak_memory_mib(contestants["ours"], "cuda")
    for name in contestants:
        if name in ("ours", "eager"):
            continue
        chosen = {key: devices[key] for key in ("ours", name, "eager") if key in devices}
        yield row_of(case, passes, dtype_name, "cuda", name, chosen, peak) | {
            "ours_wall_ms": walls["ours"].median_ms,
            "sdpa_wall_ms": walls[name].median_ms,
            "peak_memory_mib": memory_mib,
            "driver": state.get("driver_version"),
            "clocks_sm_mhz": state.get("clocks.sm"),
            "clocks_mem_mhz": state.get("clocks.mem"),
        }


# ---- all cases


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, passes in zip(axes, ("fwd", "fwd_bwd"), strict=True):
        chosen = [row for row in rows if row["pass"] == passes and row["sdpa_ms"]]
        labels = [
            f"{r['dtype']} {r['backend']}\n{r['batch']},{r['heads']},{r['steps']},{r['head_dim']}"
            + (f" w{r['window']}" if r["window"] else "")
            for r in chosen
        ]
        axis.bar(range(len(chosen)), [r["sdpa_over_ours"] for r in chosen], color="#3b6ea5")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(chosen)), labels, rotation=90, fontsize=6)
        axis.set_title(passes.replace("_", " + "))
    axes[0].set_ylabel("torch time / ours")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="may be repeated")
    parser.add_argument("--plot", metavar="PNG", help="bars of torch's time over ours")
    parser.add_argument(
        "--sweep", action="store_true", help="CPU: also long sequences, with and without a window"
    )
    parser.add_argument(
        "--adversarial", action="store_true", help="CPU: scores that rise along the keys, only"
    )
    parser.add_argument(
        "--case-limit", type=float, default=20.0, metavar="S", help="seconds for one row's rounds"
    )
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench_attention: --device cuda needs a CUDA GPU; this machine has none\n")
    dtype_names = args.dtype or (["fp32", "bf16"] if args.device == "cpu" else ["bf16"])
    if args.device == "cuda":
        cases, rows_of = (CUDA_QUICK if args.quick else cuda_cases()), cuda_rows
    else:
        cases, rows_of = (
            (CPU_QUICK if args.quick else CPU_CASES + (CPU_SWEEP if args.sweep else [])),
            cpu_rows,
        )
    key = ("device", "dtype", "pass", "batch", "heads", "steps", "head_dim", "window", "documents")
    results = harness.Results(args.out, harness.machine_facts(args.device), key)
    if args.resume:
        results.resume()
    if args.adversarial:
        for dtype_name in dtype_names:
            for case in (Case(4, 4, 750, 64), Case(1, 8, 3000, 64)):
                results.add(adversarial_row(case, dtype_name, 19.0, args))
        if not args.json:
            harness.print_table(results.rows, list(results.rows[0]))
        return results.print_json()
    deadline = time.perf_counter() + args.time_limit
    run_all(args, cases, rows_of, dtype_names, results, deadline)
    if args.plot:
        plot(results.rows, args.plot)
    if not args.json:
        columns = ["dtype", "pass", "batch", "heads", "steps", "head_dim", "window", "documents"]
        columns.append("backend")
        measured = [
            "ours_ms",
            "sdpa_ms",
            "sdpa_over_ours",
            "eager_ms",
            "over_causal",
            "one_thread_over_causal",
            "share_of_peak",
            "one_thread_share_of_peak",
        ]
        harness.print_table(results.rows, columns + measured)
    results.print_json()


def run_all(
    args: argparse.Namespace,
    cases: list[Case],
    rows_of: Callable[..., Iterator[dict]],
    dtype_names: list[str],
    results: harness.Results,
    deadline: float,
) -> None:
    for dtype_name in dtype_names:
        peak = harness.measured_peak_flops(args.device, DTYPES[dtype_name])
        results.facts[f"peak_gflops_{dtype_name}"] = round(peak * 1e-9)
        for case in cases:
            for passes in ("fwd", "fwd_bwd"):
                values = {"device": args.device, "dtype": dtype_name, "pass": passes} | vars(case)
                if results.has(**values):
                    continue
                if time.perf_counter() > deadline:
                    say("time limit reached; go on with --resume")
                    return
                for row in rows_of(case, passes, dtype_name, args, peak):
                    results.add(row)
                    over = row.get("sdpa_over_ours")
                    one = row.get("one_thread_over_causal")
                    say(
                        f"{dtype_name} {passes} {case} {row['backend']}: {row['ours_ms']:.3f} ms, "
                        f"{row['share_of_peak']:.0%} of peak"
                        + (f", torch/ours {over:.2f}" if over else "")
                        + (f", {row['over_causal']:.2f} of causal" if "causal_ms" in row else "")
                        + (f", one thread {one:.2f}" if one else "")
                    )


if __name__ == "__main__":
    main()
