"""What nvcc makes of the kernels: no spills, no stack, the instructions meant, within the limits.

Compiled for sm_80 by default, for the other architectures with -m slow. The disassembly needs
cuobjdump and nvdisasm: the CUDA toolkit, or
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_tools import find_tool
from emulator import CACHE, CSRC
from launch_limits import demangled, launches_of_the_driver, misfit, most_threads

TRAINING_UNITS = ["add_rms_norm", "token_concat_norm", "rotary_qkv", "feed_forward",
                  "linear_cross_entropy"]  # fmt: skip
UNITS = [
    *("token_concat", "mel_embed", "flash_attention", "flash_attention_backward"),
    *TRAINING_UNITS,
]
ARCHS = [
    "80",
    *(pytest.param(a, marks=pytest.mark.slow) for a in ("86", "89", "90a", "100", "120")),
]
MATRIX_KERNELS = ("forward_kernel", "key_value_grad_kernel", "query_grad_kernel")


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


def instructions_of(cubin):
    """{mangled name: {mnemonic: count}} from the disassembly."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [cuobjdump, "-sass", str(cubin)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    found, name = {}, None
    for line in done.stdout.splitlines():
        if m := re.search(r"Function : (\w+)", line):
            name = m[1]
            found[name] = {}
        elif m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", line):
            found[name][m[1]] = found[name].get(m[1], 0) + 1
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("unit", UNITS)
def test_no_kernel_spills_or_uses_a_stack(unit, arch):
    _, report = compile_unit(unit, arch)
    kernels = kernels_of(report)
    assert kernels and "warning" not in report
    for name, facts in kernels.items():
        assert facts["stack"] == 0 and facts["spills"] == 0, f"sm_{arch} {name}: {facts}"
        assert facts["registers"] <= 255 and facts["shared"] <= 48 * 1024, (
            f"sm_{arch} {name}: {facts}"
        )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("unit", UNITS)
def test_the_machine_code_is_what_was_meant(unit, arch):
    cubin, _ = compile_unit(unit, arch)
    for name, count in instructions_of(cubin).items():
        label = f"sm_{arch} {name}: {count}"
        assert not count.keys() & {"LDL", "STL"}, label  # local memory
        if unit.startswith("flash") and any(kernel in name for kernel in MATRIX_KERNELS):
            assert count.get("HMMA", 0) > 0, label  # tensor cores
            assert count.get("LDGSTS", 0) > 0, label  # cp.async
            if "Bf16" in name or "Half" in name:
                assert count.get("LDSM", 0) > 0, label  # ldmatrix
        assert not count.keys() & {"ATOMG", "RED", "ATOM"}, (
            label
        )  # nothing adds in an order of its own


def test_flash_attention_16_bit_kernels_have_the_expected_registers():
    """More would cost a resident block: measured with nvcc 13.0 on sm_80."""
    _, forward = compile_unit("flash_attention", "80")
    _, backward = compile_unit("flash_attention_backward", "80")
    limits = {
        "14forward_kernelINS0_4Bf16ELi64E": 168,
        "14forward_kernelINS0_4Bf16ELi32E": 128,
        "21packed_forward_kernelINS0_4Bf16ELi64E": 168,
        "21packed_forward_kernelINS0_4Bf16ELi32E": 128,
        "21key_value_grad_kernelINS0_4Bf16ELi64ELb0E": 168,
        "17query_grad_kernelINS0_4Bf16ELi64E": 168,
    }
    kernels = {**kernels_of(forward), **kernels_of(backward)}
    for part, limit in limits.items():
        matching = [facts["registers"] for name, facts in kernels.items() if part in name]
        assert matching and max(matching) <= limit, (part, matching)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("unit", TRAINING_UNITS)
def test_memory_bound_kernels_leave_room_for_16_warps_and_move_16_bytes(unit, arch):
    """The norms' rows of 768 channels may take more: registers hold them."""
    cubin, report = compile_unit(unit, arch)
    for name, facts in kernels_of(report).items():
        if "ILi4ELi6E" not in name:
            assert facts["registers"] <= 128, f"sm_{arch} {name}: {facts}"
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, env=env)
    for instruction in (r"LDG\.E\.128", r"STG\.E\.128"):
        assert re.search(instruction, sass.stdout), f"sm_{arch} {unit}: no {instruction}"


def test_kernels_keep_the_seam():
    """PTX and toolkit headers in device/ only, one launch function, nothing a capture forbids."""
    forbidden = r"\basm\b|#include <cuda|cudaLaunch|__CUDACC__|simt::"
    for path in sorted((CSRC / "kernels/cuda").rglob("*.cu*")):
        code = re.sub(r"//.*", "", path.read_text())
        assert "<<<" not in code, path
        for call in ("cudaMalloc", "cudaFree", "Synchronize", "cudaMemcpy", "cudaMemset"):
            assert call not in code, (path, call)
        if path.parent.name != "device":
            assert not re.search(forbidden, code), path


def test_every_kernel_is_launched_and_fits():
    """`gpu_driver --small` launches all that nvcc compiles, within what a GPU allows the kernel."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    facts = {}
    for unit in sorted(path.stem for path in (CSRC / "kernels" / "cuda").glob("*.cu")):
        cubin, report = compile_unit(unit, "80")
        if cuobjdump is None or nvdisasm is None:
            pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
        threads = most_threads(cubin, cuobjdump, {**os.environ, "PATH": path})
        for name, compiled in kernels_of(report).items():
            facts[demangled(name)] = compiled | {"threads": threads[name]}
    launches = launches_of_the_driver()
    assert facts.keys() - {launch.kernel for launch in launches} == set()
    for launch in launches:
        reason = misfit(launch, facts[launch.kernel])
        assert reason is None, f"{launch}: {reason}"
        wider = launch._replace(block=(2 * launch.block[0], 1, 1))
        assert misfit(wider, facts[launch.kernel]) is not None
