"""How an op gets its gradient: one formula, registered with torch, and a fast eager path.

torch.compile, torch.export and callers of torch.ops.wgpt use the formula that
`torch.library.register_autograd` registers. Called eagerly that costs 40 to 120 us more for a
forward with its backward than an autograd.Function around the kernels alone (docs/log.md), so the
public functions call that: the same formula, over the ops' second names in torch.ops.wgpt_kernels,
which have no gradient registered.
"""

from collections.abc import Callable
from typing import Any

import torch

from wgpt.errors import DerivativeError, OpError


def differentiable(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers the gradient of the op wgpt::`name`.

    Args:
        name: the op's name.
        setup_context: (ctx, inputs, output), as `torch.library.register_autograd` takes it.
        backward: (ctx, *gradients); calls wgpt::`name`_backward, which has no derivative, by
            `backward_op`.

    Returns:
        A function that calls the op with its gradient, eagerly or compiled. It raises OpError for
        arguments that the op refuses.
    """

    def refuse(ctx: Any, *_: Any) -> None:
        raise DerivativeError(f"{name}: second derivatives are not implemented")

    torch.library.register_autograd(f"wgpt::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"wgpt::{name}_backward", refuse)
    registered = getattr(torch.ops.wgpt, name).default
    kernel = getattr(torch.ops.wgpt_kernels, name).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"wgpt::{name}", (torch.autograd.Function,), methods)
    apply = function.apply

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*inputs)
        try:
            return apply(*inputs) if torch.is_grad_enabled() else kernel(*inputs)
        except (ValueError, MemoryError) as error:
            raise translated(name, error) from None

    return call


def translated(name: str, error: ValueError | MemoryError) -> Exception:
    """What a failed call of the op `name` raises: a check of csrc/checks.h, or of its memory."""
    if isinstance(error, MemoryError):  # OutOfMemory of csrc/ops/runtime.h
        return torch.OutOfMemoryError(f"{name}: {error}")
    return OpError(str(error))


def checks_of(name: str) -> Callable[..., None]:
    """The op's checks of its arguments by themselves, for where its formula runs in plain torch.

    Takes the op's tensors and options; raises OpError. torch.compile traces no check: shapes are
    then those of an eager call before, or symbols.
    """
    check = getattr(torch.ops.wgpt_kernels, f"check_{name}").default

    def call(*inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            check(*inputs)
        except ValueError as error:
            raise OpError(str(error)) from None

    return call


def backward_op(name: str) -> Callable[..., Any]:
    """The function that a backward formula calls for wgpt::`name`_backward.

    Where the backward itself is recorded (create_graph) or traced, it is the registered op, which
    raises when it is differentiated.
    """
    registered = getattr(torch.ops.wgpt, f"{name}_backward").default
    kernel = getattr(torch.ops.wgpt_kernels, f"{name}_backward").default

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*inputs)
        try:
            return registered(*inputs) if torch.is_grad_enabled() else kernel(*inputs)
        except MemoryError as error:
            raise translated(f"{name}_backward", error) from None

    return call


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a fake (outputs without data) for both names of an op."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in ("wgpt", "wgpt_kernels"):
            torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return register
