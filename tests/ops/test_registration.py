"""What every op owes torch: opcheck, gradcheck, torch.compile, autocast, threads, CPU targets."""

from typing import Any

import pytest
import torch
from op_cases import MAKERS, SAMPLES, Call, assert_same_bits, check_accuracy, run
from torch.utils.flop_counter import FlopCounterMode

from wgpt import ops
from wgpt.errors import ConfigError, DerivativeError, OpError

OPS = list(MAKERS)


def sample(name: str, **options: Any) -> Call:
    return MAKERS[name](**{**SAMPLES[name], **options})


def registered_call(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """The registered op and its arguments, parameters requiring gradients."""
    tensors = [
        t.detach().requires_grad_(name in call.parameters) if t is not None else None
        for name, t in call.tensors.items()
    ]
    options = dict(call.options)
    options.pop("return_lse", None)
    if call.name == "flash_attention":
        options = {"scale": 0.2, "causal": True, "window": 0, **options}
    if call.name == "mel_embed":
        options["save_slope"] = True
    return getattr(torch.ops.wgpt, call.name).default, (*tensors, *options.values())


@pytest.mark.parametrize("name", OPS)
def test_op_passes_opcheck(name: str, device: str) -> None:
    op, arguments = registered_call(sample(name, device=device))
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", OPS)
def test_kernel_without_gradient_passes_opcheck(name: str) -> None:
    """What the public functions call eagerly, around which they put the gradient themselves."""
    _, arguments = registered_call(sample(name))
    tensors = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    kernel = getattr(torch.ops.wgpt_kernels, name).default
    torch.library.opcheck(kernel, tensors, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPS)
def test_eager_gradients_are_those_of_the_registered_op(name: str) -> None:
    call = sample(name)
    op, arguments = registered_call(call)
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    options = {"scale": 0.2, **call.options} if name == "flash_attention" else call.options
    eager = call.op(*arguments[: len(call.tensors)], **options)
    registered = op(*arguments)
    y, z = (out[0] if isinstance(out, tuple) else out for out in (eager, registered))
    assert torch.equal(y, z)
    d_y = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(z, leaves, d_y), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_backward_op_passes_opcheck(name: str) -> None:
    call = sample(name)
    t = {key: value for key, value in call.tensors.items() if value is not None}
    if name == "flash_attention":
        options = (0.2, True, 4)
        out, lse = torch.ops.wgpt.flash_attention(*t.values(), *options)
        arguments = (torch.randn_like(out), torch.randn_like(lse), *t.values(), out, lse, *options)
    elif name == "mel_embed":
        data = [t[key] for key in ("frames", "mean", "inv_std")]
        arguments = (torch.randn(2, 7, 5), torch.randn(2, 7, 5), *data, 9, 2, 1)
    else:
        arguments = (torch.randn(2, 7, 8), t["tokens"], 13, 5, 9)
    torch.library.opcheck(getattr(torch.ops.wgpt, name + "_backward").default, arguments)


@pytest.mark.parametrize("name", OPS)
def test_op_passes_gradcheck(name: str) -> None:
    call = sample(name, dtype=torch.float64, **({"batch": 1} if name == "flash_attention" else {}))
    names = list(call.tensors)
    parameters = [n for n in call.parameters if call.tensors[n] is not None]

    def function(*leaves: torch.Tensor) -> Any:
        tensors = dict(call.tensors, **dict(zip(parameters, leaves, strict=True)))
        return call.op(*(tensors[n] for n in names), **call.options)

    leaves = tuple(call.tensors[n].requires_grad_() for n in parameters)  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=name == "flash_attention")


