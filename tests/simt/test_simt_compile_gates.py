"""What nvcc makes of the kernels: no spills, no stack, the instructions meant, within the limits.

Compiled for sm_80 by default, for the other architectures with -m slow.
"""

import re

import pytest
from emulator import CSRC
from launch_limits import demangled, launches_of_the_driver, misfit, most_threads
from machine_code import (
    TILE_LOOP,
    code_of,
    compile_unit,
    count,
    disassembler,
    kernels_of,
    loop_of,
    sass_of,
)

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
    for name, code in code_of(cubin).items():
        counts = count(code)
        label = f"sm_{arch} {name}: {counts}"
        assert not counts.keys() & {"LDL", "STL"}, label  # local memory
        if unit.startswith("flash") and any(kernel in name for kernel in MATRIX_KERNELS):
            assert counts.get("HMMA", 0) > 0, label  # tensor cores
            assert counts.get("LDGSTS", 0) > 0, label  # cp.async
            if "Bf16" in name or "Half" in name:
                assert counts.get("LDSM", 0) > 0, label  # ldmatrix
        assert not counts.keys() & {"ATOMG", "RED", "ATOM"}, (
            label
        )  # nothing adds in an order of its own


# Of the loop over tiles, an unmasked tile: instructions for each mma, and ldmatrix.x4 for each mma.
# FlashAttention 2 has 32 rows a warp too; what the figures are worth: docs/performance.md.
LOOPS = {
    ("14forward_kernel", 32): (9.0, 0.3),
    ("14forward_kernel", 64): (5.6, 0.3),  # 5.55 on sm_120, of which NOPs 0.55; exact scores 0.12
    ("14forward_kernel", 128): (5.5, 0.57),
    ("21key_value_grad_kernel", 32): (8.0, 0.3),
    ("21key_value_grad_kernel", 64): (8.0, 0.5),
    ("21key_value_grad_kernel", 128): (8.0, 0.75),
    ("17query_grad_kernel", 32): (8.0, 0.3),
    ("17query_grad_kernel", 64): (8.0, 0.42),
    ("17query_grad_kernel", 128): (8.0, 0.67),
}
MASKS = {"FSEL", "SEL", "VIMNMX", "PLOP3"}  # what masks are made with


@pytest.mark.parametrize("arch", ARCHS)
def test_flash_attention_spends_few_instructions_on_an_unmasked_tile(arch):
    kernels = {}
    for unit in ("flash_attention", "flash_attention_backward"):
        kernels |= code_of(compile_unit(unit, arch)[0])
    for (kernel, d), (instructions, ldmatrix) in LOOPS.items():
        for element in ("4Bf16", "4Half"):
            names = [name for name in kernels if f"{kernel}INS0_{element}ELi{d}ELb" in name]
            assert len(names) == 2, names  # with and without first_key
            for name in names:
                loop = loop_of(kernels[name], TILE_LOOP)
                label = f"sm_{arch} {name}: {loop}"
                assert loop["HMMA"] in (48, 64, 96, 128), label
                assert loop.total() <= instructions * loop["HMMA"], label
                assert loop["LDSM"] <= ldmatrix * loop["HMMA"], label
                of_rows = 4 if "forward" in kernel else 0  # the scale of each row of a lane
                # Of the loop and of rows, not of pairs: a lane has 32 or more in a tile.
                assert sum(loop[mask] for mask in MASKS) <= 4 + of_rows, label


@pytest.mark.parametrize("arch", ARCHS)
def test_two_blocks_of_attention_fit_a_multiprocessor(arch):
    """By registers, 64 Ki of them in steps of 8 a thread. Shared memory: SharedLimit."""
    for unit in ("flash_attention", "flash_attention_backward"):
        for name, facts in kernels_of(compile_unit(unit, arch)[1]).items():
            if any(kernel in name for kernel in MATRIX_KERNELS):
                registers = -(-facts["registers"] // 8) * 8
                assert 2 * 128 * registers <= 1 << 16, f"sm_{arch} {name}: {facts}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("unit", TRAINING_UNITS)
def test_memory_bound_kernels_leave_room_for_16_warps_and_move_16_bytes(unit, arch):
    """The norms' rows of 768 channels may take more: registers hold them."""
    cubin, report = compile_unit(unit, arch)
    for name, facts in kernels_of(report).items():
        if "ILi4ELi6E" not in name:
            assert facts["registers"] <= 128, f"sm_{arch} {name}: {facts}"
    sass = sass_of(cubin)
    for instruction in (r"LDG\.E\.128", r"STG\.E\.128"):
        assert re.search(instruction, sass), f"sm_{arch} {unit}: no {instruction}"


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
    facts = {}
    for unit in sorted(path.stem for path in (CSRC / "kernels" / "cuda").glob("*.cu")):
        cubin, report = compile_unit(unit, "80")
        threads = most_threads(cubin, *disassembler())
        for name, compiled in kernels_of(report).items():
            facts[demangled(name)] = compiled | {"threads": threads[name]}
    launches = launches_of_the_driver()
    assert facts.keys() - {launch.kernel for launch in launches} == set()
    for launch in launches:
        reason = misfit(launch, facts[launch.kernel])
        assert reason is None, f"{launch}: {reason}"
        wider = launch._replace(block=(2 * launch.block[0], 1, 1))
        assert misfit(wider, facts[launch.kernel]) is not None
