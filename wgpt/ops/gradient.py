"""How an op gets its gradient: one formula, registered with torch, and a fast eager path.

torch.compile, torch.export and callers of torch.ops.wgpt use the formula that
`torch.library.register_autograd` registers. Called eagerly that costs 40 to 120 us more for a
forward with its backward than an autograd.Function around the kernels alone (docs/log.md), so the
public functions call that: the same formula, over the ops' second names in torch.ops.wgpt_kernels,
which have no gradient registered. Under torch.func's transforms (grad, vjp, jacrev, vmap) another
autograd.Function runs, whose separate setup_context they ask for and which costs 20 us more.

No op has a forward-mode derivative (jvp, jacfwd) or a second one: both are refused by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wgpt.errors import DerivativeError, OpError
from wgpt.ops import dtensor

# Whether a transform of torch.func runs: tensors inside do not tell who wants their gradients.
is_transformed = torch._C._are_functorch_transforms_active


def differentiable(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    *,
    folded: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Registers the gradient of the op wgpt::`name`, and how torch.vmap runs it.

    Args:
        name: the op's name.
        setup_context: (ctx, inputs, output), as `torch.library.register_autograd` takes it.
        backward: (ctx, *gradients); calls wgpt::`name`_backward, which has no derivative, by
            `backward_op`.
        folded: the inputs whose first axis, like that of every output, is one of independent
            items: where vmap maps no other tensor, it makes that axis longer. Else the op runs
            once per item.

    Returns:
        A function that calls the op with its gradient, eagerly, compiled or transformed. It raises
        OpError for arguments that the op refuses.
    """
    torch.library.register_autograd(f"wgpt::{name}", backward, setup_context=setup_context)
    registered = getattr(torch.ops.wgpt, name).default
    kernel = getattr(torch.ops.wgpt_kernels, name).default
    torch.library.register_vmap(f"wgpt::{name}", _vmap_rule(registered, folded))

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": forward, "backward": backward, "jvp": refusal(name, "forward-mode")}
    apply = _function(name, methods).apply
    transformed = transformable(name, kernel, setup_context, backward, folded=folded)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*inputs)
        try:
            if is_transformed():
                return transformed(*inputs)
            recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
            return apply(*inputs) if recorded else kernel(*inputs)
        except (ValueError, MemoryError) as error:
            raise translated(name, error) from None
        except NotImplementedError:  # DTensor has no rule for the op yet
            if not dtensor.register():
                raise
        return call(*inputs)

    return call


def transformable(
    name: str,
    function: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    folded: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`function` with that gradient, for torch.func's transforms; arguments as in `differentiable`.

    Without a backward its derivative is refused: it is one itself.
    """

    def call(*inputs: Any) -> Any:
        return apply(*inputs)

    methods = {
        "forward": function,
        "setup_context": setup_context or (lambda ctx, inputs, output: None),
        "backward": backward or refusal(name.removesuffix("_backward"), "second"),
        "jvp": refusal(name, "forward-mode"),
        "vmap": _vmap_rule(call, folded),
    }
    apply = _function(f"{name}_transformed", methods).apply
    return call


def _function(name: str, methods: dict[str, Callable[..., Any]]) -> Any:
    static = {key: staticmethod(method) for key, method in methods.items()}
    return type(f"wgpt::{name}", (torch.autograd.Function,), static)


def refusal(name: str, kind: str) -> Callable[..., Any]:
    """A derivative that raises DerivativeError."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise DerivativeError(f"{name}: {kind} derivatives are not implemented")

    return refuse


def _vmap_rule(call: Callable[..., Any], folded: tuple[int, ...]) -> Callable[..., Any]:
    """The rule of `torch.library.register_vmap` for `call`; `folded` as in `differentiable`."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, int]:
        n = info.batch_size
        mapped = [i for i, axis in enumerate(in_dims) if axis is not None]
        # A row alone, (C,), has no axis of items.
        if all(i in folded and inputs[i].dim() > 2 for i in mapped):
            longer = [
                _longer(x, in_dims[i], n) if i in folded and isinstance(x, Tensor) else x
                for i, x in enumerate(inputs)
            ]
            outputs = call(*longer)
            if isinstance(outputs, Tensor):
                return _apart(outputs, n), 0
            return tuple(_apart(y, n) for y in outputs), 0
        items = []
        for item in range(n):
            own = (
                x if axis is None else x.select(axis, item)
                for x, axis in zip(inputs, in_dims, strict=True)
            )
            items.append(call(*own))
        if isinstance(items[0], Tensor):
            return torch.stack(items), 0
        return tuple(torch.stack(parts) for parts in zip(*items, strict=True)), 0

    return rule


def _longer(x: Tensor, axis: int | None, n: int) -> Tensor:
    """x with the mapped axis of n items in front of its first, as one axis."""
    x = x.expand(n, *x.shape) if axis is None else x.movedim(axis, 0)
    return x.flatten(0, 1)


def _apart(y: Tensor, n: int) -> Tensor:
    return y.view(n, y.shape[0] // n, *y.shape[1:])


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


def backward_op(name: str, *, folded: tuple[int, ...] = ()) -> Callable[..., Any]:
    """The function that a backward formula calls for wgpt::`name`_backward.

    Where the backward itself is recorded (create_graph), traced or transformed, what runs raises
    when it is differentiated. folded: as in `differentiable`, of the backward's inputs.
    """
    name = f"{name}_backward"
    registered = getattr(torch.ops.wgpt, name).default
    kernel = getattr(torch.ops.wgpt_kernels, name).default
    torch.library.register_autograd(
        f"wgpt::{name}", refusal(name.removesuffix("_backward"), "second")
    )
    torch.library.register_vmap(f"wgpt::{name}", _vmap_rule(registered, folded))
    transformed = transformable(name, kernel, folded=folded)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*inputs)
        try:
            if is_transformed():
                return transformed(*inputs)
            return registered(*inputs) if torch.is_grad_enabled() else kernel(*inputs)
        except MemoryError as error:
            raise translated(name, error) from None

    return call


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a fake (outputs without data) for both names of an op."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in ("wgpt", "wgpt_kernels"):
            torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return register
