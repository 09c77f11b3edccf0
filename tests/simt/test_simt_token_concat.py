"""token_concat's CUDA kernels on the emulator: forward exact, backward row by row."""

import pytest
import torch
from embed_cases import DTYPES, check_concat_backward, concat_backward, concat_forward

SHAPES = [  # B, T, V, Ct, Cm
    (1, 1, 1, 8, 0),
    (2, 5, 7, 8, 8),
    (1, 37, 3, 24, 40),
    (3, 33, 11, 5, 3),  # channels that no vector divides
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_forward_is_gather_and_concat(emu, size, dtype):
    b, t, v, ct, cm = size
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(v, (b, t), generator=g)
    table = torch.randn(v, ct, generator=g).to(dtype)
    pos = torch.randn(t + 2, ct + cm, generator=g).to(dtype)
    wide = emu.tensor(
        torch.randn(b, t, cm + 8, generator=g).to(dtype)
    )  # a view with strides of its own
    mel = wide[:, :, :cm] if cm else None
    parts = [table.double()[tokens]] + ([mel.double()] if cm else [])
    expected = torch.cat(parts, -1)
    assert torch.equal(concat_forward(emu, tokens, table, mel, None).double(), expected)
    y = concat_forward(emu, tokens, table, mel, pos)
    assert torch.equal(y, (expected + pos[:t].double()).float().to(dtype))


def test_forward_marks_tokens_out_of_range_with_nan(emu):
    tokens = torch.tensor([[0, -1, 2, 3, 1 << 40]])
    table = torch.ones(3, 8)
    mel = emu.tensor(torch.ones(1, 5, 4))
    y = concat_forward(emu, tokens, table, mel, None)
    bad = y[0].isnan()
    assert bad[[1, 3, 4], :8].all() and not bad[[0, 2]].any() and not bad[:, 8:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SHAPES, (2, 700, 5, 8, 8), (1, 1100, 1030, 8, 0)], ids=str)
def test_backward_sums_by_token(emu, size, dtype):
    check_concat_backward(emu, size, dtype)


def test_backward_bits_do_not_depend_on_the_order_of_blocks_and_warps(built):
    g = torch.Generator().manual_seed(3)
    tokens, d_y = torch.randint(9, (3, 500), generator=g), torch.randn(3, 500, 16, generator=g)
    results = []
    for seed in range(4):
        built.reset(("random", "mixed", seed))
        d_table, d_pos = concat_backward(built, tokens, d_y, 9, 8, pos_rows=500)
        results.append((d_table.clone(), d_pos.clone()))
    for d_table, d_pos in results[1:]:
        assert torch.equal(d_table, results[0][0]) and torch.equal(d_pos, results[0][1])


def test_an_empty_batch_gives_zero_gradients(emu):
    d_table, _ = concat_backward(
        emu, torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4, 8), 3, 8
    )
    assert torch.equal(d_table, torch.zeros(3, 8))


def test_float64_is_refused_in_words(emu):
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        concat_forward(
            emu,
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 8, dtype=torch.float64),
            None,
            None,
        )
