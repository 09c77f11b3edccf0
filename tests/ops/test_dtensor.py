"""The ops on DTensor: every rule gives the values and the placements that it promises."""

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from wgpt import ops
from wgpt.ops import dtensor

B, T, H, D, C, F, V, M = 4, 6, 4, 32, 8, 10, 12, 6  # what is split is even


def arguments_of(name: str) -> list[Any]:
    """Arguments of an op, its first results where its backward needs them."""
    torch.manual_seed(0)
    r = torch.randn
    match name.removesuffix("_backward"):
        case "flash_attention":
            first_key = torch.arange(T, dtype=torch.int32).div(2).int().expand(B, T)
            forward = [r(B, T, H, D), r(B, T, H, D), r(B, T, H, D), 0.2, True, 0, first_key]
            forward += [r(B, H, T, T), 3.0]
            out, lse = torch.ops.wgpt_kernels.flash_attention(*forward)
            backward = [r(B, T, H, D), r(B, H, T), *forward[:3], out, lse, *forward[3:]]
        case "rotary_qkv":
            angles = [r(T, D // 2), r(T, D // 2)]
            forward = [r(B, T, 3, H, D), *angles]
            backward = [*(r(B, T, H, D) for _ in range(3)), *angles]
        case "linear":
            forward = [r(B, C), r(F, C)]
            backward = [r(B, F), *forward]
        case "feed_forward":
            forward = [r(B, C), r(F, C), r(C, F)]
            z = torch.ops.wgpt_kernels.feed_forward(*forward)[1]
            backward = [r(B, C), forward[0], z, *forward[1:]]
        case "linear_cross_entropy":
            forward = [r(B, C), r(V, C), torch.randint(V, (B,)), -1, True]
            backward = [r(()), r(B, C), r(V, C)]
        case "token_concat":
            forward = [torch.randint(V, (B, T)), r(V, C), r(B, T, C), r(T, 2 * C)]
            backward = [r(B, T, 2 * C), forward[0], V, C, T]
        case "mel_embed":
            data = [r(B, T, M), r(M), r(M)]
            forward = [*data, r(C, M), r(C), r(T, C), 1, 0, True]
            backward = [r(B, T, C), r(B, T, C), *data, T, 1, 0]
        case "add_rms_norm":
            forward = [r(B, C), r(B, C), r(C), 1e-6, torch.float32]
            backward = [r(B, C), r(B, C), r(B, C), r(B).abs() + 1, r(C), torch.float32]
    return backward if name.endswith("_backward") else forward


def rules() -> list[tuple[str, dtensor.Rule]]:
    fixed = [(name, rule) for name, found in dtensor._RULES.items() for rule in found]
    for name, rules_of in (
        ("add_rms_norm", dtensor._norm_rules),
        ("add_rms_norm_backward", dtensor._norm_backward_rules),
    ):
        fixed += [(name, rule) for rule in rules_of(*arguments_of(name))]
    return fixed


def check_rules(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def placement(placed: dtensor.Placed) -> Any:
        if placed == dtensor.P:
            return Partial()
        return Replicate() if placed == dtensor.R else Shard(placed)

    def placed(value: Any, where: dtensor.Placed) -> Any:
        if not isinstance(value, Tensor):
            return value
        if where == dtensor.P:
            return DTensor.from_local(value / mesh.size(), mesh, [Partial()])
        return distribute_tensor(value, mesh, [placement(where)])

    for name, (outputs, inputs) in rules():
        arguments = arguments_of(name)
        space = (
            torch.ops.wgpt if name == "linear_cross_entropy_backward" else torch.ops.wgpt_kernels
        )
        op = getattr(space, name).default
        expected = op(*arguments)
        got = op(*(placed(x, where) for x, where in zip(arguments, inputs, strict=True)))
        for y, z, where in zip(
            *((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), outputs, strict=True
        ):
            assert y.placements == (placement(where),), f"{name} {inputs}: {y.placements}"
            message = f"{name} {inputs}"
            torch.testing.assert_close(y.full_tensor(), z, rtol=1e-4, atol=1e-5, msg=message)


def check_public_functions(mesh: Any) -> None:
    """Rules are registered at the first call, and the gradients are those of plain tensors."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(1)
    x, weight = torch.randn(B, T, C), torch.randn(3 * H * D, C)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = ops.linear(x, weight).view(B, T, 3, H, D).unbind(2)
        y: Tensor = ops.flash_attention(q, k, v).square().sum()
        return y

    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    loss(*leaves).backward()
    shared = [distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(weight, mesh)]
    shared = [t.requires_grad_() for t in shared]
    loss(*shared).backward()
    for a, b in zip(shared, leaves, strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-3)


def in_process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    dist.init_process_group("gloo")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    check_public_functions(mesh)
    check_rules(mesh)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")
def test_ops_run_on_sharded_tensors() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(in_process, (port,), nprocs=2)
