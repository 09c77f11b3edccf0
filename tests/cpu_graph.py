"""A stand-in for wgpt.training.graph.Gpu on the CPU, as strict as a CUDA graph.

A capture leaves no trace but the record: what it wrote is put back. A replay runs the recorded ops
on the memory of the capture, with the numbers of the capture, and no Python. What would wait for
the device, or copy from memory that is not pinned, fails the capture.
"""

import contextlib

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "is_nonzero"}
ERROR = "operation not permitted when stream is capturing"


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []  # (op, args, kwargs, results), views aside
        self._own = set()  # storages made here: no need to put them back
        self._before = []  # (tensor, its value)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op._schema.name.split("::")[1] in WAITS:
            raise RuntimeError(f"{ERROR}: {op}")
        self._keep(op, args, kwargs)
        result = op(*args, **kwargs)
        given = {id(t) for t in tensors((args, kwargs))}
        made = [t for t in tensors(result) if id(t) not in given]
        if not any(argument.alias_info and not argument.alias_info.is_write
                   for argument in op._schema.arguments):  # fmt: skip
            self._own |= {t.untyped_storage()._cdata for t in made}
            self.calls.append((op, args, kwargs, made))
        return result

    def _keep(self, op, args, kwargs):
        names = [argument.name for argument in op._schema.arguments]
        values = dict(zip(names, args, strict=False)) | kwargs
        for argument in op._schema.arguments:
            if argument.alias_info and argument.alias_info.is_write:
                for tensor in tensors(values.get(argument.name)):
                    if tensor.untyped_storage()._cdata not in self._own:
                        self._before.append((tensor.detach(), tensor.detach().clone()))

    def put_back(self):
        for tensor, value in reversed(self._before):
            tensor.copy_(value)

    def replay(self):
        with torch.no_grad():
            for op, args, kwargs, made in self.calls:
                results = tensors(op(*args, **kwargs))
                fresh = [t for t in results if not any(t is g for g in tensors((args, kwargs)))]
                for memory, value in zip(made, fresh, strict=True):
                    memory.detach().copy_(value)


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class CpuGpu:
    """Counts what it did, for tests to see."""

    def __init__(self, device=None):
        self.n_captured = self.n_replayed = 0
        self.graphs = []

    def stepping(self):
        return contextlib.nullcontext()

    def upload(self, given):
        return {name: tensor.clone() for name, tensor in given.items()}

    def capture(self, run):
        recorder = Recorder()
        try:
            with recorder:
                result = run()
        finally:
            with torch.no_grad():
                recorder.put_back()
        self.n_captured += 1
        self.graphs.append(recorder)

        def replay():
            self.n_replayed += 1
            recorder.replay()

        return replay, result
