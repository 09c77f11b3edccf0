"""The captured training step through the CUDA kernels, on the emulator: launches and losses."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from cpu_graph import CpuGpu
from step_cases import SETTINGS, SHAPE, batches

from wgpt.model import HybridModel
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import DeviceStep
from wgpt.training.step import TrainingStep

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import launches


def losses(step, n_steps):
    made = [d for i in range(1, n_steps + 1) for d in step.run(i, batches().batch(1))]
    return [done.values["nll_nats"] for done in [*made, *step.settle()]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_captured_step_launches_what_is_counted(emulated_gpu, dtype):
    """OURS of benchmarks/launches.py, for every op of the model and its gradient."""
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    shape = dataclasses.replace(SHAPE, n_fine=0)
    batch = dataclasses.replace(batches().batch(1), codes=None)
    inputs = {n: t for n, t in vars(batch).items() if t is not None and n not in ("clips", "steps")}
    with emulated_gpu.on():
        torch.manual_seed(0)
        step = DeviceStep(HybridModel(shape), settings, ProcessGroup(), range(6), CpuGpu())
        step._compute(1, inputs)
    with emulated_gpu.on() as seen, launches.Recorder() as recorder:
        step._compute(2, inputs)
    ours = [call for call in recorder.calls if call.name.startswith("wgpt")]
    # In which torch scales two gradients, by kernels of its own.
    ours = [call for call in ours if not call.name.endswith("linear_cross_entropy_backward")]
    assert {call.name.split("::")[1] for call in ours} >= {"flash_attention", "mel_embed_backward"}
    assert len(seen) == sum(call.kernels for call in ours)


def test_graphed_steps_train_through_the_cuda_kernels(emulated_gpu):
    with emulated_gpu.on():
        torch.manual_seed(0)
        graphed = DeviceStep(HybridModel(SHAPE), SETTINGS, ProcessGroup(), range(6), CpuGpu())
        ours = losses(graphed, 6)
        assert graphed.gpu.n_replayed == 3
    torch.manual_seed(0)
    plain = TrainingStep(HybridModel(SHAPE), SETTINGS, ProcessGroup(), range(6))
    assert ours == pytest.approx(losses(plain, 6), rel=1e-4)
