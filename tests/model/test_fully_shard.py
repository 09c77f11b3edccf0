"""FSDP2: two processes under fully_shard train as one process does."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from tools_cases import SMALL, build, inputs, targets

from wgpt.model import HybridModel

STEPS = 4


def train(model: HybridModel, rows: slice) -> list[float]:
    """Losses of a few AdamW steps over those rows of batches of 4."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(STEPS):
        (tokens, frames), wanted = inputs(9 + step, batch=4), targets(9 + step, batch=4)
        loss = model.loss(tokens[rows], frames[rows], wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def in_process(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    dist.init_process_group("gloo")
    model = build(SMALL)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    losses = torch.tensor(train(model, slice(2 * rank, 2 * rank + 2)))
    dist.all_reduce(losses)
    state = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    if rank == 0:
        torch.save((losses / 2, state), f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow  # two more processes that import torch
@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")
def test_two_processes_train_as_one(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(in_process, (port, str(tmp_path)), nprocs=2)
    losses, state = torch.load(tmp_path / "result.pt")
    model = build(SMALL)
    alone = torch.tensor(train(model, slice(None)))
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)
