"""mel_embed's CUDA kernels on the emulator against float64."""

import pytest
import torch
from embed_cases import DTYPES, MEL_ERROR, mel_inputs, mel_slices
from emulator import MelEmbedBackward, MelEmbedForward, address, relative_error

SIZES = [  # B, T, M, Cm, r, c
    (1, 1, 4, 4, 1, 0),
    (2, 5, 8, 12, 1, 2),
    (1, 67, 20, 70, 2, 1),
    (2, 3, 5, 7, 3, 2),  # nothing that a vector divides
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_projects_the_normalised_slices(emu, size, dtype):
    b, t, _, cm, r, c = size
    frames_dtype = torch.float16 if dtype == torch.bfloat16 else torch.float32
    shape, frames, mean, inv_std, weight, bias, pos = mel_inputs(emu, size, dtype, frames_dtype)
    x = mel_slices(frames, mean, inv_std, r, c)
    z = (x @ weight.double().T + bias.double()).requires_grad_()
    expected = torch.nn.functional.gelu(z)
    (expected_slope,) = torch.autograd.grad(expected.sum(), z)
    expected = expected.detach()
    for table in (None, pos):
        y = emu.empty((b, t, cm), dtype)
        slope = emu.empty((b, t, cm), dtype) if table is None else None
        emu.call(
            "mel_embed_forward",
            MelEmbedForward(
                shape,
                address(frames),
                address(mean),
                address(inv_std),
                address(weight),
                address(bias),
                address(table),
                address(y),
                address(slope),
            ),
        )
        if slope is not None:
            assert relative_error(slope, expected_slope) <= MEL_ERROR[dtype]
        full = expected if table is None else expected + pos[:t].double()
        assert relative_error(y, full) <= MEL_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (2, 290, 4, 8, 1, 1)], ids=str)
def test_backward_matches_float64(emu, size, dtype):
    b, t, _, cm, r, c = size
    shape, frames, mean, inv_std, weight, bias, pos = mel_inputs(emu, size, dtype, dtype, seed=1)
    g = torch.Generator().manual_seed(2)
    d_y = emu.tensor(torch.randn(b, t, cm, generator=g).to(dtype))
    x = mel_slices(frames, mean, inv_std, r, c)
    slope = emu.tensor(torch.randn(b, t, cm, generator=g).to(dtype))
    d_z = (d_y.double() * slope.double()).flatten(0, 1)
    d_weight, d_bias, d_pos = (emu.empty(v.shape, dtype) for v in (weight, bias, pos))
    work = emu.workspace("mel_embed_backward_workspace_bytes", shape)
    emu.call(
        "mel_embed_backward",
        MelEmbedBackward(
            shape,
            address(frames),
            address(mean),
            address(inv_std),
            address(d_y),
            address(slope),
            address(d_weight),
            address(d_bias),
            address(d_pos),
            t + 2,
            address(work),
        ),
    )
    assert relative_error(d_weight, d_z.T @ x.flatten(0, 1)) <= MEL_ERROR[dtype]
    assert relative_error(d_bias, d_z.sum(0)) <= MEL_ERROR[dtype]
    assert relative_error(d_pos[:t], d_y.double().sum(0)) <= MEL_ERROR[dtype]
    assert not d_pos[t:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_bank_conflicts_in_16_bit_tiles(built, dtype):
    built.reset()
    test_backward_matches_float64(built, (1, 67, 20, 70, 2, 1), dtype)
    counters = built.counters()
    assert counters["mmas"] > 0 and counters["bank_conflicts"] == 0


def test_float64_is_refused_in_words(built):
    built.reset()
    shape, *_ = mel_inputs(built, SIZES[0], torch.float64, torch.float64)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        built.call("mel_embed_forward", MelEmbedForward(shape))
