"""Checkpoints in a file for each process: what is written is read, and what is odd is named.

tests/training/test_distributed.py has several processes; here it is one.
"""

import resource

import pytest
import torch
import torch.distributed as dist

from wgpt.errors import CheckpointError
from wgpt.runs import shards

TENSORS = {
    "exp_avg:a": torch.arange(12.0).reshape(3, 4),
    "exp_avg:b": torch.ones(5),
    "step:a": torch.tensor(7.0),
}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def written(tmp_path, one_process):
    shards.write(tmp_path, TENSORS)
    return tmp_path


def zeros(**others):
    return {name: torch.zeros_like(tensor) for name, tensor in {**TENSORS, **others}.items()}


def test_what_is_written_is_read_and_no_pickle_beside_it(written):
    assert [p.name for p in written.iterdir()] == ["optimizer-00001-of-00001.safetensors"]
    found = zeros()
    shards.read(written, found)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].shape == tensor.shape


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (zeros(**{"exp_avg:c": torch.ones(2)}), "has no exp_avg:c"),
        (
            {"exp_avg:a": torch.zeros(3, 4), "step:a": torch.zeros(())},
            "holds exp_avg:b, which this model has not",
        ),
        (zeros(**{"exp_avg:b": torch.ones(6)}), "process 0: .*exp_avg:b"),
    ],
)
def test_tensors_of_another_model_are_refused(tensors, said, written):
    with pytest.raises(CheckpointError, match=said):
        shards.read(written, tensors)


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path, one_process):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            shards.write(tmp_path, TENSORS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
