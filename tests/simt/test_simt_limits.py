"""Both sides of every size at which a launcher or kernel goes another way, at its real value.

One policy of the fast build each: a count that is cut off is so in any order of warps.
"""

import pytest
import torch
from attention_cases import backward, check_rows, forward
from embed_cases import (
    check_concat_backward,
    check_mel_backward,
    check_mel_forward,
    concat_forward,
)

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


@pytest.mark.parametrize("strides", [(FAR, 4), (64, FAR)], ids=["batch", "step"])
def test_mel_beyond_32_bits_beside_the_tokens(built, strides):
    built.reset()
    mel = built.empty((strides[0] + 2 * strides[1] + 4,), BF16).as_strided((2, 3, 4), (*strides, 1))
    mel.copy_(torch.randn(2, 3, 4))
    tokens, table = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.randn(3, 4).to(BF16)
    y = concat_forward(built, tokens, table, mel, None)
    assert torch.equal(y, torch.cat([table[tokens], mel], -1))


@pytest.mark.parametrize("steps", [4, 6], ids=["decode", "tiles"])
@pytest.mark.parametrize("far", range(4), ids=["q", "k", "v", "d_out"])
@pytest.mark.parametrize("axis", ["batch", "step", "head"])
def test_attention_beyond_32_bits(built, axis, far, steps):
    """Of one tensor at a time, for all of them would pass the arena."""
    built.reset()
    shape, generator = (2, steps, 2, 32), torch.Generator().manual_seed(far)
    strides = {"batch": (FAR, 64, 32), "step": (64, FAR, 32), "head": (32 * steps, 32, FAR)}[axis]
    tensors = []
    for i in range(4):
        values = torch.randn(shape, generator=generator).to(BF16)
        if i != far:
            tensors.append(built.tensor(values))
            continue
        size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=False)) + 32
        tensors.append(built.empty((size,), BF16).as_strided(shape, (*strides, 1)).copy_(values))
    q, k, v, d_out = tensors
    out, lse = forward(built, q, k, v, 0.2)
    grads = backward(built, q, k, v, out, lse, d_out, 0.2)
    check_rows([out, *grads], q, k, v, 0.2, d_out=d_out)
