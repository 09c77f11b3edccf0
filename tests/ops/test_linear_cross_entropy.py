"""linear_cross_entropy: a hand-computed answer, ignored rows, numbers that are not finite."""

import pytest
import torch
from training_op_cases import loss_call

from wgpt import ops


def test_loss_by_hand_counts_what_is_first() -> None:
    """Logits (0, log 3) and (0, 0), each target once: NLL log 4/3, log 4, log 2, log 2.

    A tie goes to entry 0, as with argmax.
    """
    hidden = torch.tensor([[0.0, 3.0], [0.0, 3.0], [0.0, 1.0], [0.0, 1.0]])
    hidden[:, 1] = hidden[:, 1].log()
    loss, n_correct = ops.linear_cross_entropy(
        hidden, torch.eye(2), torch.tensor([1, 0, 0, 1]), ignore_index=-1
    )
    expected = torch.tensor([4 / 3, 4.0, 2.0, 2.0]).log().sum()
    torch.testing.assert_close(loss, expected)
    assert n_correct.item() == 2


def test_loss_ignores_rows_and_makes_no_gradient_without_need() -> None:
    call = loss_call(9)
    hidden, weight, targets = call.tensors.values()
    hidden.requires_grad_()
    loss, _ = ops.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert not hidden.grad[::3].any() and hidden.grad[1].any()
    with torch.no_grad():
        again, _ = ops.linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(again, loss.detach()) and not again.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_of_what_is_not_finite_is_not_finite(value: float) -> None:
    hidden = torch.randn(3, 8)
    hidden[1, 2] = value
    assert not ops.linear_cross_entropy(hidden, torch.randn(40, 8), torch.zeros(3).long())[0] < 1e30
