"""linear_cross_entropy: the head's loss and its gradients without a matrix of logits. CPU only."""

from typing import Any

import torch
from torch import Tensor

from wgpt.ops.autocast import cast_to_autocast_type, require_cpu


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -1
) -> tuple[Tensor, Tensor]:
    """The summed NLL in nats of targets under softmax(hidden weight^T), and how many it got right.

    hidden (..., C), weight (V, C) of the same type, targets (...) int64 in [0, V) or ignore_index.
    Returns the sum (), float32 (float64 for float64), differentiable in hidden and weight, and the
    count () int64 of targets that are the first of their largest logits.

    Logits live for one block of rows at a time; the gradients are made in the same pass and only
    scaled by the backward. Raises ValueError for other shapes, types, targets or devices.
    """
    require_cpu("linear_cross_entropy", hidden)
    hidden, weight = cast_to_autocast_type(hidden, weight)  # type: ignore[assignment]
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, n_correct, _, _ = torch.ops.wgpt.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), ignore_index, gradients
    )
    return loss, n_correct


@torch.library.register_fake("wgpt::linear_cross_entropy")
def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if gradients else (0,)),
        weight.new_empty(weight.shape if gradients else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(gradient is not None for gradient in unused):
        raise RuntimeError("linear_cross_entropy: second derivatives are not implemented")
    if d_loss is None:
        return None, None, None, None, None
    # The factor in float32: in 16 bits it would be rounded before the product is.
    gradients = ((g.to(d_loss.dtype) * d_loss).to(g.dtype) for g in ctx.saved_tensors)
    return *gradients, None, None, None


torch.library.register_autograd(
    "wgpt::linear_cross_entropy", _backward, setup_context=_setup_context
)
