"""Does `wgpt train` on a GPU have the losses of a CPU, and does its step launch what is counted?

The same run of hybrid-xs on each, over the data in tests/fixtures (8 s of sound: it learns them by
heart). The first steps must agree closely, the last in the mean: rounding grows with the steps.
Then one replay of the `hybrid` step under torch's profiler, beside the count of launches.py.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from wgpt.runs.metrics import read_metrics
from wgpt.training import train

DATA = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "v0.1" / "data"
# Of the NLL in nats: each of the first steps, and the mean of the last quarter.
LIMITS = {"fp32": (0.005, 0.05), "bf16": (0.05, 0.1)}
N_FIRST = 10


def losses(
    out: Path, device: str, dtype: str, n_steps: int, batch: int, reuse: bool
) -> list[float]:
    """The training NLL of every step of a run in `out`. reuse: of a finished one that is there."""
    if reuse and len(made := read_losses(out)) == n_steps:
        return made
    shutil.rmtree(out, ignore_errors=True)
    train(
        DATA, out, "hybrid-xs", device=device, dtype=dtype, max_steps=n_steps, context_s=2.0,
        batch_size=batch, warmup_steps=20, eval_every=0, save_every=0, sample_s=0,
        graph="on" if device.startswith("cuda") else "auto",
    )  # fmt: skip
    return read_losses(out)


def read_losses(run: Path) -> list[float]:
    """As far as the run has come."""
    if not (run / "metrics.csv").exists():
        return []
    rows = read_metrics(run / "metrics.csv")
    return [float(row["nll_nats"]) for row in rows if row["split"] == "train"]


def compare(ours: list[float], plain: list[float], dtype: str) -> dict[str, Any]:
    """How far the losses are apart, and whether that is within LIMITS."""
    n_last = max(len(plain) // 4, 1)
    first = max(abs(a - b) for a, b in zip(ours[:N_FIRST], plain[:N_FIRST], strict=True))
    last = abs(sum(ours[-n_last:]) - sum(plain[-n_last:])) / n_last
    is_right = first <= LIMITS[dtype][0] and last <= LIMITS[dtype][1]
    is_right = is_right and all(map(math.isfinite, ours))
    return {"dtype": dtype, "first_nats": first, "last_nats": last, "right": is_right,
            "ours": ours, "cpu": plain}  # fmt: skip


def kernels_seen(dtype: str) -> dict[str, int]:
    """Kernels, and copies and fills, of one replay of the `hybrid` step, and of its inputs."""
    import launches  # here, for a dry run has no need of it and would take twice as long
    from bench_train import ProductStep

    step = ProductStep("hybrid", dtype, "cuda", 8, 750)
    step.first()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    counted = sum(call.launches for call in launches.record("hybrid", dtype, 8, 750))
    return {"counted": counted, "kernels": len(names) - len(copies), "copies": len(copies)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=tuple(LIMITS))
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        ours, plain = (losses(args.out / f"{device.partition(':')[0]}-{dtype}-{who}", device, dtype,
                              args.max_steps, args.batch, reuse=who == "plain")
                       for who, device in (("ours", args.device), ("plain", "cpu")))  # fmt: skip
        rows.append(compare(ours, plain, dtype))
        if args.device.startswith("cuda"):
            rows[-1] |= kernels_seen(dtype)
        print({name: value for name, value in rows[-1].items() if name not in ("ours", "cpu")})
    (args.out / "losses.json").write_text(json.dumps(rows) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
