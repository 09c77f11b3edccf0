"""feed_forward: the same bits in whole vectors and in the remainder."""

import pytest
import torch
from op_cases import CPU_DTYPES

from wgpt import ops


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_feed_forward_has_the_same_bits_in_whole_vectors_and_in_the_rest(dtype) -> None:
    x = torch.linspace(-6, 6, 960).reshape(-1, 1).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    alone = [ops.feed_forward(row, one, one) for row in x.split(1)]
    assert torch.equal(ops.feed_forward(x, one, one), torch.cat(alone))
