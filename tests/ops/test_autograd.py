"""Every op in torch's autograd: some gradients alone, changes in place, checkpoint, inference."""

from typing import Any

import pytest
import torch
from op_cases import MAKERS, SAMPLES, Call
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training_op_cases import MAKERS as TRAINING_MAKERS

OPS = [*MAKERS, *TRAINING_MAKERS]


def sample(name: str) -> Call:
    torch.manual_seed(0)
    return {**MAKERS, **TRAINING_MAKERS}[name](**SAMPLES.get(name, {}))


def loss_of(call: Call, tensors: dict[str, Tensor | None]) -> Tensor:
    outputs = call.op(*tensors.values(), **call.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([y.double().square().sum() for y in outputs]).sum()


def leaves_of(call: Call, *wanted: str) -> dict[str, Any]:
    return {
        name: x if x is None else x.detach().clone().requires_grad_(name in wanted)
        for name, x in call.tensors.items()
    }


def parameters_of(call: Call) -> list[str]:
    return [name for name in call.parameters if call.tensors[name] is not None]


def gradients(call: Call, *wanted: str) -> dict[str, Tensor]:
    leaves = leaves_of(call, *wanted)
    loss_of(call, leaves).backward()
    assert {name for name, x in leaves.items() if x is not None and x.grad is not None} == {*wanted}
    return {name: leaves[name].grad for name in wanted}


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_that_is_wanted_alone_has_the_same_bits(name: str) -> None:
    call = sample(name)
    expected = gradients(call, *parameters_of(call))
    for parameter in expected:
        assert torch.equal(gradients(call, parameter)[parameter], expected[parameter]), parameter


@pytest.mark.parametrize("name", OPS)
def test_a_change_in_place_is_refused_or_does_not_matter(name: str) -> None:
    call = sample(name)
    parameters = parameters_of(call)
    expected = gradients(call, *parameters)
    n_refused = 0
    for changed, x in call.tensors.items():
        if x is None:
            continue
        leaves = leaves_of(call, *parameters)
        tensors = {n: t if t is None or n not in parameters else t * 1 for n, t in leaves.items()}
        loss = loss_of(call, tensors)
        with torch.no_grad():
            tensors[changed].add_(1)  # type: ignore[union-attr]
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), changed
            n_refused += 1
        else:
            for n in parameters:
                assert torch.equal(leaves[n].grad, expected[n]), f"{changed} changed d_{n}"
    # linear_cross_entropy has its gradients from the forward and saves no input.
    assert n_refused > 0 or name == "linear_cross_entropy"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_bits(name: str, reentrant: bool) -> None:
    call = sample(name)
    parameters = parameters_of(call)
    leaves = leaves_of(call, *parameters)

    def loss(*tensors: Tensor | None) -> Tensor:
        return loss_of(call, dict(zip(leaves, tensors, strict=True)))

    checkpoint(loss, *leaves.values(), use_reentrant=reentrant).backward()
    for parameter, expected in gradients(call, *parameters).items():
        assert torch.equal(leaves[parameter].grad, expected), parameter


@pytest.mark.parametrize("name", OPS)
def test_inference_mode_gives_the_same_bits(name: str) -> None:
    call = sample(name)
    expected = loss_of(call, leaves_of(call, *parameters_of(call)))
    with torch.inference_mode():
        loss = loss_of(call, leaves_of(call))
    assert loss.is_inference() and torch.equal(loss, expected)
