"""Both sides of every size at which a launcher or kernel goes another way, at its real value.

One policy of the fast build each: a count that is cut off is so in any order of warps.
"""

import pytest
import torch
from attention_cases import check_rows, forward
from embed_cases import check_concat_backward, check_mel_backward, check_mel_forward

pytestmark = pytest.mark.parametrize("built", ["fast"], indirect=True)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "size",
    [
        (1, 8192, 5, 8, 0),  # rows of 8 chunks: what the scan loads together
        (1, 8193, 5, 8, 0),
        (3, 6000, 5, 8, 0),  # 18 chunks
        (1, 40, 1024, 8, 0),  # buckets of one turn of the scan
        (1, 40, 1025, 8, 0),
        (1, 40, 8192, 1, 0),  # counters of one turn of the rank kernel
        (1, 40, 8193, 1, 0),
        (1, 129, 1, 8, 0),  # rows of one piece of a bucket
    ],
    ids=str,
)
def test_token_gradient_beyond_each_count(built, size):
    built.reset()
    check_concat_backward(built, size, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [(1, (1 << 18) + 1, 3, 1, 0), (1, 70, 16384, 1, 0), (1, 2100, 16385, 1, 0)],  # 256 chunks
    ids=str,
)
def test_token_gradient_with_longer_chunks(built, size):
    built.reset()
    check_concat_backward(built, size, torch.float32)


@pytest.mark.parametrize("steps", [256, 257, 64 * 256, 64 * 256 + 1])
def test_mel_gradient_beyond_each_count_of_splits(built, steps):
    built.reset()
    check_mel_backward(built, (1, steps, 4, 4, 1, 0), BF16)


@pytest.mark.parametrize("keys", [256, 257, 64 * 256, 64 * 256 + 1, 20000])
def test_decoding_beyond_each_count_of_splits(built, keys):
    built.reset()
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (
        built.tensor(torch.randn(1, steps, 1, 32, generator=generator).to(BF16))
        for steps in (1, keys, keys)
    )
    # The last keys decide: a key that is dropped is seen in the numbers.
    k[:, -3:] = q * 2
    out, _ = forward(built, q, k, v, 1.0)
    check_rows([out], q, k, v, 1.0)


@pytest.mark.parametrize("queries,kernel", [(4, "decode_kernel"), (5, "forward_kernel")])
def test_few_queries_are_decoded(built, queries, kernel):
    built.reset()
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (
        built.tensor(torch.randn(1, steps, 2, 32, generator=generator).to(BF16))
        for steps in (queries, 40, 40)
    )
    with built.recorded() as launches:
        out, _ = forward(built, q, k, v, 0.2)
    assert kernel in launches[0].kernel
    check_rows([out], q, k, v, 0.2)


FAR = (1 << 31) + 64  # elements: an offset that 32 bits do not hold


@pytest.mark.parametrize("strides", [(FAR, 4), (64, FAR)], ids=["batch", "frame"])
def test_frames_beyond_32_bits(built, strides):
    built.reset()
    check_mel_forward(built, (2, 3, 4, 4, 1, 1), torch.float32, frame_strides=strides)
    check_mel_backward(built, (2, 3, 4, 4, 1, 1), torch.float32, frame_strides=strides)
