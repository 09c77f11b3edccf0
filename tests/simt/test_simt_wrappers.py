"""The device wrappers on the emulator, against the PTX ISA's layouts written out here, and against
golden files that a GPU has recorded (benchmarks/gpu_golden.cu), once there are any."""

import ctypes
import json

import pytest
import torch
from emulator import HERE

GOLDEN = HERE / "golden.jsonl"
# Largest difference from the GPU in a lane; where none is named: bit for bit. A lane of exp2 is
# held to its own value, a lane of mma, where terms cancel, to the largest value of the result.
LANE_TOLERANCE = {"exp2_approx": 1e-6}
MMA_TOLERANCE = 1e-6
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
    if name in LANE_TOLERANCE or name.startswith("mma_"):
        ours, theirs = floats(got).double(), floats(expected).double()
        scale = theirs.abs()
        if name.startswith("mma_"):
            scale = scale[scale.isfinite()].max().expand_as(scale)
        limit = LANE_TOLERANCE.get(name, MMA_TOLERANCE) * scale
        right |= ours.isfinite() & theirs.isfinite() & ((ours - theirs).abs() <= limit)
    return (~right).nonzero().flatten().tolist()


def probe(machine, name, words):
    """Runs a probe on (32, in_words) bit patterns in int64; returns (32, out_words) of them."""
    lib = machine.lib
    lib.probe_name.restype = lib.probe_run.restype = ctypes.c_char_p
    ids = {lib.probe_name(i).decode(): i for i in range(lib.probe_count())}
    i = ids[name]
    inputs = machine.tensor(to_int32(words.reshape(32, lib.probe_in_words(i))))
    out = machine.empty((32, lib.probe_out_words(i)), torch.int32)
    error = lib.probe_run(i, ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert error is None, error.decode()
    return out.long() & 0xFFFFFFFF


def to_int32(words):
    words = words & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def floats(words):
    return to_int32(words).view(torch.float32)


def bits(values):
    """Bit patterns of a float tensor, as int64."""
    if values.dtype == torch.float32:
        return values.view(torch.int32).long() & 0xFFFFFFFF
    return values.view(torch.int16).long() & 0xFFFF


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_m16n8k16(machine, dtype):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=g).to(dtype), torch.randn(16, 8, generator=g).to(dtype)
    c = torch.randn(16, 8, generator=g)
    words = torch.zeros(32, 10, dtype=torch.int64)
    for lane in range(32):
        row, t = lane // 4, lane % 4
        for i in range(4):
            pair = bits(
                a[row + i % 2 * 8, 2 * t + i // 2 * 8 : 2 * t + i // 2 * 8 + 2].contiguous()
            )
            words[lane, i] = pair[0] | pair[1] << 16
            words[lane, 6 + i] = bits(c[row + i // 2 * 8, 2 * t + i % 2])
        for i in range(2):
            pair = bits(b[2 * t + 8 * i : 2 * t + 8 * i + 2, row].contiguous())
            words[lane, 4 + i] = pair[0] | pair[1] << 16
    name = "mma_m16n8k16_bf16" if dtype == torch.bfloat16 else "mma_m16n8k16_half"
    check_sums(floats(probe(machine, name, words)), a.double() @ b.double() + c.double())


def test_mma_m16n8k8_tf32(machine):
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=g) for shape in ((16, 8), (8, 8), (16, 8)))
    words = torch.zeros(32, 10, dtype=torch.int64)
    for lane in range(32):
        row, t = lane // 4, lane % 4
        for i in range(4):
            words[lane, i] = bits(a[row + i % 2 * 8, t + i // 2 * 4])
            words[lane, 6 + i] = bits(c[row + i // 2 * 8, 2 * t + i % 2])
        for i in range(2):
            words[lane, 4 + i] = bits(b[t + 4 * i, row])
    a, b = (floats(bits(x) & 0xFFFFE000) for x in (a, b))  # the unit reads the upper 19 bits
    check_sums(
        floats(probe(machine, "mma_m16n8k8_tf32", words)), a.double() @ b.double() + c.double()
    )


def check_sums(got, expected):
    for lane in range(32):
        for i in range(4):
            value = expected[lane // 4 + i // 2 * 8, 2 * (lane % 4) + i % 2]
            assert abs(got[lane, i].item() - value.item()) <= 1e-5


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


def test_emulator_reproduces_the_golden_files(machine):
    if not GOLDEN.exists():
        pytest.skip("no GPU has recorded tests/simt/golden.jsonl yet (benchmarks/gpu_golden.cu)")
    for line in GOLDEN.read_text().splitlines():
        record = json.loads(line)
        expected = torch.tensor(record["out"])
        got = probe(machine, record["probe"], torch.tensor(record["in"])).flatten()
        wrong = wrong_lanes(record["probe"], got, expected)
        assert not wrong, f"{record['probe']}: words {wrong[:8]} are not what the GPU answered"


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
