"""add_rms_norm: a hand-computed answer, and autocast."""

import torch
import torch.nn.functional as F

from wgpt import ops


def test_norm_by_hand() -> None:
    x, delta = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    total, y = ops.add_rms_norm(x, delta, torch.tensor([1.0, 2.0]), eps=0.0)
    assert total.tolist() == [[3.0, 4.0]]
    rms = 12.5**0.5
    torch.testing.assert_close(y, torch.tensor([[3 / rms, 8 / rms]]))


def test_norm_under_autocast_keeps_the_stream_and_returns_what_gemms_want() -> None:
    x = torch.randn(4, 9, 32, requires_grad=True)
    delta = torch.randn(4, 9, 32).bfloat16().requires_grad_()
    weight = torch.randn(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, y = ops.add_rms_norm(x, delta, weight)
    assert total.dtype == torch.float32 and y.dtype == torch.bfloat16
    exact = F.rms_norm(x + delta.float(), (32,), weight, 1e-6)
    torch.testing.assert_close(y.float(), exact, rtol=4e-3, atol=1e-6)
    (y.float().sum() + total.sum()).backward()
    assert delta.grad.dtype == torch.bfloat16
    torch.testing.assert_close(delta.grad.float(), x.grad, rtol=4e-3, atol=1e-6)
