"""flash_attention over packed documents: `first_key` on every CPU target, its bits, its borders."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as_torch
from op_cases import CPU_DTYPES, Call, assert_same_bits, attention_call, check_accuracy, run
from torch import Tensor

from wgpt import ops
from wgpt.errors import OpError

TARGETS = ops.info()["cpu_targets"]
# Documents of 1, 2, 63, 64, 65 and 1000 steps, in another order in each row: borders on both sides
# of every group, strip and block of the kernels.
MIXED = [[1, 2, 63, 64, 65, 1000], [65, 1000, 1, 64, 2, 63]]
SHORT = [[1, 2, 63, 64, 65], [65, 64, 1, 63, 2]]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, restore_cpu_target: None) -> str:
    ops.set_cpu_target(request.param)
    return request.param


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def packed_call(lengths: list[list[int]], **options: Any) -> Call:
    """Rows of packed documents; every row is as long as the first."""
    first_key = ops.first_key_of([borders_of(row) for row in lengths], sum(lengths[0]))
    options = {"heads": 2, "head_dim": 32, **options}
    return attention_call(len(lengths), first_key.shape[1], first_key=first_key, **options)


def steps_of(name: str, value: Tensor, b: int, begin: int, end: int) -> Tensor:
    return value[b, :, begin:end] if name == "lse" else value[b, begin:end]


@cache
def references(dtype: torch.dtype) -> tuple[Call, dict[str, Tensor], ...]:  # type: ignore[misc]
    """MIXED documents, and what plain torch makes of them: in that type, exactly, and nudged."""
    torch.manual_seed(0)
    call = packed_call(MIXED, heads=4, dtype=dtype)
    double = call.converted(torch.float64)
    return (
        call,
        run(call.reference, call),
        run(call.reference, double),
        run(call.reference, double, nudged_as=dtype),
    )


def document(name: str, value: Tensor, b: int, length: int) -> Tensor:
    n = MIXED[b].index(length)
    return steps_of(name, value, b, *borders_of(MIXED[b])[n : n + 2])


def run_changed(call: Call, change: Any) -> dict[str, Tensor]:
    """The call with other numbers; change(tensor) works in place."""
    tensors = {name: change(tensor.clone()) for name, tensor in call.tensors.items()}  # type: ignore[union-attr]
    return run(call.op, Call(call.name, tensors, call.parameters, call.options))


# ---- what it computes


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_documents_of_every_length_are_as_accurate_as_torch(
    dtype: torch.dtype, target: str
) -> None:
    call, plain, exact, nudged = references(dtype)
    ours = run(call.op, call)
    for name in ("y", "d_q", "d_k", "d_v"):
        for length in MIXED[0]:  # both documents of that length
            pair = [
                torch.stack([document(name, values[name], b, length) for b in range(2)])
                for values in (ours, plain, exact, nudged)
            ]
            assert_as_accurate_as_torch(f"{name} of documents of {length}", *pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 40}, {"causal": False}, {"causal": False, "window": 40}, {"scale": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("steps", [(131, 131), (50, 220), (4, 300)], ids=str)
def test_any_first_key_is_as_accurate_as_torch(
    steps: tuple[int, int], options: dict[str, Any], dtype: torch.dtype, target: str
) -> None:
    """Not only documents: any first key that does not fall, also against a key/value cache."""
    q_steps, kv_steps = steps
    last = torch.arange(q_steps) + kv_steps - q_steps
    first_key = torch.stack([torch.rand(q_steps) * last, last - 3 * torch.rand(q_steps)])
    first_key = first_key.sort(dim=1).values.int().clamp(min=0).minimum(last.int())
    call = attention_call(
        2, *steps, heads=2, head_dim=64, dtype=dtype, first_key=first_key, **options
    )
    check_accuracy(call)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_head_dim_is_as_accurate_as_torch(head_dim: int, target: str) -> None:
    check_accuracy(packed_call(SHORT, head_dim=head_dim))


# ---- bits


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_a_document_gets_the_bits_that_it_gets_alone(dtype: torch.dtype, target: str) -> None:
    call = packed_call(MIXED, dtype=dtype)
    packed = run(call.op, call)
    # run() draws the gradients of the outputs by shape: alone, they must be those of the document.
    for b, lengths in enumerate(MIXED):
        for begin, end in pairwise(borders_of(lengths)):
            leaves = [
                t[b : b + 1, begin:end].expand(2, -1, -1, -1).detach().requires_grad_()  # type: ignore[union-attr, index]
                for t in call.tensors.values()
            ]
            outputs = ops.flash_attention(*leaves, return_lse=True)
            d_outputs = [
                steps_of(name, d_y, b, begin, end).expand_as(y)
                for name, d_y, y in zip(
                    ("y", "lse"), output_gradients(packed), outputs, strict=True
                )
            ]
            alone = dict(zip(("y", "lse"), outputs, strict=True))
            grads = torch.autograd.grad(outputs, leaves, d_outputs)
            alone |= dict(zip(("d_q", "d_k", "d_v"), grads, strict=True))
            for name, value in alone.items():
                same = torch.equal(value[0], steps_of(name, packed[name], b, begin, end))
                assert same, f"{name} of the document [{begin}, {end}) in row {b}"


def output_gradients(values: dict[str, Tensor]) -> list[Tensor]:
    from op_cases import _output_gradients

    return _output_gradients((values["y"], values["lse"]))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("what", ["other numbers", "NaN", "infinity"])
def test_a_document_does_not_reach_its_neighbours(
    what: str, dtype: torch.dtype, target: str
) -> None:
    """Not one bit of their outputs and gradients, whatever stands in it."""
    call = packed_call(SHORT, dtype=dtype)
    before = run(call.op, call)
    for b, n in ((0, 0), (0, 2), (1, 1), (1, 4)):
        begin, end = borders_of(SHORT[b])[n : n + 2]

        def change(x: Tensor, b: int = b, begin: int = begin, end: int = end) -> Tensor:
            if what == "other numbers":
                x[b, begin:end] = 20 * torch.randn_like(x[b, begin:end])
            else:
                x[b, begin:end] = float("nan") if what == "NaN" else float("inf")
            return x

        after = run_changed(call, change)
        for name in before:
            old, new = before[name], after[name].clone()
            changed = steps_of(name, new, b, begin, end)
            if name == "y":
                assert not torch.equal(changed, steps_of(name, old, b, begin, end))
            changed.copy_(steps_of(name, old, b, begin, end))
            assert torch.equal(old, new), f"{name}: document [{begin}, {end}) of row {b} leaks"


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_first_key_zero_gives_the_bits_of_causal(dtype: torch.dtype, target: str) -> None:
    """In every row, and in one row beside another that is packed."""
    plain = attention_call(2, 700, heads=2, dtype=dtype)
    values = run(plain.op, plain)
    first_key = torch.zeros(2, 700, dtype=torch.int32)
    options = {**plain.options, "first_key": first_key}
    zero = Call(plain.name, plain.tensors, plain.parameters, options)
    assert_same_bits(values, run(plain.op, zero))
    first_key[1] = ops.first_key_of([[0, 1, 300]], 700)
    mixed = run(plain.op, zero)
    for name, value in values.items():
        assert torch.equal(value[0], mixed[name][0]), name
        assert not torch.equal(value[1], mixed[name][1]), name


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[[1000, 1, 200, 64]], [[700, 700], [30, 1370]]], ids=str)
def test_bits_do_not_depend_on_the_threads(
    lengths: list[list[int]], dtype: torch.dtype, target: str, restore_threads: None
) -> None:
    """One head, whose long document is split for many threads, and taken whole by few."""
    call = packed_call(lengths, heads=1, dtype=dtype)
    torch.set_num_threads(1)
    alone = run(call.op, call)
    for n_threads in (2, 4, 7):
        torch.set_num_threads(n_threads)
        assert_same_bits(alone, run(call.op, call))


@pytest.mark.parametrize("q_steps", [1, 2, 3, 4, 5, 70])
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_left_padding_of_a_cache_changes_no_bit(
    dtype: torch.dtype, q_steps: int, target: str
) -> None:
    """Decoding and chunks: keys in front of the first key might as well not be there."""
    call = attention_call(2, q_steps, 1100, heads=2, head_dim=64, dtype=dtype)
    q, k, v = call.tensors.values()
    padding = [77, 600]
    for b, n in enumerate(padding):
        k[b, :n], v[b, :n] = float("nan"), float("inf")  # type: ignore[index]
    first_key = torch.tensor(padding, dtype=torch.int32)[:, None].expand(-1, q_steps)
    out = ops.flash_attention(q, k, v, first_key=first_key)  # type: ignore[arg-type]
    for b, n in enumerate(padding):
        cut = ops.flash_attention(q, k[:, n:], v[:, n:])  # type: ignore[index, arg-type]
        assert torch.equal(out[b], cut[b])


def test_gradients_of_keys_that_nobody_sees_are_zero(target: str) -> None:
    first_key = torch.full((1, 10), 333, dtype=torch.int32)
    values = run(ops.flash_attention, attention_call(1, 10, 400, first_key=first_key))
    for name in ("d_k", "d_v"):
        assert not values[name][:, :333].any()
        assert values[name][:, 333:].any(-1).all()


@pytest.mark.parametrize("q_steps", [2, 4])
def test_documents_meet_while_decoding(q_steps: int, target: str) -> None:
    """A border among the last steps: NaN in the cache stays on its side."""
    call = attention_call(1, q_steps, 600, heads=2)
    q, k, v = call.tensors.values()
    k[:, :599], v[:, :599] = float("nan"), float("inf")  # type: ignore[index]
    first_key = torch.zeros(1, q_steps, dtype=torch.int32)
    first_key[0, -1] = 599
    out = ops.flash_attention(q, k, v, first_key=first_key)  # type: ignore[arg-type]
    assert torch.equal(out[:, -1], v[:, 599])  # type: ignore[index]


# ---- what an op owes torch


def small_call(**options: Any) -> Call:
    return packed_call([[3, 4], [2, 5]], heads=1, **options)


def arguments_of(call: Call, requires_grad: bool) -> tuple[Any, ...]:
    tensors = [t.detach().requires_grad_(requires_grad) for t in call.tensors.values()]  # type: ignore[union-attr]
    return (*tensors, 0.2, True, 4, call.options["first_key"])


def test_op_passes_opcheck() -> None:
    call = small_call()
    torch.library.opcheck(torch.ops.wgpt.flash_attention.default, arguments_of(call, True))
    arguments = arguments_of(call, False)
    kernel = torch.ops.wgpt_kernels.flash_attention.default
    torch.library.opcheck(kernel, arguments, test_utils=("test_schema", "test_faketensor"))
    out, lse = kernel(*arguments)
    backward = (torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse)
    torch.library.opcheck(
        torch.ops.wgpt.flash_attention_backward.default, (*backward, *arguments[3:])
    )


def test_op_passes_gradcheck() -> None:
    call = small_call(dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in call.tensors.values())  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(
        lambda *leaves: ops.flash_attention(*leaves, **call.options), leaves, fast_mode=True
    )


def test_op_compiles_in_one_graph_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.flash_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([[3, 4]], [[5, 8], [1, 12]]):
        call = packed_call(lengths)
        assert_same_bits(run(call.op, call), run(compiled, call))


def test_any_strides_of_first_key_are_taken() -> None:
    call = small_call()
    plain = run(call.op, call)
    for strided in (
        call.options["first_key"].t().contiguous().t(),
        call.options["first_key"].repeat_interleave(2, dim=1)[:, ::2],
    ):
        assert not strided.is_contiguous()
        options = {**call.options, "first_key": strided}
        assert_same_bits(
            plain, run(call.op, Call(call.name, call.tensors, ("q", "k", "v"), options))
        )


def test_autocast_leaves_first_key_alone() -> None:
    call = small_call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = run(call.op, call)
    assert values["y"].dtype == torch.bfloat16
    assert_same_bits(
        {"y": values["y"]},
        {"y": run(call.op, call.converted(torch.bfloat16))["y"]},
    )


# ---- refusals


def keys(*rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize(
    ("first_key", "options", "message"),
    [
        (keys([0, 0, 0]), {}, r"first_key must have shape \(B, Tq\) = \(2, 3\), got \(1, 3\)"),
        (keys([0] * 3, [0] * 3, dtype=torch.int64), {}, "first_key must be int32, got int64"),
        (
            keys([0, 1, 2], [0, 2, 2]),
            {},
            r"first_key must lie between 0 and the last key that the query sees, here 1, got 2 at "
            r"\[1, 1\]. For packed documents ops.first_key_of makes it",
        ),
        (keys([0, 0, 3], [0, 0, 0]), {"causal": False}, r"here 2, got 3 at \[0, 2\]"),
        (keys([2, 2, 2], [0, 0, 0]), {"causal": False, "window": 2}, r"here 1, got 2 at \[0, 0\]"),
        (keys([0, 0, 0], [-1, 0, 0]), {}, r"here 0, got -1 at \[1, 0\]"),
        (
            keys([0, 1, 0], [0, 0, 0]),
            {},
            r"first_key must not fall along a row, got 1 and then 0 at \[0, 2\]",
        ),
    ],
)
def test_op_refuses_a_first_key_that_breaks_a_rule(
    first_key: Tensor, options: dict[str, Any], message: str
) -> None:
    q = torch.zeros(2, 3, 1, 32)
    with pytest.raises(OpError, match="flash_attention: .*" + message):
        ops.flash_attention(q, q, q, first_key=first_key, **options)


def test_backward_op_refuses_it_too() -> None:
    q, lse = torch.zeros(1, 3, 1, 32), torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="flash_attention_backward: first_key must not fall"):
        torch.ops.wgpt.flash_attention_backward(
            q, None, q, q, q, q, lse, 1.0, True, 0, keys([0, 1, 0])
        )


def test_op_refuses_a_first_key_on_another_device(cuda: str) -> None:
    q = torch.zeros(1, 3, 1, 32, device=cuda)
    with pytest.raises(ValueError, match="first_key must be on cuda:0 like q, got cpu"):
        ops.flash_attention(q, q, q, first_key=keys([0, 0, 0]))
