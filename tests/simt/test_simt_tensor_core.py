"""The emulator's mma adds as tensor cores do: known answers, a second model, recordings of GPUs.

The model is that of Khattak and Mikaitis, Accurate Models of NVIDIA Tensor Cores, arXiv
2512.07004. Their repository has what GPUs answered to random rows; with

    git clone https://github.com/north-numerical-computing/MATLAB-tensor-core build/tensor-cores

the slow test here compares the emulator with those rows bit for bit.
"""

import math
from fractions import Fraction

import pytest
import torch
from emulator import CORES, ROOT, Policy
from probes import MMA, MMA_ROWS_ROUND, bits, floats, golden_input, mma, mma_result, probe

RECORDINGS = ROOT / "build/tensor-cores/model_validation"
GENERATION = {
    "A100": "ampere",
    "A2": "ampere",
    "Ada": "ampere",
    "L40S": "ampere",
    "H100": "hopper",
    "H200": "hopper",
    "B200": "hopper",
}
FORMATS = {"bf16": "mma_m16n8k16_bf16", "fp16": "mma_m16n8k16_half", "tf32": "mma_m16n8k8_tf32"}

SUM, PLACE = 2.0**20, 2.0**-3
# The rows of benchmarks/gpu_golden_inputs.h, in the column of factor 1.
ANSWERS = {  # row: (ampere, hopper)
    "0 cut, not rounded": (SUM + PLACE, SUM + PLACE),
    "1 one extra bit": (SUM + PLACE, SUM + PLACE),
    "2 two extra bits": (SUM, SUM + PLACE),
    "3 no third extra bit": (SUM, SUM),
    "4 the first half of the products is added at once": (SUM + PLACE, SUM + PLACE),
    "5 both halves are": (SUM, SUM + PLACE),
    "6 the first half is the first": (0.0, PLACE),
    "7 negative terms are cut toward zero": (SUM, SUM - PLACE / 2),
    "8 no normalisation in between": (0.0, PLACE / 4),
    "9 exponents of products, two extra bits": (1.5 * SUM + PLACE, 1.5 * SUM + PLACE),
    "10 exponents of products, one extra bit": (1.5 * SUM + 3 * PLACE, 1.5 * SUM + 3 * PLACE),
    "13 a subnormal sum": (3 * 2.0**-149, 3 * 2.0**-149),
    "14 infinity": (math.inf, math.inf),
}
SMALLEST = {"bf16": 2.0**-133, "half": 2.0**-24, "tf32": 2.0**-136}


pytestmark = pytest.mark.parametrize("built_machine", ["fast"], indirect=True)


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("name", MMA)
def test_rows_that_tell_the_parameters(built_machine, name, cores):
    built_machine.reset(Policy(cores=cores))
    d = mma_result(probe(built_machine, name, golden_input(built_machine, name, MMA_ROWS_ROUND)))
    n_k = MMA[name][0]
    for row, answers in ANSWERS.items():
        m = int(row.split()[0])
        expected = answers[list(CORES).index(cores)]
        assert d[m, 0] == expected and d[m, 1] == -expected, f"{row}: {d[m, :2].tolist()}"
    # Significands of products in [1, 4): 2.25 is aligned as 2.25, not as 1.125 2^1.
    fine, coarse = d[9, 4].item() - 2.25 * SUM, d[10, 4].item() - 2.25 * SUM
    assert (fine, coarse) == ((2 if cores == "hopper" else 0) * PLACE, 4 * PLACE)
    factors = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.5, -1.5, 0.5, 255 / 128])
    assert torch.equal(d[11], (n_k * 255 / 256 + 0.5) * SUM * factors)  # carries
    assert d[12, 0] == SMALLEST[name.split("_")[-1]] * 64
    assert (bits(d[15]) == 0x7FFFFFFF).all()


