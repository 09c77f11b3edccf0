"""The device wrappers on the emulator, against the PTX ISA's layouts written out here, and against
golden files that a GPU has recorded (benchmarks/gpu_golden.cu), once there are any."""

import json

import pytest
import torch
from emulator import HERE, Policy
from probes import MMA, MMA_ROWS_ROUND, bits, floats, golden_input, mma, probe

GOLDEN = HERE / "golden.jsonl"
# Largest difference from the GPU in a lane, of the value; where none is named: bit for bit.
LANE_TOLERANCE = {"exp2_approx": 1e-6}
# NaN payloads are the hardware's own: any pattern above the infinity of the output's type is NaN.
INFINITY = {"to_bf16": 0x7F80, "to_half": 0x7C00}
FLOAT32 = {"from_half", "round_to_tf32", "exp2_approx"}


def wrong_lanes(name, got, expected):
    """Indices of the words in which `got` is not what the GPU answered; both (N,) bit patterns."""
    is_float32 = name in FLOAT32 or name.startswith("mma_")
    infinity = 0x7F800000 if is_float32 else INFINITY.get(name)
    both_nan = torch.zeros_like(got, dtype=torch.bool)
    if infinity is not None:
        magnitude = 0x7FFFFFFF if is_float32 else 0x7FFF
        both_nan = ((got & magnitude) > infinity) & ((expected & magnitude) > infinity)
    right = both_nan | (got == expected)
    if name in LANE_TOLERANCE:
        ours, theirs = floats(got).double(), floats(expected).double()
        limit = LANE_TOLERANCE[name] * theirs.abs()
        right |= ours.isfinite() & theirs.isfinite() & ((ours - theirs).abs() <= limit)
    return (~right).nonzero().flatten().tolist()


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(machine, trans):
    tiles = torch.arange(4 * 64).view(4, 8, 8)  # distinct 16-bit elements
    rows = tiles.view(32, 4, 2)
    got = probe(machine, "ldmatrix_x4" + "_trans" * trans, rows[..., 0] | rows[..., 1] << 16)
    for lane in range(32):
        for i in range(4):
            tile = tiles[i].T if trans else tiles[i]
            pair = tile[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert got[lane, i] == pair[0] | pair[1] << 16


@pytest.mark.parametrize("name", MMA)
def test_mma_fragments(machine, name):
    g = torch.Generator().manual_seed(0)
    (k, dtype), c = MMA[name], torch.randn(16, 8, generator=g)
    a, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((16, k), (k, 8)))
    got = mma(machine, name, a, b, c)
    if name == "mma_m16n8k8_tf32":  # the unit reads the upper 19 bits
        a, b = (floats(bits(x) & 0xFFFFE000) for x in (a, b))
    assert ((a.double() @ b.double() + c.double()) - got.double()).abs().max() <= 1e-5


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    65504.0,
    65519.0,
    65520.0,
    1e-8,
    5.96e-8,
    2.98e-8,
    6.1e-5,
    3e-5,
    1e38,
    3.4e38,
    float("inf"),
    float("-inf"),
    1.00390625,
    1.01171875,
    0.3333,
    2049.0,
    2051.0,
    1e-40,
]


