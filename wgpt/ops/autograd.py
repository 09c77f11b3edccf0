"""An op's gradient, registered with torch once and cheap to call eagerly.

torch.library.register_autograd serves torch.compile and everything that calls torch.ops.wgpt, but
it costs a forward with its backward 25 to 60 us of Python (a tenth of token_concat at the presets'
sizes). What is returned here runs the same functions in an autograd.Function that goes straight to
the kernel; inside torch.compile it is the registered op.
"""

from collections.abc import Callable
from typing import Any

import torch


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """wgpt::`name` with a gradient.

    backward, setup_context: as torch.library.register_autograd takes them, and registered there.
    """
    torch.library.register_autograd(f"wgpt::{name}", backward, setup_context=setup_context)
    op = without_gradient(name)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return op(*inputs)
        return Node.apply(*inputs)

    return call


def once_differentiable(name: str) -> Callable[..., Any]:
    """wgpt::`name`_backward; a gradient through it raises RuntimeError."""

    def double_backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{name}: second derivatives are not implemented")

    torch.library.register_autograd(f"wgpt::{name}_backward", double_backward)
    return without_gradient(f"{name}_backward")


def without_gradient(name: str) -> Callable[..., Any]:
    """wgpt::`name`, past torch's autograd wherever that has nothing to record."""
    op = getattr(torch.ops.wgpt, name).default

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return op(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call
