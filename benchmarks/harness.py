"""What every benchmark shares: interleaved contestants, medians, the machine, its peak, JSON.

Contestants take turns within a round, so that a slow minute of a shared machine hurts all of them
alike; a figure is the median over rounds, and ratios are medians of the rounds' own ratios.
Progress goes to stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wgpt import _C, ops
from wgpt.config import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Wall times of one contestant, milliseconds."""

    median_ms: float
    low_ms: float  # quartiles over the rounds
    high_ms: float
    best_ms: float
    samples_ms: tuple[float, ...]

    @classmethod
    def of(cls, samples_ms: list[float]) -> "Timing":
        if len(samples_ms) < 2:
            quartiles = [samples_ms[0]] * 3
        else:
            quartiles = statistics.quantiles(samples_ms, n=4, method="inclusive")
        return cls(quartiles[1], quartiles[0], quartiles[2], min(samples_ms), tuple(samples_ms))


def write_into(doc: Path, script: str, table: str) -> None:
    """Replaces what stands between the markers of a benchmark's script in a document.

    Raises ConfigError naming the markers unless the document holds each of them once.
    """
    begin, end = (f"<!-- {edge}: benchmarks/{script} -->" for edge in ("begin", "end"))
    text = doc.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ConfigError(f"--doc: {doc} must hold one {begin} and one {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    doc.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def interleave(
    contestants: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    time_limit_s: float = 20.0,
    warmups: int = 1,
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Timing]:
    """Every contestant once a round, in rotating order, until `rounds` or the time limit (>= 3).

    clock: runs a contestant and returns its milliseconds; None is the wall clock.
    """
    clock = clock or wall_ms
    for _ in range(warmups):
        for run in contestants.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    deadline = time.perf_counter() + time_limit_s
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clock(contestants[name]))
        if i >= 2 and time.perf_counter() > deadline:
            break
    return {name: Timing.of(times) for name, times in samples.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """Median of slow / fast over the rounds they shared."""
    pairs = zip(slow.samples_ms, fast.samples_ms, strict=False)
    return statistics.median(s / f for s, f in pairs)


def share_of_copy(n_bytes: int, ours: Timing, copied: Tensor, copy: Timing) -> float:
    """Bytes per second that `ours` moves over those of a copy of `copied`.

    n_bytes: what the pass must move, every input read once and every output written once.
    """
    copy_bytes = 2 * copied.numel() * copied.element_size()
    return (n_bytes / ours.median_ms) / (copy_bytes / copy.median_ms)


def wall_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def cuda_wall_ms(run: Callable[[], Any]) -> float:
    """Wall time of an eager call, launch overhead included, device idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


class CapturedCalls:
    """`calls` calls of `run` in one CUDA graph: their device time without launch overhead."""

    def __init__(self, run: Callable[[], Any], calls: int = 10) -> None:
        self.calls = calls
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up where capture will happen, as torch asks for
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(calls):
                run()

    def ms(self) -> float:
        """Milliseconds of one call, by events around one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.calls


def peak_memory_mib(run: Callable[[], Any], device: str) -> float | None:
    """How far `run` raises memory above what is in use before it; None where nobody counts.

    CUDA: the caching allocator. CPU on Linux: the resident high-water mark, which sees whole pages
    of the process, so small tensors that reuse freed pages read as 0.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before_kib = _status_kib("VmRSS")
        run()
        return max(0, _status_kib("VmHWM") - before_kib) / 2**10
    except OSError:
        return None


class MemoryMeter:
    """How far this process rises above what it holds now; for a process with one thing to do.

    CUDA: the caching allocator. CPU on Linux: the resident set.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = self._held()

    def _held(self) -> int:
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        return _status_kib("VmRSS") * 1024

    def forget_peak(self) -> None:
        """Counts the peak from now on (still above what was held at the start)."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def peak_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return _status_kib("VmHWM") * 1024 - self.before


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def measured_peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s that the machine's arithmetic gives in `dtype`: what a share of peak divides by.

    CPU: one thread multiplying and adding in registers, as the kernels' own micro-kernel does, best
    of many runs, times the threads. CUDA: torch's large square matrix product, best of 12, which
    stays under the peak (a share can then pass 1).
    """
    if device == "cpu":
        name = next(name for name, value in DTYPES.items() if value == dtype)
        return _C.cpu_peak_flops(name) * torch.get_num_threads()
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    if device == "cuda":
        best_ms = min(cuda_wall_ms(lambda: torch.mm(a, b, out=out)) for _ in range(12))
        return 2 * size**3 / best_ms * 1e3
    best_ms = one_thread_ms(lambda: torch.mm(a, b, out=out), rounds=25)
    return 2 * size**3 / best_ms * 1e3 * torch.get_num_threads()


def one_thread_ms(run: Callable[[], Any], rounds: int) -> float:
    """Best CPU time of `run` on one thread: its own speed, whatever else the machine does."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        best_ns = None
        for _ in range(rounds):
            start = time.thread_time_ns()
            run()
            taken = time.thread_time_ns() - start
            best_ns = taken if best_ns is None else min(best_ns, taken)
    finally:
        torch.set_num_threads(n_threads)
    return (best_ns or 0) * 1e-6


def machine_facts(device: str) -> dict[str, Any]:
    """What the figures depend on: machine, versions, threads, what ran."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_target": ops.info()["cpu_target"],
        "peak": "register multiply-adds of one thread, times the threads"
        if device == "cpu"
        else "torch.mm of large squares",
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} | gpu_state()
    return facts


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_state() -> dict[str, Any]:
    """Driver, clocks, power and temperature by nvidia-smi, now; empty without nvidia-smi."""
    fields = [
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "temperature.gpu",
    ]
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
        "-i",
        "0",
    ]
    try:
        line = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


class Results:
    """Rows of a benchmark, kept in a JSON file that a later run can resume from."""

    def __init__(self, path: Path | None, facts: dict[str, Any], key: tuple[str, ...]) -> None:
        self.path, self.facts, self.key = path, facts, key
        self.rows: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Take over the rows of an earlier run of the same file."""
        if self.path is not None and self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def has(self, **values: Any) -> bool:
        wanted = [values[name] for name in self.key]
        return any([row[name] for name in self.key] == wanted for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
            partial.replace(self.path)

    def as_dict(self) -> dict[str, Any]:
        return {"machine": self.facts, "rows": self.rows}

    def print_json(self) -> None:
        print(json.dumps(self.as_dict()))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="only the JSON line on stdout")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, row by row")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --out already has"
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds")
    parser.add_argument(
        "--time-limit", type=float, default=1e9, metavar="S", help="stop after S seconds"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")


def say(*words: Any) -> None:
    """Progress, on stderr."""
    print(*words, file=sys.stderr, flush=True)


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