def test_conversions_round_like_torch(machine):
    x = torch.tensor(SPECIAL + [0.1 * i for i in range(32 - len(SPECIAL))])
    for name, dtype in (("to_bf16", torch.bfloat16), ("to_half", torch.float16)):
        assert torch.equal(probe(machine, name, bits(x))[:, 0], bits(x.to(dtype)))
    pairs = torch.stack([bits(x), bits(x.flip(0))], 1)
    for name, dtype in (("pack2_bf16", torch.bfloat16), ("pack2_half", torch.float16)):
        assert torch.equal(
            probe(machine, name, pairs)[:, 0], bits(x.to(dtype)) | bits(x.flip(0).to(dtype)) << 16
        )
    half = torch.arange(0, 0x7C00, 0x7C00 // 32)[:32]
    expected = half.to(torch.int16).view(torch.float16).float()
    assert torch.equal(floats(probe(machine, "from_half", half))[:, 0], expected)


def test_tf32_keeps_ten_bits(machine):
    x = torch.randn(32, generator=torch.Generator().manual_seed(1))
    got = floats(probe(machine, "round_to_tf32", bits(x)))[:, 0]
    assert (bits(got) & 0x1FFF == 0).all()
    assert ((got - x).abs() <= x.abs() * 2.0**-11).all()


def test_invalid_copies_are_zeros(machine):
    words = torch.arange(1, 32 * 8 + 1).view(32, 8)
    words[:, 4] = torch.arange(32) % 2
    got = probe(machine, "copy_async16", words)
    assert torch.equal(got, words[:, :4] * words[:, 4:5])


def check_record(machine, record):
    """One line of a golden file, with the tensor cores of the GPU that wrote it."""
    name, expected = record["probe"], torch.tensor(record["out"])
    machine.reset(Policy(cores="ampere" if record["arch"] < 90 else "hopper"))
    got = probe(machine, name, torch.tensor(record["in"])).flatten()
    wrong = wrong_lanes(name, got, expected)
    if not wrong:
        return
    place = f"words {wrong[:8]}"
    if name in MMA and record["round"] == MMA_ROWS_ROUND:  # which parameter of the model is wrong
        rows = sorted({i // 4 // 4 + i % 4 // 2 * 8 for i in wrong})
        place = f"rows {rows} of benchmarks/gpu_golden_inputs.h"
    pytest.fail(f"{record['device']}, {name}, round {record['round']}: {place} differ")


def test_emulator_reproduces_the_golden_files(machine):
    if not GOLDEN.exists():
        pytest.skip("no GPU has recorded tests/simt/golden.jsonl yet (benchmarks/gpu_golden.cu)")
    for line in GOLDEN.read_text().splitlines():
        check_record(machine, json.loads(line))


@pytest.mark.parametrize("name", MMA)
def test_golden_comparison_names_the_rows_that_refute_the_model(built_machine, name):
    """Tensor cores of another generation than the emulator's answer otherwise in rows 2, 5 to 9."""
    built_machine.reset(Policy(cores="hopper"))
    words = golden_input(built_machine, name, MMA_ROWS_ROUND)
    out = probe(built_machine, name, words).flatten().tolist()
    record = {"device": "a GPU", "probe": name, "round": MMA_ROWS_ROUND}
    record |= {"in": words.flatten().tolist(), "out": out}
    check_record(built_machine, record | {"arch": 90})
    with pytest.raises(pytest.fail.Exception, match=r"rows \[2, .*5, 6, 7, 8, 9\]"):
        check_record(built_machine, record | {"arch": 80})


def test_golden_comparison_takes_any_nan_for_nan():
    quiet, payload = torch.tensor([0x7FFFFFFF]), torch.tensor([0x7F82E000])
    assert wrong_lanes("from_half", payload, quiet) == []
    assert wrong_lanes("from_half", payload, torch.tensor([0x3F800000])) == [0]
    assert wrong_lanes("to_half", torch.tensor([0x7E00]), torch.tensor([0x7FFF])) == []
    assert wrong_lanes("ldmatrix_x4", payload, quiet) == [0]  # not numbers: bit for bit


@pytest.mark.parametrize("name", ["exp2_approx", "mma_m16n8k16_bf16", "from_half"])
def test_golden_comparison_finds_one_wrong_lane(name):
    expected = bits(torch.linspace(1.0, 2.0, 32))
    assert wrong_lanes(name, expected, expected) == []
    got = expected.clone()
    got[7] += 1 << 7  # 1.5e-5 of the value
    assert wrong_lanes(name, got, expected) == [7]


def test_golden_comparison_holds_every_lane_of_exp2_to_its_own_value():
    expected = bits(torch.tensor([2.0**100, 1.0]))
    assert wrong_lanes("exp2_approx", bits(torch.tensor([2.0**100, 1.5])), expected) == [1]
