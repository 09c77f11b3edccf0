"""What the five ops of the training step share: accuracy, gradients, registration, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import CPU_DTYPES, CUDA_DTYPES, Call, assert_same_bits, check_accuracy, run
from torch import Tensor
from training_op_cases import MAKERS, SIZES, FirstOutputs

from wgpt import ops
from wgpt.errors import DerivativeError, OpError

WITH_GEMMS = ["linear", "feed_forward", "linear_cross_entropy"]
# The dtypes for which a CPU target runs a GEMM of its own.
OWN_GEMMS = {
    "amx": [torch.float32],
    "avx512_bf16": [torch.float32, torch.bfloat16, torch.float16],
    "avx512": [torch.float32, torch.bfloat16, torch.float16],
    "avx2": [torch.float32, torch.bfloat16, torch.float16],
}
CASES = [(name, sizes) for name in MAKERS for sizes in SIZES[name]]


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("name, sizes", CASES)
def test_training_op_is_as_accurate_as_torch(name, sizes, dtype) -> None:
    check_accuracy(MAKERS[name](dtype=dtype, **sizes))


def on_device(call: Call, device: str) -> FirstOutputs:
    tensors = {key: t if t is None else t.to(device) for key, t in call.tensors.items()}
    return FirstOutputs(call.name, tensors, call.parameters, call.options)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("name, sizes", [case for case in CASES if case[0] != "linear"])
def test_training_op_on_cuda_is_as_accurate_as_torch(name, sizes, dtype, device) -> None:
    check_accuracy(on_device(MAKERS[name](dtype=dtype, **sizes), device))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", MAKERS)
def test_training_op_on_cuda_takes_no_rows_and_strided_inputs(name: str, device: str) -> None:
    empty = on_device(MAKERS[name](0), device)
    assert all((value == 0).all() for value in run(empty.op, empty).values())
    call = on_device(MAKERS[name](9), device)
    key = next(iter(call.tensors))
    strided = dict(call.tensors)
    strided[key] = torch.stack([strided[key], strided[key]], dim=-1)[..., 0]
    other = FirstOutputs(name, strided, call.parameters, call.options)
    assert_same_bits(run(call.op, call), run(call.op, other))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_add_rms_norm_on_cuda_takes_a_type_for_each_tensor(dtype, device) -> None:
    x, delta, weight = (t.to(device) for t in MAKERS["add_rms_norm"](33, 72).tensors.values())
    delta = delta.to(dtype)
    answers = []
    for function in (ops.add_rms_norm, ops.reference.add_rms_norm):
        leaves = [t.clone().requires_grad_() for t in (x, delta, weight)]
        total, y = function(*leaves, dtype=dtype)
        assert total.dtype == torch.float32 and y.dtype == dtype
        grads = torch.autograd.grad((y.float().sum() + total.sum()), leaves)
        answers.append((total, y, *grads))
    for ours, plain in zip(*answers, strict=True):
        assert ours.dtype == plain.dtype
        tolerance = {"rtol": 2 * torch.finfo(ours.dtype).eps, "atol": 1e-4}
        torch.testing.assert_close(ours, plain, **tolerance)


@pytest.mark.parametrize("target", ops.info()["cpu_targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_training_op_is_as_accurate_as_torch_on_every_cpu_target(
    name: str, dtype: torch.dtype, target: str, restore_cpu_target: None
) -> None:
    ops.set_cpu_target(target)
    check_accuracy(MAKERS[name](dtype=dtype, **SIZES[name][1]))


@pytest.mark.parametrize("target", ops.info()["cpu_targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WITH_GEMMS)
def test_large_gemms_are_as_accurate_as_torchs_on_every_cpu_target(
    name: str, dtype: torch.dtype, target: str, restore_cpu_target: None
) -> None:
    ops.set_cpu_target(target)
    check_accuracy(MAKERS[name](701, 300, 257, dtype=dtype))


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_passes_gradcheck(name: str) -> None:
    call = MAKERS[name](dtype=torch.float64)
    leaves = [call.tensors[n].requires_grad_() for n in call.parameters]

    def function(*values: Tensor) -> Any:
        tensors = dict(call.tensors, **dict(zip(call.parameters, values, strict=True)))
        return call.op(*tensors.values(), **call.options)

    assert torch.autograd.gradcheck(function, leaves)


def registered(call: Call) -> tuple[Any, ...]:
    tensors = [
        None if t is None else t.detach().requires_grad_(name in call.parameters)
        for name, t in call.tensors.items()
    ]
    extra = {"add_rms_norm": (1e-6, torch.float32), "linear_cross_entropy": (-1, True)}
    return (*tensors, *extra.get(call.name, ()))


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_passes_opcheck(name: str) -> None:
    arguments = registered(MAKERS[name]())
    torch.library.opcheck(getattr(torch.ops.wgpt, name).default, arguments)


def test_training_backward_ops_pass_opcheck() -> None:
    x, d = torch.randn(6, 5), torch.randn(6, 5)
    half = torch.bfloat16
    cases = {
        "add_rms_norm_backward": (d, x.to(half), x, torch.rand(6), torch.rand(5), half),
        "rotary_qkv_backward": (
            *torch.randn(3, 2, 4, 3, 8).unbind(0), torch.rand(4, 4), torch.rand(4, 4),
        ),
        "linear_backward": (torch.randn(6, 9), x, torch.randn(9, 5)),
        "feed_forward_backward": (
            d, x, torch.randn(6, 9), torch.randn(9, 5), torch.randn(5, 9),
        ),
    }  # fmt: skip
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(torch.ops.wgpt, name).default, arguments)


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_compiles_in_one_graph_with_dynamic_sizes(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 12):
        call = MAKERS[name](n)
        assert_same_bits(run(call.op, call), run(call._floating(compiled), call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["add_rms_norm", "rotary_qkv"])
def test_passes_give_the_same_bits_for_any_thread_count(
    name: str, dtype: torch.dtype, restore_threads: None
) -> None:
    """The others contain GEMMs; torch promises it for one thread count only."""
    call = MAKERS[name](203, dtype=dtype)
    assert_same_bits_for_any_thread_count(call)


@pytest.mark.parametrize(
    "target, dtype",
    [(t, dtype) for t in ops.info()["cpu_targets"] for dtype in OWN_GEMMS.get(t, ())],
)
@pytest.mark.parametrize("name", WITH_GEMMS)
def test_gemms_give_the_same_bits_for_any_thread_count(
    name: str, dtype: torch.dtype, target: str, restore_threads: None, restore_cpu_target: None
) -> None:
    ops.set_cpu_target(target)
    assert_same_bits_for_any_thread_count(MAKERS[name](1200, 300, 330, dtype=dtype))


def assert_same_bits_for_any_thread_count(call: Call) -> None:
    torch.set_num_threads(1)
    alone = run(call.op, call)
    for n_threads in (2, 4):
        torch.set_num_threads(n_threads)
        assert_same_bits(alone, run(call.op, call))


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_gives_the_same_bits_twice(name: str) -> None:
    call = MAKERS[name](**SIZES[name][1])
    assert_same_bits(run(call.op, call), run(call.op, call))


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_takes_strided_inputs(name: str) -> None:
    call = MAKERS[name](9)
    key = next(iter(call.tensors))
    strided = dict(call.tensors)
    strided[key] = torch.stack([strided[key], strided[key]], dim=-1)[..., 0]
    assert not strided[key].is_contiguous()
    assert_same_bits(
        run(call.op, call), run(call.op, FirstOutputs(name, strided, call.parameters, call.options))
    )


@pytest.mark.parametrize("target", ops.info()["cpu_targets"])
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_training_op_of_no_rows_has_gradients_of_zero(
    name: str, dtype: torch.dtype, target: str, restore_cpu_target: None
) -> None:
    ops.set_cpu_target(target)
    empty = MAKERS[name](0, dtype=dtype)
    for _ in range(3):  # in memory that another tensor has left
        torch.full((13 * 29,), torch.nan, dtype=dtype)
        assert all((value == 0).all() for value in run(empty.op, empty).values())


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_refuses_second_derivatives(name: str) -> None:
    call = MAKERS[name]()
    leaf = call.tensors[call.parameters[0]].requires_grad_()
    y = call.op(*call.tensors.values(), **call.options)[-1]
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(DerivativeError, match=f"{name}: second derivatives are not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: ops.add_rms_norm(torch.ones(2, 3), None, torch.ones(4)),
            r"weight.*\(3,\).*\(4,\)",
        ),
        (
            lambda: ops.add_rms_norm(torch.ones(2, 3), torch.ones(3, 3), torch.ones(3)),
            r"delta must have the shape of x, \(2, 3\), got \(3, 3\)",
        ),
        (
            lambda: ops.add_rms_norm(torch.ones(2, 3), None, torch.ones(3), dtype=torch.float64),
            "dtype and x must both be float64 or neither",
        ),
        (
            lambda: ops.rotary_qkv(torch.ones(1, 2, 3, 1, 4), torch.ones(2, 3), torch.ones(2, 2)),
            r"cos must have shape \(T, D/2\) = \(2, 2\), got \(2, 3\)",
        ),
        (
            lambda: ops.rotary_qkv(torch.ones(1, 2, 2, 1, 4), torch.ones(2, 2), torch.ones(2, 2)),
            r"qkv must have shape \(B, T, 3, H, D\)",
        ),
        (
            lambda: ops.feed_forward(torch.ones(2, 3), torch.ones(5, 3), torch.ones(3, 4)),
            r"down must have shape \(C, F\) = \(3, 5\), got \(3, 4\)",
        ),
        (
            lambda: ops.feed_forward(torch.ones(2, 3), torch.ones(5, 3).half(), torch.ones(3, 5)),
            "up must be float32 like x, got float16",
        ),
        (
            lambda: ops.linear_cross_entropy(
                torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 5])
            ),
            r"targets must lie in \[0, 5\) or be -1, got 5 at \[1\]",
        ),
    ],
)
def test_training_ops_refuse_what_does_not_fit(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(OpError, match=words):
        call()


@pytest.mark.parametrize("name", MAKERS)
def test_training_op_runs_its_reference_on_other_devices(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = MAKERS[name]()
    meta = {key: tensor.to("meta") for key, tensor in call.tensors.items()}
    called = []
    plain = getattr(ops.reference, name)
    monkeypatch.setattr(ops.reference, name, lambda *a, **k: called.append(name) or plain(*a, **k))
    outputs = getattr(ops, name)(*meta.values(), **call.options)
    assert called == [name]
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.device.type == "meta"


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("add_rms_norm", {"d_sum": (3, 4), "d_y": (3, 4), "x": (3, 4), "inv_rms": (3,),
                          "weight": (4,)}),
        ("rotary_qkv", {"dq": (1, 2, 1, 4), "dk": (1, 2, 1, 4), "dv": (1, 2, 1, 4),
                        "cos": (2, 2), "sin": (2, 2)}),
        ("feed_forward", {"d_y": (3, 4), "x": (3, 4), "z": (3, 8), "up": (8, 4),
                          "down": (4, 8)}),
    ],
)  # fmt: skip
def test_gradient_of_a_training_op_refuses_a_tensor_on_another_device(name, shapes) -> None:
    """The kernel for the CPU, called past the dispatcher with one tensor that has no memory."""
    backward = getattr(torch.ops.wgpt_kernels, f"{name}_backward").default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    rest = (None,) if name == "add_rms_norm" else ()  # delta_dtype
    for other in shapes.keys() - {"x", "dq"}:
        tensors = [torch.ones(s, device="meta" if n == other else "cpu") for n, s in shapes.items()]
        with pytest.raises(ValueError, match=f"{other} must be on cpu like (x|dq), got"):
            backward.redispatch(cpu, *tensors, *rest)
