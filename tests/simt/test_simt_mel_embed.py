"""mel_embed's CUDA kernels on the emulator, row by row by the tolerance rule."""

import pytest
import torch
from embed_cases import DTYPES, check_mel_backward, check_mel_forward, mel_inputs
from emulator import MelEmbedForward

SIZES = [  # B, T, M, Cm, r, c
    (1, 1, 4, 4, 1, 0),
    (2, 5, 8, 12, 1, 2),
    (1, 67, 20, 70, 2, 1),
    (2, 3, 5, 7, 3, 2),  # nothing that a vector divides
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_projects_the_normalised_slices(emu, size, dtype):
    frames_dtype = torch.float16 if dtype == torch.bfloat16 else torch.float32
    check_mel_forward(emu, size, dtype, frames_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (2, 290, 4, 8, 1, 1)], ids=str)
def test_backward_is_as_accurate_as_torch(emu, size, dtype):
    check_mel_backward(emu, size, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_bank_conflicts_in_16_bit_tiles(built, dtype):
    built.reset()
    check_mel_backward(built, (1, 67, 20, 70, 2, 1), dtype)
    counters = built.counters()
    assert counters["mmas"] > 0 and counters["bank_conflicts"] == 0


def test_float64_is_refused_in_words(built):
    built.reset()
    shape, *_ = mel_inputs(built, SIZES[0], torch.float64, torch.float64)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        built.call("mel_embed_forward", MelEmbedForward(shape))
