"""Each device wrapper's PTX says what its emulated half does.

The g++ half of a wrapper is what all other tests run; the nvcc half is what a GPU runs. Here nvcc
compiles the wrappers' probes (benchmarks/gpu_golden.cuh) to PTX, and tests/simt/ptx.py executes it.
"""

import re
import shutil
import subprocess

import pytest
import torch
from cuda_tools import find_tool
from emulator import CSRC, ROOT
from probes import MMA, golden_input, ids, mma_words, probe, to_int32
from ptx import INPUT, OUTPUT, Warp
from test_simt_wrappers import wrong_lanes

PROBES = ["ldmatrix_x4", "ldmatrix_x4_trans", *MMA, "to_bf16", "to_half", "from_half",
          "pack2_bf16", "pack2_half", "round_to_tf32", "exp2_approx", "copy_async16"]  # fmt: skip


def compile_probes(folder, device=CSRC / "kernels" / "cuda" / "device"):
    """The probes' PTX, over the wrappers in the folder `device`."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found")
    includes = folder / "include" / "kernels" / "cuda"
    includes.mkdir(parents=True)
    shutil.copytree(device, includes / "device")
    out = folder / "probes.ptx"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_80", "-ptx", f"-I{folder / 'include'}"]
    command += [f"-I{CSRC}", f"-I{ROOT / 'benchmarks'}", "-o", str(out)]
    command += [str(ROOT / "benchmarks" / "gpu_golden.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out.read_text()


@pytest.fixture(scope="module")
def probes_ptx(tmp_path_factory):
    return compile_probes(tmp_path_factory.mktemp("ptx"))


def words_for(machine, name):
    """Two rounds of (32, in_words) bit patterns; of an mma, integers whose sums are exact."""
    if name not in MMA:
        return [golden_input(machine, name, index) for index in range(2)]
    k, dtype = MMA[name]
    generator, rounds = torch.Generator().manual_seed(0), []
    for _ in range(2):
        a, b, c = (
            torch.randint(-9, 10, shape, generator=generator).float()
            for shape in ((16, k), (k, 8), (16, 8))
        )
        rounds.append(mma_words(name, a.to(dtype), b.to(dtype), c))
    return rounds


def answer(ptx, machine, name, words):
    """(32, out_words) of what the PTX computes."""
    number = ids(machine)[name]
    n_in, n_out = machine.lib.probe_in_words(number), machine.lib.probe_out_words(number)
    inputs = to_int32(words.reshape(32, n_in)).contiguous().numpy().tobytes()
    parameters = [number, n_in, n_out, INPUT, OUTPUT]
    written = Warp(ptx, parameters, inputs, 32 * n_out * 4).run()
    out = torch.frombuffer(bytearray(written), dtype=torch.int32)
    return out.view(32, n_out).long() & 0xFFFFFFFF


def differences(ptx, machine, name):
    """Lanes in which PTX and emulator disagree, over the rounds."""
    wrong = []
    for words in words_for(machine, name):
        got, expected = answer(ptx, machine, name, words), probe(machine, name, words)
        wrong += wrong_lanes(name, got.flatten(), expected.flatten())
    return wrong


only_once = pytest.mark.parametrize("built_machine", ["fast"], indirect=True)


@only_once
def test_every_probe_is_asked(built_machine):
    assert set(ids(built_machine)) == set(PROBES)


def test_every_wrapper_has_a_probe():
    probed = (ROOT / "benchmarks" / "gpu_golden.cuh").read_text()
    names = set()
    for path in (CSRC / "kernels" / "cuda" / "device").glob("*.cuh"):
        text = path.read_text()
        for instruction in re.finditer(r'\basm(?: volatile)?\(\s*"[^"]', text):
            before = text[: instruction.start()]
            names.add(re.findall(r"WGPT_DEVICE [\w ]+?(\w+)(?:<\w+>)?\(", before)[-1])
    assert len(names) >= 12
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", probed)] == []


@only_once
@pytest.mark.parametrize("name", PROBES)
def test_ptx_computes_what_the_emulator_computes(built_machine, probes_ptx, name):
    built_machine.reset()
    assert differences(probes_ptx, built_machine, name) == []


# A wrapper's file, a place in it, what it becomes, and the probe that must notice.
BUGS = {
    "pair_swapped": (
        "types.cuh",
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));',
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(first), "f"(second));',
        "pack2_bf16",
    ),
    "fragments_of_a_swapped": (
        "mma.cuh",
        ': "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#else\n'
        "  simt::mma_m16n8k16(d, a, b, d, simt::MmaType::kHalf);",
        ': "r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#else\n'
        "  simt::mma_m16n8k16(d, a, b, d, simt::MmaType::kHalf);",
        "mma_m16n8k16_half",
    ),
    "not_transposed": ("mma.cuh", "m8n8.x4.trans.shared", "m8n8.x4.shared", "ldmatrix_x4_trans"),
    "no_zeros": ("mma.cuh", "valid ? 16 : 0;\n  asm", "16;\n  asm", "copy_async16"),
    "half_of_another_type": ("types.cuh", "cvt.rn.f16.f32 %0", "cvt.rn.bf16.f32 %0", "to_half"),
}


@only_once
@pytest.mark.parametrize("bug", BUGS)
def test_bug_in_the_ptx_of_a_wrapper_is_found(built_machine, bug, tmp_path):
    file, old, new, name = BUGS[bug]
    device = tmp_path / "device"
    shutil.copytree(CSRC / "kernels" / "cuda" / "device", device)
    text = (device / file).read_text()
    assert text.count(old) == 1, f"{bug}: {old!r} occurs {text.count(old)} times"
    (device / file).write_text(text.replace(old, new))
    built_machine.reset()
    assert differences(compile_probes(tmp_path, device), built_machine, name)
