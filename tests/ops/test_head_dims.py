"""flash_attention with every head dimension: kernels of their own, or padded to the next one."""

from typing import Any

import pytest
import torch
from op_cases import CPU_DTYPES, assert_same_bits, attention_call, check_accuracy, run

from wgpt import ops
from wgpt.errors import OpError
from wgpt.ops import cuda, plain

KERNELS = [96, 256]  # 32, 64 and 128 run in all other tests of attention
PADDED = [8, 40, 80, 136]
TARGETS = ops.info()["cpu_targets"]
CASES: dict[str, dict[str, Any]] = {
    "causal": {"q_steps": 67},
    "full": {"q_steps": 45, "kv_steps": 70, "causal": False},
    "grouped, window": {"q_steps": 67, "heads": 4, "kv_heads": 2, "window": 17},
    "grouped, packed": {"q_steps": 67, "kv_heads": 1, "first_key": ops.first_key_of([[0, 30]], 67)},
    "decoding": {"q_steps": 2, "kv_steps": 700, "heads": 4, "kv_heads": 2},
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, restore_cpu_target: None) -> str:
    ops.set_cpu_target(request.param)
    return request.param


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", KERNELS)
def test_every_kernel_is_as_accurate_as_torch(
    head_dim: int, case: str, dtype: torch.dtype, target: str
) -> None:
    check_accuracy(attention_call(batch=1, head_dim=head_dim, dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("head_dim", KERNELS)
def test_every_kernel_crosses_its_blocks(head_dim: int, target: str) -> None:
    """Of 192 keys, and of as many queries as fit the cache."""
    for dtype in (torch.float32, torch.bfloat16):
        check_accuracy(attention_call(1, 450, heads=1, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", PADDED)
def test_every_padded_size_is_as_accurate_as_torch(
    head_dim: int, case: str, dtype: torch.dtype
) -> None:
    """With the scale of its own channels, and none of the padding in the results."""
    call = attention_call(batch=1, head_dim=head_dim, dtype=dtype, **CASES[case])
    check_accuracy(call)
    out = call.op(*call.tensors.values(), **call.options)[0]
    assert out.shape == call.tensors["q"].shape and out.is_contiguous()  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["grouped, window", "grouped, packed", "decoding"])
def test_a_few_queries_of_a_padded_size_run_torch_s_own(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where the copies of a KV cache would take ten times as long."""
    options = {**CASES[case], "return_lse": False}
    call = attention_call(batch=1, head_dim=80, **options)
    for name in ("k", "v") if case == "decoding" else ():
        call.tensors[name] = call.tensors[name][:, ::2]  # type: ignore[index]
    if case != "decoding":  # the last four queries against all keys
        call.tensors["q"] = call.tensors["q"][:, -4:]  # type: ignore[index]
        if "first_key" in options:
            call.options["first_key"] = call.options["first_key"][:, -4:]
    check_accuracy(call)
    called = []
    monkeypatch.setattr(plain, "flash_attention", lambda *arguments: called.append(arguments))
    call.op(*call.tensors.values(), **call.options)
    assert len(called) == 1
    for other in (
        attention_call(1, 4, 9, head_dim=96, return_lse=False),
        attention_call(1, 4, 9, head_dim=80, dtype=torch.bfloat16, return_lse=False),
        attention_call(1, 5, 9, head_dim=80, return_lse=False),
        attention_call(1, 4, 4, head_dim=80, return_lse=False),
    ):
        other.op(*other.tensors.values(), **other.options)
    assert len(called) == 1


@pytest.mark.parametrize("head_dim", [40, 256])
def test_bits_do_not_depend_on_the_threads(
    head_dim: int, target: str, restore_threads: None
) -> None:
    for options in ({"q_steps": 700}, {"q_steps": 3, "kv_steps": 1100}):
        call = attention_call(batch=1, heads=2, head_dim=head_dim, **options)
        torch.set_num_threads(1)
        alone = run(call.op, call)
        torch.set_num_threads(7)
        assert_same_bits(alone, run(call.op, call))


def test_the_padding_is_zeros_whatever_its_memory_held() -> None:
    call = attention_call(1, 33, heads=2, head_dim=40)
    left_over = [torch.full((1, 33, 2, 64), torch.nan) for _ in range(16)]
    del left_over
    check_accuracy(call)


def test_a_padded_size_takes_any_strides() -> None:
    call = attention_call(2, 17, 23, 3, 40)
    dense = run(call.op, call)
    for order in [(0, 2, 1, 3), (3, 1, 0, 2)]:  # heads first; and a strided channel axis
        inverse = [order.index(i) for i in range(4)]
        for name, t in call.tensors.items():
            call.tensors[name] = t.permute(order).contiguous().permute(inverse)  # type: ignore[union-attr]
        assert_same_bits(dense, run(call.op, call))


def test_a_padded_size_of_nothing_is_empty() -> None:
    for size in [(0, 5, 5), (2, 0, 0), (2, 0, 5)]:
        call = attention_call(*size, head_dim=40)
        values = run(call.op, call)
        assert values["y"].shape == call.tensors["q"].shape  # type: ignore[union-attr]
        assert all(not value.any() for value in values.values())


def test_a_padded_size_passes_opcheck() -> None:
    q, k, v = attention_call(q_steps=5, head_dim=40).tensors.values()
    arguments = (q, k, v, 0.2, True, 0)
    out, lse = torch.ops.wgpt.flash_attention(*arguments)
    backward = (torch.randn_like(out), None, q, k, v, out, lse, 0.2, True, 0)
    torch.library.opcheck(
        torch.ops.wgpt.flash_attention.default,
        (*(x.detach().requires_grad_() for x in (q, k, v)), 0.2, True, 0),  # type: ignore[union-attr]
    )
    torch.library.opcheck(torch.ops.wgpt.flash_attention_backward.default, backward)


def test_a_padded_size_passes_gradcheck() -> None:
    call = attention_call(1, 6, heads=2, head_dim=24, kv_heads=1, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in call.tensors.values())  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(
        lambda *leaves: ops.flash_attention(*leaves, return_lse=True), leaves, fast_mode=True
    )


def test_cuda_runs_torch_s_own_beyond_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU that the kernels serve."""
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "missing_kernels", lambda index: None)
    called = []
    monkeypatch.setattr(plain, "flash_attention", lambda *arguments: called.append(arguments))
    for head_dim in (128, 136):
        q, k, v = attention_call(1, 5, heads=1, head_dim=head_dim).tensors.values()
        ops.flash_attention(q, k, v)
        assert len(called) == (head_dim > 128)
    with pytest.raises(OpError, match="multiple of 8 up to 256, got 264"):
        ops.flash_attention(*attention_call(1, 5, head_dim=264).tensors.values())


def test_cuda_is_as_accurate_as_torch_beyond_its_kernels(device: str) -> None:
    call = attention_call(1, 40, head_dim=160, heads=4, kv_heads=2, device=device)
    check_accuracy(call)
    q, k, v = call.tensors.values()
    if cuda.is_gpu(torch.device(device)):
        k, v = (ops.reference.repeat_heads(x, 4) for x in (k, v))
        with pytest.raises(ValueError, match=r"on CUDA .* D must be a multiple of 8 up to 128"):
            torch.ops.wgpt.flash_attention(q, k, v, 0.1, True, 0)
