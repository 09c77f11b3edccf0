"""linear: numbers that are not finite, 24-bit exactness, independence of rows."""

import pytest
import torch
import torch.nn.functional as F

from wgpt import ops


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_linear_treats_numbers_without_bounds_as_torch_does(value: float) -> None:
    x, weight = torch.randn(512, 300), torch.rand(280, 300) + 0.5
    x[5, 7] = value
    y, plain, exact = (
        ops.linear(x, weight),
        F.linear(x, weight),
        F.linear(x.double(), weight.double()),
    )
    finite = plain.isfinite()
    torch.testing.assert_close(y[~finite], plain[~finite], equal_nan=True)
    error, torchs = ((z.double() - exact).abs()[finite & (exact.abs() < 1e30)] for z in (y, plain))
    assert error.max() <= 2 * torchs.max()
    assert y[:5].isfinite().all()


def test_linear_keeps_the_digits_of_numbers_far_apart() -> None:
    """A number of 24 bits times one: what a split into fewer bits would round."""
    x = torch.zeros(512, 256)
    x[:, 0] = 1 + torch.arange(512) * 2**-23
    weight = torch.zeros(257, 256)
    weight[:, 0] = 1.0
    assert torch.equal(ops.linear(x, weight), x[:, :1].expand(512, 257))


def test_linear_rows_do_not_depend_on_other_rows() -> None:
    x, weight = torch.randn(533, 300), torch.randn(265, 300)
    changed = x.clone()
    changed[100:] = torch.randn(433, 300) * 1e6
    assert torch.equal(ops.linear(x, weight)[:100], ops.linear(changed, weight)[:100])
