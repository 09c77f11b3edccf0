"""A model sharded over the processes of torchrun (FSDP2), and what of it is ever whole.

every process      its part of weights, gradients and moments; a block is whole while it runs
the first one      a whole copy of the weights beside them: it validates, samples, is saved
a checkpoint       the whole model as ever; of the optimizer, a file for each process
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from wgpt.model import HybridModel
from wgpt.runs import checkpoint, shards


class ShardedModel:
    """A model whose parameters become shards, each process holding its own. All of them make every
    call.

    whole: a copy of the model in the first process, as it was at the last `gather`; else None.
    """

    def __init__(
        self, model: HybridModel, root: nn.Module, device: torch.device, n_processes: int
    ) -> None:
        """root: what is called to run the model; what lies outside the blocks is sharded with it.

        Gradients are summed: the loss is already a process's share of the whole.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.model = model
        self.whole: HybridModel | None = None
        if dist.get_rank() == 0:
            self.whole = copy.deepcopy(model).requires_grad_(False)
        # Of blocks whose results are views; nothing writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(device.type, (n_processes,))
        mel = model.fusion.mel
        for module in [*(mel.blocks if mel is not None else ()), *model.blocks, root]:
            fully_shard(module, mesh=mesh)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    @torch.no_grad()
    def gather(self) -> None:
        """Brings `whole` to what the weights are now."""
        copies = dict(self.whole.named_parameters()) if self.whole is not None else {}
        for name, parameter in self.model.named_parameters():
            whole = parameter.full_tensor()  # type: ignore[attr-defined]
            if copies:
                copies[name].copy_(whole)

    def write(self, optimizer: torch.optim.Optimizer, folder: Path | None = None) -> None:
        """Writes the optimizer's state, a file for each process.

        folder: where; known to the first process, which tells the others.
        """
        said = [str(folder)]
        dist.broadcast_object_list(said, 0)
        shards.write(Path(said[0]), checkpoint.optimizer_tensors(self.model, optimizer))
