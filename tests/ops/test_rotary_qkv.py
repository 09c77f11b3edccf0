"""rotary_qkv: a hand-computed answer."""

import torch

from wgpt import ops


def test_rotation_by_a_quarter_by_hand() -> None:
    qkv = torch.arange(6.0).view(1, 1, 3, 1, 2)
    q, k, v = ops.rotary_qkv(qkv, torch.zeros(1, 1), torch.ones(1, 1))
    assert [t.flatten().tolist() for t in (q, k, v)] == [[-1.0, 0.0], [-3.0, 2.0], [4.0, 5.0]]