@pytest.mark.parametrize("name", OPS)
def test_op_compiles_in_one_graph_with_dynamic_sizes(name: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(MAKERS[name]().op, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (7, 12):
        options = {"q_steps": steps} if name == "flash_attention" else {"steps": steps}
        call = sample(name, device=device, **options)
        if name != "flash_attention":
            call = sample(name, device=device, **options, pos_rows=12)
        assert_same_bits(run(call.op, call), run(compiled, call))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.slow
def test_op_compiles_with_inductor(name: str, device: str) -> None:
    torch._dynamo.reset()
    call = sample(name, device=device)
    assert_same_bits(run(call.op, call), run(torch.compile(call.op, fullgraph=True), call))


@pytest.mark.parametrize("name", OPS)
def test_op_refuses_second_derivatives(name: str) -> None:
    call = sample(name)
    leaves = {
        n: t.requires_grad_()
        for n, t in call.tensors.items()
        if n in call.parameters and t is not None
    }
    y = call.op(
        *call.tensors.values(),
        **{**call.options, **({"return_lse": False} if name == "flash_attention" else {})},
    )
    (grad,) = torch.autograd.grad(y.square().sum(), next(iter(leaves.values())), create_graph=True)
    with pytest.raises(DerivativeError, match=f"{name}: second derivatives are not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("target", ops.info()["cpu_targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_gives_the_same_bits_for_any_thread_count(
    name: str, dtype: torch.dtype, target: str, restore_threads: None, restore_cpu_target: None
) -> None:
    ops.set_cpu_target(target)
    sizes = {
        "flash_attention": {"q_steps": 203, "head_dim": 64},
        "mel_embed": {"steps": 203, "mels": 64, "channels": 48, "pos_rows": 203},
        "token_concat": {"steps": 203, "token_channels": 33, "pos_rows": 203},
    }
    call = sample(name, dtype=dtype, **sizes[name])
    torch.set_num_threads(1)
    alone = run(call.op, call)
    for n_threads in (1, 2, 3, 4, 5):
        torch.set_num_threads(n_threads)
        assert_same_bits(alone, run(call.op, call))


@pytest.mark.parametrize("name", OPS)
def test_op_gives_the_same_bits_twice(name: str, device: str) -> None:
    call = sample(name, device=device)
    assert_same_bits(run(call.op, call), run(call.op, call))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("target", ops.info()["cpu_targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_op_is_as_accurate_as_torch_on_every_cpu_target(
    name: str, target: str, dtype: torch.dtype, restore_cpu_target: None
) -> None:
    ops.set_cpu_target(target)
    assert ops.info()["cpu_target"] == target
    sizes = {
        "flash_attention": {"q_steps": 75, "head_dim": 64},
        "mel_embed": {"steps": 37, "mels": 33, "channels": 41, "pos_rows": 40},
        "token_concat": {"steps": 37, "token_channels": 33, "mel_channels": 19, "pos_rows": 40},
    }
    check_accuracy(sample(name, dtype=dtype, **sizes[name]))


def test_unknown_cpu_target_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"must be one of .*generic.*got 'sse9'"):
        ops.set_cpu_target("sse9")


@pytest.mark.parametrize("name", OPS)
def test_op_runs_under_autocast(name: str, device: str) -> None:
    call = sample(name, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        values = run(call.op, call)
    # GEMMs run in the autocast type; gathering keeps the widest type, like torch.cat
    expected = torch.float32 if name == "token_concat" else torch.bfloat16
    assert values["y"].dtype == expected
    assert all(values[f"d_{n}"].dtype == torch.float32 for n in call.parameters)
    mixed = sample(name, device=device)
    second = {"flash_attention": "k", "mel_embed": "bias", "token_concat": "mel_hidden"}[name]
    mixed.tensors[second] = mixed.tensors[second].bfloat16()  # type: ignore[union-attr]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert run(mixed.op, mixed)["y"].dtype == expected
    with pytest.raises(OpError, match=f"{second} must be float32 like"):
        run(mixed.op, mixed)


@pytest.mark.parametrize("name", OPS)
def test_op_leaves_float64_alone_under_autocast(name: str) -> None:
    call = sample(name, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(call.op, call)["y"].dtype == torch.float64


@pytest.mark.parametrize("name", OPS)
def test_op_is_captured_by_a_cuda_graph(name: str, cuda: str) -> None:
    call = sample(name, device=cuda)
    arguments = list(call.tensors.values())
    call.op(*arguments, **call.options)  # anything lazy happens outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.op(*arguments, **call.options)
    graph.replay()
    torch.cuda.synchronize()
    expected = call.op(*arguments, **call.options)
    pairs = (
        zip(captured, expected, strict=True)
        if isinstance(captured, tuple)
        else [(captured, expected)]
    )
    for a, b in pairs:
        assert torch.equal(a, b)


def test_info_names_what_runs() -> None:
    info = ops.info()
    assert info["cpu_target"] in info["cpu_targets"] and "generic" in info["cpu_targets"]
    assert info["torch_running"] == torch.__version__
    assert info["torch_oldest"] == "2.10"
    assert bool(info["cuda_archs"]) == bool(info["cuda_ptx"]) == bool(info["cuda_toolkit"])
    assert "90a" not in info["cuda_ptx"]  # no later GPU takes it


@pytest.mark.parametrize("window, causal", [(0, True), (0, False), (5, True), (5, False)])
@pytest.mark.parametrize("q_steps", [13, 4])
def test_flop_counter_counts_visible_pairs(window: int, causal: bool, q_steps: int) -> None:
    q, k, v = (torch.randn(2, n, 3, 32, requires_grad=True) for n in (q_steps, 13, 13))
    with FlopCounterMode(display=False) as counter:
        out = ops.flash_attention(q, k, v, causal=causal, window=window)
        forward = counter.get_total_flops()
        out.sum().backward()
    visible = ops.reference.visible_keys(q_steps, 13, causal, window, None, q.device)
    pairs = 2 * 3 * int(visible.sum())
    assert forward == 4 * 32 * pairs
    assert counter.get_total_flops() == 14 * 32 * pairs


def test_flop_counter_counts_each_gemm() -> None:
    """A linear layer three times (forward, two gradients), a feed-forward with its recomputed
    activations, the loss whose forward holds its gradients, and the mel slices."""
    r = torch.randn
    x, weight, up, down = (t.requires_grad_() for t in (r(5, 8), r(8, 8), r(12, 8), r(8, 12)))
    with FlopCounterMode(display=False) as counter:
        hidden = ops.feed_forward(ops.linear(x, weight), up, down)
        ops.linear_cross_entropy(hidden, r(7, 8), torch.arange(5))[0].backward()
    assert counter.get_total_flops() == 2 * 5 * (3 * 8 * 8 + (2 + 4) * 8 * 12 + 3 * 8 * 7)
    call = sample("mel_embed")  # 7 steps of 3 frames of 13 bins, of which 2 are the step's own
    with FlopCounterMode(display=False) as counter:
        run(call.op, call)
    assert counter.get_total_flops() == 2 * 2 * (2 * 7 * 3 * 13 * 5)
    with FlopCounterMode(display=False) as counter:
        ops.PackedMatrix(torch.randn(8, 70)).mm(torch.randn(3, 8))
    assert counter.get_total_flops() == 2 * 3 * 8 * 70