def exact_mma(a, b, c, block, extra_bits, lowest_factor, lowest):
    """One element of D, from k factors in a and b (floats) and c, in rational numbers."""

    def exponent(x, at_least):
        return max(math.frexp(x)[1] - 1, at_least)

    for k in range(0, len(a), block):
        terms = [
            (Fraction(x) * Fraction(y), exponent(x, lowest_factor) + exponent(y, lowest_factor))
            for x, y in zip(a[k : k + block], b[k : k + block], strict=True)
            if x != 0 and y != 0
        ]
        if c != 0:
            terms.append((Fraction(c), exponent(c, -126)))
        if not terms:
            continue
        top = max(lowest, *(e for _, e in terms))
        unit = Fraction(2) ** (top - 23 - extra_bits)
        total = sum(math.trunc(value / unit) for value, _ in terms) * unit
        if total == 0:
            c = 0.0
            continue
        size = abs(total)
        place = math.floor(math.log2(size.numerator) - math.log2(size.denominator))
        place += 1 if size >= Fraction(2) ** (place + 1) else 0
        place -= 1 if size < Fraction(2) ** place else 0
        last = Fraction(2) ** max(place - 23, -149)
        size = math.trunc(size / last) * last
        c = math.inf if size >= 2**128 else float(size)
        c = -c if total < 0 else c
    return c


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("name", MMA)
@pytest.mark.parametrize("spread,small", [(0, False), (6, False), (60, False), (3, True)])
def test_mma_is_the_model_in_rational_numbers(built_machine, name, cores, spread, small):
    """spread: of the exponents of the factors; small: where factors or products are subnormal."""
    built_machine.reset(Policy(cores=cores))
    g = torch.Generator().manual_seed(spread)
    n_k, dtype = MMA[name]
    is_half = dtype == torch.float16
    center = (-16 if is_half else -67) if small else 0
    if is_half:
        spread = min(spread, 12)

    def numbers(*shape, n_factors=1):
        power = torch.randint(-spread, spread + 1, shape, generator=g) + center
        values = torch.randn(shape, generator=g).double() * 2.0 ** (power * n_factors)
        return values * (torch.rand(shape, generator=g) > 0.1)

    a, b = numbers(16, n_k).to(dtype), numbers(n_k, 8).to(dtype)
    c = numbers(16, 8, n_factors=2).float()
    got = mma(built_machine, name, a, b, c)
    if dtype == torch.float32:
        a, b = (floats(bits(x) & 0xFFFFE000) for x in (a, b))
    block = n_k // (2 if cores == "ampere" else 1)
    extra_bits, lowest = (1, -132) if cores == "ampere" else (2, -133)
    lowest_factor = -14 if is_half else -126
    for m in range(16):
        for n in range(8):
            row, column = a[m].tolist(), b[:, n].tolist()
            expected = exact_mma(
                row, column, c[m, n].item(), block, extra_bits, lowest_factor, lowest
            )
            assert got[m, n].item() == expected, (m, n)


def recorded(path, base):
    """(rows, words) bit patterns of a file of the recordings."""
    rows = [[int(word, base) for word in line.split()] for line in path.read_text().splitlines()]
    return torch.tensor([row for row in rows if row])


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("gpu", GENERATION)
def test_mma_answers_as_recorded_gpus_did(built_machine, gpu, fmt):
    folder = RECORDINGS / gpu / fmt
    if not folder.exists():
        pytest.skip("needs the recordings that this file's head tells how to get")
    name = FORMATS[fmt]
    n_k, dtype = MMA[name]
    a, b = (floats(recorded(folder / f"{x}_{gpu}_{fmt}.txt", 16)) for x in "ab")
    c, d = (floats(recorded(folder / f"{x}_{gpu}_fp32.txt", 2).flatten()) for x in "cd")
    for first in range(0, len(c), 8):  # eight rows an mma, on its diagonal
        built_machine.reset(Policy(cores=GENERATION[gpu]))
        rows = slice(first, first + 8)
        n = len(c[rows])
        left, right, plus = torch.zeros(16, n_k), torch.zeros(n_k, 8), torch.zeros(16, 8)
        left[:n, : a.shape[1]], right[: b.shape[1], :n] = a[rows], b[rows].T
        plus[:n, :n] = torch.diag(c[rows])
        got = mma(built_machine, name, left.to(dtype), right.to(dtype), plus).diagonal()[:n]
        assert torch.equal(bits(got.contiguous()), bits(d[rows])), f"row {first} on"
