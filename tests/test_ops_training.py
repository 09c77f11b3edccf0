"""The CPU ops of the training step: accuracy, gradients, registration, targets, errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import CPU_DTYPES, Call, assert_same_bits, check_accuracy, run
from torch import Tensor

from wgpt import ops

WIDE = {torch.float64: torch.float64}  # else float32


@dataclass
class FirstOutputs(Call):
    """A call whose integer outputs are left out: they have no gradient."""

    def _floating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
            result = function(*arguments, **options)
            outputs = result if isinstance(result, tuple) else (result,)
            return tuple(y for y in outputs if y.is_floating_point())

        return call

    @property
    def op(self) -> Callable[..., Any]:
        return self._floating(super().op)

    @property
    def reference(self) -> Callable[..., Any]:
        return self._floating(super().reference)

    def converted(self, dtype: torch.dtype) -> "FirstOutputs":
        options = {k: dtype if k == "dtype" else v for k, v in self.options.items()}
        return FirstOutputs(self.name, super().converted(dtype).tensors, self.parameters, options)


def norm_call(rows: int = 7, channels: int = 13, *, dtype=torch.float32, delta=True):
    tensors = {
        "x": torch.randn(2, rows, channels).to(dtype),
        "delta": torch.randn(2, rows, channels).to(dtype) if delta else None,
        "weight": torch.randn(channels, dtype=WIDE.get(dtype, torch.float32)),
    }
    return FirstOutputs("add_rms_norm", tensors, ("x", "delta", "weight"), {"eps": 1e-6})


def rotary_call(steps: int = 7, heads: int = 3, head_dim: int = 32, *, dtype=torch.float32):
    angles = torch.rand(steps, head_dim // 2, dtype=torch.float64) * 6
    wide = WIDE.get(dtype, torch.float32)
    tensors = {
        "qkv": torch.randn(2, steps, 3, heads, head_dim).to(dtype),
        # Numbers that every type holds, so that the reference's cast to its type changes nothing.
        "cos": angles.cos().to(torch.bfloat16).to(wide),
        "sin": angles.sin().to(torch.bfloat16).to(wide),
    }
    return FirstOutputs("rotary_qkv", tensors, ("qkv",))


def linear_call(rows: int = 7, channels: int = 13, outputs: int = 29, *, dtype=torch.float32):
    tensors = {
        "x": torch.randn(rows, channels).to(dtype),
        "weight": torch.randn(outputs, channels).mul(channels**-0.5).to(dtype),
    }
    return FirstOutputs("linear", tensors, ("x", "weight"))


def ffn_call(rows: int = 7, channels: int = 13, hidden: int = 29, *, dtype=torch.float32):
    tensors = {
        "x": torch.randn(rows, channels).to(dtype),
        "up": torch.randn(hidden, channels).mul(channels**-0.5).to(dtype),
        "down": torch.randn(channels, hidden).mul(hidden**-0.5).to(dtype),
    }
    return FirstOutputs("feed_forward", tensors, ("x", "up", "down"))


def loss_call(rows: int = 7, channels: int = 13, vocab: int = 29, *, dtype=torch.float32):
    targets = torch.randint(vocab, (rows,))
    targets[::3] = -1
    tensors = {
        "hidden": torch.randn(rows, channels).to(dtype),
        "weight": torch.randn(vocab, channels).mul(channels**-0.5).to(dtype),
        "targets": targets,
    }
    return FirstOutputs("linear_cross_entropy", tensors, ("hidden", "weight"))


MAKERS: dict[str, Callable[..., FirstOutputs]] = {
    "add_rms_norm": norm_call,
    "rotary_qkv": rotary_call,
    "linear": linear_call,
    "feed_forward": ffn_call,
    "linear_cross_entropy": loss_call,
}
SIZES = {
    "add_rms_norm": [{"rows": 1, "channels": 1}, {"rows": 131, "channels": 256}, {"delta": False}],
    "rotary_qkv": [{"steps": 1, "heads": 1}, {"steps": 67, "head_dim": 64}, {"head_dim": 6}],
    # Whole and partial tiles, blocks of rows and of depth in every direction, and small products.
    "linear": [
        {"rows": 1},
        {"rows": 701, "channels": 300, "outputs": 257},
        {"rows": 33, "channels": 20001, "outputs": 65},
        {"rows": 16384, "channels": 32, "outputs": 64},
    ],
    "feed_forward": [
        {"rows": 1},
        {"rows": 257, "channels": 64, "hidden": 255},
        {"rows": 2501, "channels": 201, "hidden": 240},
    ],
    "linear_cross_entropy": [
        {"rows": 1},
        {"rows": 131, "channels": 64, "vocab": 1024},
        {"rows": 2501, "channels": 201, "vocab": 240},
    ],
}
WITH_PRODUCTS = ["linear", "feed_forward", "linear_cross_entropy"]
# The types whose products a CPU target makes itself.
OWN_PRODUCTS = {
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
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_large_products_are_as_accurate_as_torchs_on_every_cpu_target(
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
    """The others contain products; torch's promise it for one thread count only."""
    call = MAKERS[name](203, dtype=dtype)
    assert_same_bits_for_any_thread_count(call)


@pytest.mark.parametrize(
    "target, dtype",
    [(t, dtype) for t in ops.info()["cpu_targets"] for dtype in OWN_PRODUCTS.get(t, ())],
)
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_products_give_the_same_bits_for_any_thread_count(
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
    with pytest.raises(RuntimeError, match=f"{name}: second derivatives are not implemented"):
        grad.square().sum().backward()


def test_norm_by_hand() -> None:
    x, delta = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    total, y = ops.add_rms_norm(x, delta, torch.tensor([1.0, 2.0]), eps=0.0)
    assert total.tolist() == [[3.0, 4.0]]
    rms = 12.5**0.5
    torch.testing.assert_close(y, torch.tensor([[3 / rms, 8 / rms]]))


def test_norm_under_autocast_keeps_the_stream_and_returns_what_products_want() -> None:
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


def test_rotary_turns_a_quarter_by_hand() -> None:
    qkv = torch.arange(6.0).view(1, 1, 3, 1, 2)
    q, k, v = ops.rotary_qkv(qkv, torch.zeros(1, 1), torch.ones(1, 1))
    assert [t.flatten().tolist() for t in (q, k, v)] == [[-1.0, 0.0], [-3.0, 2.0], [4.0, 5.0]]


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
        (
            lambda: ops.feed_forward(torch.ones(2, 3, device="meta"), None, None),
            "feed_forward: runs on the CPU only, got a tensor on meta",
        ),
    ],
)
def test_training_ops_refuse_what_does_not_fit(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


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


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_feed_forward_has_the_same_bits_in_whole_vectors_and_in_the_rest(dtype) -> None:
    x = torch.linspace(-6, 6, 960).reshape(-1, 1).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    alone = [ops.feed_forward(row, one, one) for row in x.split(1)]
    assert torch.equal(ops.feed_forward(x, one, one), torch.cat(alone))
