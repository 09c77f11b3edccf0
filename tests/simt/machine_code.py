"""Machine code of the kernels, as nvcc and cuobjdump give it: registers, instructions, inner loops.

    PYTHONPATH=tests python tests/simt/machine_code.py 90a

prints what an unmasked tile costs in flash_attention's bfloat16 kernels, and the rate at which an
H200 would run it if one unit were the only limit (docs/performance.md). The disassembly needs
cuobjdump and nvdisasm: the CUDA toolkit, or
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import hashlib
import heapq
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cuda_tools import find_tool
from emulator import CACHE, CSRC

# What flash_attention's loops over tiles pass. F2FP packs P or dS for the second GEMM, which the
# first pass of dQ, for rows with a large lse, has not.
TILE_LOOP = ("HMMA", "LDGSTS", "LDSM", "F2FP")

Code = list[tuple[int, str]]  # address and text of each instruction


def compile_unit(unit, arch):
    """(cubin, compiler's report), from the cache where the sources have not changed."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found")
    digest = hashlib.sha256(f"{nvcc} {arch}".encode())
    for path in [*sorted((CSRC / "kernels").rglob("*.*h")), CSRC / f"kernels/cuda/{unit}.cu"]:
        digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    cubin = CACHE / f"{unit}-{arch}-{digest.hexdigest()[:16]}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        target = f"arch=compute_{arch},code=sm_{arch}"
        done = subprocess.run(
            [
                nvcc,
                "-std=c++17",
                "-O3",
                f"-I{CSRC}",
                f"-gencode={target}",
                "-Xptxas",
                "-v",
                "-Xcompiler",
                "-Wall,-Wextra",
                "-cubin",
                "-o",
                str(cubin),
                str(CSRC / f"kernels/cuda/{unit}.cu"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        report.write_text(done.stdout + done.stderr)
    return cubin, report.read_text()


def kernels_of(report):
    """{mangled name: {registers, stack, spills, shared}} from ptxas -v."""
    found, name = {}, None
    for line in report.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
        elif m := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            found.setdefault(name, {}).update(stack=int(m[1]), spills=int(m[2]) + int(m[3]))
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.setdefault(name, {}).update(
                registers=int(m[1]), shared=int(shared[1]) if shared else 0
            )
    return found


def disassembler():
    """(cuobjdump, the environment in which it finds nvdisasm)."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
    return cuobjdump, {**os.environ, "PATH": path}


def sass_of(cubin):
    """The disassembly as cuobjdump prints it."""
    cuobjdump, env = disassembler()
    done = subprocess.run(
        [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_of(cubin):
    """{mangled name: Code} from the disassembly."""
    found, name = {}, None
    for line in sass_of(cubin).splitlines():
        if m := re.search(r"Function : (\w+)", line):
            name = m[1]
            found[name] = []
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            found[name].append((int(m[1], 16), m[2]))
    return found


def mnemonic(text):
    """`@!P0 LDG.E.128 R4, ...` is LDG."""
    return re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0]


def count(code):
    """{mnemonic: count}."""
    return Counter(mnemonic(text) for _, text in code)


def loop_of(code, through):
    """The fewest instructions from a block barrier round to itself that pass every mnemonic of
    `through`: in a loop over tiles, an iteration that loads, computes and masks nothing.

    Returns:
        {mnemonic: count}, empty where there is no such loop.
    """
    blocks, follows = _flow(code)
    holds = {b: frozenset(through) & count(code[b:end]).keys() for b, end in blocks.items()}
    best = None
    for head, end in blocks.items():
        if "BAR" not in count(code[head:end]):
            continue
        queue, seen = [(end - head, head, sorted(holds[head]), [head])], set()
        while queue:
            length, block, passed, path = heapq.heappop(queue)
            if (block, *passed) in seen:
                continue
            seen.add((block, *passed))
            for after in follows[block]:
                if after != head:
                    known = sorted({*passed, *holds[after]})
                    size = blocks[after] - after
                    heapq.heappush(queue, (length + size, after, known, [*path, after]))
                elif set(passed) == set(through) and (best is None or length < best[0]):
                    best = length, path
    return sum((count(code[b : blocks[b]]) for b in best[1]), Counter()) if best else Counter()


def _flow(code):
    """Basic blocks as {first index: end}, and {first index: first indices that may follow}."""
    at = {address: i for i, (address, _) in enumerate(code)}
    jumps, starts = {}, {0}
    for i, (_, text) in enumerate(code):
        if mnemonic(text) in ("BRA", "EXIT", "RET"):
            starts.add(i + 1)
            if mnemonic(text) == "BRA":
                jumps[i] = at[int(re.search(r"0x([0-9a-f]+)$", text)[1], 16)]
                starts.add(jumps[i])
    order = sorted(i for i in starts if i < len(code))
    blocks = dict(zip(order, [*order[1:], len(code)], strict=True))
    follows = {}
    for first, end in blocks.items():
        text = code[end - 1][1]
        # A condition is a predicate before the branch, or one among its operands.
        always = re.match(r"(EXIT|RET|BRA)\b(?!\S* !?U?P\d)", text) and ".DIV" not in text
        follows[first] = [jumps[end - 1]] if end - 1 in jumps else []
        if not always and end in blocks:
            follows[first].append(end)
    return blocks, follows


# An H200: clock under load, multiprocessors; per clock and multiprocessor: warp instructions,
# bytes of shared memory, exponentials, and FLOPs of mma.sync, 62 % of wgmma's (arXiv 2402.13499).
CLOCK_HZ, MULTIPROCESSORS = 1.755e9, 132
ISSUED, SHARED_BYTES, EXPONENTIALS, MMA_FLOPS = 4, 128, 16, 0.62 * 4096


def ceilings(loop):
    """TFLOP/s of an H200 that is limited by one unit alone, for the loop of a warp."""
    flops = loop["HMMA"] * 2 * 16 * 8 * 16
    clocks = {
        "issue": loop.total() / ISSUED,
        "shared": (loop["LDSM"] + loop["LDGSTS"]) * 32 * 16 / SHARED_BYTES,
        "exp": loop["MUFU"] * 32 / EXPONENTIALS,
        "mma": flops / MMA_FLOPS,
    }
    return {k: flops / c * CLOCK_HZ * MULTIPROCESSORS / 1e12 for k, c in clocks.items()}


def main(arch):
    columns = ["kernel", "registers", "instructions / HMMA", "ldmatrix / HMMA"]
    print(f"| {' | '.join([*columns, 'issue', 'shared', 'exp', 'mma'])} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for unit in ("flash_attention", "flash_attention_backward"):
        cubin, report = compile_unit(unit, arch)
        for name, code in code_of(cubin).items():
            found = re.search(r"\d([a-z_]+)_kernelINS0_4Bf16ELi(\d+)ELb(\d)E", name)
            loop = loop_of(code, TILE_LOOP)
            if not found or not loop:
                continue
            packed = ", first_key" if found[3] == "1" else ""
            cells = [f"{found[1]} D {found[2]}{packed}", str(kernels_of(report)[name]["registers"])]
            cells += [f"{n / loop['HMMA']:.2f}" for n in (loop.total(), loop["LDSM"])]
            cells += [f"{rate:.0f}" for rate in ceilings(loop).values()]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1])
