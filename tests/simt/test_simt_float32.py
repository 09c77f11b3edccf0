"""float32 on tensor cores that truncate is float32: the tolerance rule of tests/numerics.py.

The sizes are those of the op tests, and some in which sums of 3xTF32 products that are left to
the tensor core fail the rule: each run with the arithmetic of both generations of tensor cores.
"""

import pytest
import torch
from emulated_ops import flash_attention_on, mel_embed_on
from emulator import CORES, Policy
from op_cases import (
    ATTENTION_MASKS,
    ATTENTION_SIZES,
    MEL_SIZES,
    attention_call,
    check_accuracy,
    mel_call,
)

slow = pytest.mark.slow
LONG_ATTENTION = [(1, 257, 257, 1, 64), pytest.param((1, 1024, 1024, 1, 64), marks=slow)]
LARGE_MEL = [pytest.param((8, 750, 64, 128, 1, 0), marks=slow)]

pytestmark = [
    pytest.mark.parametrize("cores", CORES),
    pytest.mark.parametrize("built", ["fast"], indirect=True),
]


@pytest.mark.parametrize("size", [*MEL_SIZES, *LARGE_MEL], ids=str)
def test_mel_embed_is_as_accurate_as_torch(built, cores, size):
    built.reset(Policy(cores=cores))
    torch.manual_seed(0)
    check_accuracy(mel_call(*size), mel_embed_on(built))


@pytest.mark.parametrize("size", [*ATTENTION_SIZES, *LONG_ATTENTION], ids=str)
def test_flash_attention_is_as_accurate_as_torch(built, cores, size):
    built.reset(Policy(cores=cores))
    torch.manual_seed(0)
    check_accuracy(attention_call(*size), flash_attention_on(built))


@pytest.mark.parametrize("mask", ATTENTION_MASKS)
def test_flash_attention_masks_are_as_accurate_as_torch(built, cores, mask):
    built.reset(Policy(cores=cores))
    torch.manual_seed(0)
    call = attention_call(1, 130, 175, 2, 64, **ATTENTION_MASKS[mask])
    check_accuracy(call, flash_attention_on(built))
