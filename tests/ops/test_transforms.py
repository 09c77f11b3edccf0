"""torch.func over every op: gradients, vmap, and the derivatives that are refused by name."""

from typing import Any

import pytest
import torch
from op_cases import MAKERS, SAMPLES, Call
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from training_op_cases import MAKERS as TRAINING_MAKERS

from wgpt.errors import DerivativeError

OPS = [*MAKERS, *TRAINING_MAKERS]


def sample(name: str) -> Call:
    makers = {**MAKERS, **TRAINING_MAKERS}
    return makers[name](**SAMPLES.get(name, {}))


def loss_of(call: Call, *names: str) -> Any:
    """The sum of the squares of all outputs, as a function of the named arguments."""

    def loss(*values: Tensor) -> Tensor:
        tensors = {**call.tensors, **dict(zip(names, values, strict=True))}
        outputs = call.op(*tensors.values(), **call.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.stack([y.double().square().sum() for y in outputs]).sum()

    return loss


def parameters_of(call: Call) -> list[str]:
    return [name for name in call.parameters if call.tensors[name] is not None]


def gradients(call: Call, names: list[str], values: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [value.detach().requires_grad_() for value in values]
    return torch.autograd.grad(loss_of(call, *names)(*leaves), leaves)


def stacked(values: list[Tensor]) -> Tensor:
    """Three different items of the same shape."""
    return torch.stack([values, values.flip(0), 2 * values])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPS)
def test_func_gradients_are_those_of_autograd(name: str) -> None:
    call = sample(name)
    names = parameters_of(call)
    values = [call.tensors[n] for n in names]
    expected = gradients(call, names, values)
    loss = loss_of(call, *names)
    for got in (
        grad(loss, argnums=tuple(range(len(names))))(*values),
        vjp(loss, *values)[1](torch.ones((), dtype=torch.float64)),
        jacrev(loss, argnums=tuple(range(len(names))))(*values),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_vmap_gives_each_item_what_it_gets_alone(name: str) -> None:
    """Over each parameter alone, and the gradients of all: per-sample gradients too."""
    call = sample(name)
    for mapped in (*((n,) for n in parameters_of(call)), tuple(parameters_of(call))):
        items = [stacked(call.tensors[n]) for n in mapped]
        loss = loss_of(call, *mapped)
        expected = torch.stack([loss(*(x[i] for x in items)) for i in range(3)])
        torch.testing.assert_close(vmap(loss)(*items), expected, rtol=1e-5, atol=1e-5)
        got = vmap(grad(loss, argnums=tuple(range(len(mapped)))))(*items)
        for i in range(3):
            alone = gradients(call, list(mapped), [x[i] for x in items])
            for a, b in zip(got, alone, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_gradient_of_a_vmap_is_the_sum_over_its_items(name: str) -> None:
    """What is not mapped gets gradients from every item, one mapped along another axis too."""
    call = sample(name)
    mapped, *others = parameters_of(call)
    if not others:
        pytest.skip("one parameter alone")
    items = stacked(call.tensors[mapped])
    values = [call.tensors[n] for n in others]
    loss = loss_of(call, mapped, *others)

    def total(*values: Tensor) -> Tensor:
        in_dims = (-1, *(None for _ in values))
        return vmap(loss, in_dims=in_dims)(items.movedim(0, -1), *values).sum()

    got = grad(total, argnums=tuple(range(len(others))))(*values)
    alone = [gradients(call, [mapped, *others], [item, *values])[1:] for item in items]
    for i, value in enumerate(got):
        expected = torch.stack([gradient[i] for gradient in alone]).sum(0)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_and_second_derivatives_are_refused_by_name(name: str) -> None:
    call = sample(name)
    first = parameters_of(call)[0]
    value = call.tensors[first]
    assert value is not None
    loss = loss_of(call, first)
    with pytest.raises(DerivativeError, match=f"^{name}: forward-mode derivatives are not"):
        jvp(loss, (value,), (torch.ones_like(value),))
    with pytest.raises(DerivativeError, match=f"^{name}: forward-mode derivatives are not"):
        jvp(vmap(loss), (stacked(value),), (stacked(value),))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(DerivativeError, match=f"^{name}: forward-mode derivatives are not"):
            loss(dual)
    with pytest.raises(DerivativeError, match=f"^{name}: second derivatives are not"):
        grad(lambda x: grad(loss)(x).sum())(value)


def test_vmap_of_independent_items_runs_the_op_once() -> None:
    call = sample("flash_attention")
    items = stacked(call.tensors["q"])
    with torch.profiler.profile() as profile:
        vmap(lambda q: call.op(q, *list(call.tensors.values())[1:]))(items)
    runs = [e for e in profile.events() if e.name == "wgpt_kernels::flash_attention"]
    assert len(runs) == 1
