"""Scores that float32 holds, but no difference of rounded ones: as accurate as plain torch.

nvcc takes `s * scale - shift` into an FMA, which keeps of a score what the maximum of its row lost
to rounding. The slow tests compile the kernels so too, and plant the bugs.
"""

import pytest
import torch
from attention_cases import backward, compare, differentiate, forward, inputs
from emulator import CACHE, CORES, Emulator, Policy
from mutants import Mutant, build_mutants
from numerics import (
    assert_as_accurate_as_torch,
    assert_rows_as_accurate_as_torch,
    nudge,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(emu, tensors, first_key=None, scale=32**-0.5, d_lse=None):
    """Output and gradients, row by row; tensors: q, k, v, d_out of the arena.

    Whole tensors have a floor of rounded inputs alone: a rounded lse and d_out . out, for which the
    floor of rows allows, would be multiplied by the large key.
    """
    q, k, v, d_out = tensors
    out, lse = forward(emu, q, k, v, scale, first_key=first_key)
    grads = backward(
        emu, q, k, v, out, lse, d_out, scale, d_lse=emu.tensor(d_lse), first_key=first_key
    )
    options = dict(first_key=first_key, d_out=d_out, d_lse=d_lse)
    rows = compare([out, *grads], q, k, v, scale, **options)
    moved = [nudge(x.double(), q.dtype) for x in (q, k, v)]
    nudged_inputs = differentiate(moved, d_out, d_lse, (scale, True, 0, first_key))
    for name, (got, plain, exact, nudged) in rows.items():
        if q.dtype == F16:  # plain torch rounds the scores to float16, which cannot hold them
            plain = exact.to(F16)
        assert_rows_as_accurate_as_torch(name, got, plain, exact, nudged)
        assert_as_accurate_as_torch(name, got, plain, exact, nudged_inputs[name])


def one_large_key(emu, factor, dtype, q_steps=70, d=32, heads=1):
    q, k, v, d_out = inputs(emu, 2, 70, 70, heads, d, dtype, n=4)
    k[0, 5] *= factor
    k[1, 40] *= factor
    return q[:, -q_steps:], k, v, d_out[:, -q_steps:]


def all_large(emu, gain, dtype):
    return inputs(emu, 1, 70, 70, 1, 32, dtype, gain=gain, n=4)


def equal_scores(emu, score):
    """lse = score + log n, of which float32 holds only the score; half of the rows have -score."""
    q, k, v, d_out = inputs(emu, 1, 70, 70, 1, 32, F32, n=4)
    q.zero_()[..., 0] = 1
    q[:, ::2] *= -1
    k.zero_()[..., 0] = score
    return q, k, v, d_out


@pytest.mark.parametrize("factor", [1e4, 1e6, 1e10, -1e10, 1e30])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("built", ["fast"], indirect=True)
def test_one_large_key_is_as_accurate_as_torch(built, dtype, factor):
    for cores in CORES:
        built.reset(Policy(cores=cores))
        check(built, one_large_key(built, factor, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_keys_of_packed_documents_and_with_a_gradient_of_lse(emu, dtype):
    documents = torch.tensor([0, 30, 50]).repeat_interleave(torch.tensor([30, 20, 20]))
    d_lse = torch.randn(2, 1, 70, generator=torch.Generator().manual_seed(1))
    tensors = one_large_key(emu, 1e10, dtype)
    check(emu, tensors, documents.expand(2, 70).int().contiguous(), d_lse=d_lse)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("d, q_steps", [(64, 70), (128, 70), (32, 3)])
@pytest.mark.parametrize("built", ["fast"], indirect=True)
def test_every_kernel_takes_large_scores(built, d, q_steps, dtype):
    built.reset()
    check(built, one_large_key(built, 1e10, dtype, q_steps, d))


@pytest.mark.parametrize("score", [1e3, 1e5, 3e7, 3e9, 1e15])
@pytest.mark.parametrize("built", ["fast"], indirect=True)
def test_equal_large_scores_share_the_weight(built, score):
    built.reset()
    check(built, equal_scores(built, score), scale=1.0)


FORWARD, BACKWARD = "flash_attention.cuh", "flash_attention_backward.cuh"
CONTRACTED = [
    *(
        Mutant(f"fma_{dtype}", "flash_attention_backward", FORWARD, "", "", dtype=dtype)
        for dtype in ("float32", "bfloat16", "float16")
    ),
    Mutant("one_scale", "flash_attention_backward", FORWARD,
           "fabsf(top) > p.huge ? p.scale_of_huge : p.scale_log2", "p.scale_log2",
           dtype="float32"),
    Mutant("lse_of_one_float", "flash_attention_backward", BACKWARD,
           "fabsf(lse_log2) > kLargeLse", "false", dtype="float32"),
    Mutant("scores_not_mirrored", "flash_attention_backward", BACKWARD,
           "gemm_by_rows<T, D, true>(s,", "gemm_by_rows<T, D>(s,", dtype="float32"),
    Mutant("rounded_delta", "flash_attention_backward", BACKWARD,
           "row_weighted / row_sum - (", "delta[m][half] + 0.f * row_weighted - 0.f * (",
           dtype="float32"),
]  # fmt: skip


@pytest.fixture(scope="module")
def contracted():
    """By name, the kernels with FMAs where nvcc makes them, and with a bug each."""
    library = build_mutants("fma", CACHE, CONTRACTED, "large_scores")
    return {mutant.name: Emulator(library, f"_{mutant.name}") for mutant in CONTRACTED}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_with_fma_large_scores_are_as_accurate_as_torch(contracted, dtype):
    emu = contracted[f"fma_{str(dtype).removeprefix('torch.')}"]
    for factor in (1, 3e3) if dtype == F16 else (1, 1e4, 1e6, 1e10, -1e12, 1e30):
        for cores in CORES:
            emu.reset(Policy(cores=cores))
            check(emu, one_large_key(emu, factor, dtype))
    for gain in (1e3, 4e3, 8e3, 1.2e4):  # scores of 2^21 to 2^30, which fp16 reaches
        emu.reset()
        check(emu, all_large(emu, gain, dtype))
    for score in (1e3, 1e5, 3e7, 3e9, 1e15) if dtype == F32 else ():
        emu.reset()
        check(emu, equal_scores(emu, score), scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("bug", [m.name for m in CONTRACTED if m.old])
def test_bugs_of_large_scores_are_found(contracted, bug):
    emu = contracted[bug]
    emu.reset()
    with pytest.raises(AssertionError, match=r"error|times its limit"):
        check(emu, one_large_key(emu, 1e12, F32, heads=16))
    emu.reset()
    check(emu, one_large_key(emu, 1.0, F32))
