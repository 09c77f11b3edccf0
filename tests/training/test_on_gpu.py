"""Models and trainings on a GPU against the CPU: figures, graphs, resume, generation.

Without a GPU the same tests run on a stand-in for one (cpu_graph.py), whole trainings among the
slow tests, so that a GPU meets tests that have run. Their data are a folder of version 0.1: nothing
here needs audio files or their packages.
"""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from cpu_graph import CpuGpu
from step_cases import SETTINGS, SHAPE, batches

import wgpt
from wgpt.errors import NotFiniteError
from wgpt.generation import Sampling
from wgpt.model import HybridModel, presets
from wgpt.training import train
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import DeviceStep, Gpu

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1"
RUN = {
    "max_steps": 10, "batch_size": 4, "context_s": 0.4, "sample_s": 0, "warmup_steps": 2,
    "eval_every": 5, "save_every": 5, "dtype": "fp32", "graph": "on",
}  # fmt: skip


def device_of(request, monkeypatch):
    if request.param == "cuda":
        return request.getfixturevalue("cuda")
    monkeypatch.setattr(
        "wgpt.training.trainer.training_step", lambda *given: DeviceStep(*given, CpuGpu())
    )
    return "cpu"


@pytest.fixture(params=["stand_in", "cuda"])
def gpu(request, monkeypatch):
    """The device; graphs are on."""
    return device_of(request, monkeypatch)


@pytest.fixture(params=[pytest.param("stand_in", marks=pytest.mark.slow), "cuda"])
def gpu_that_trains(request, monkeypatch):
    """The same for tests that take their time on the stand-in."""
    return device_of(request, monkeypatch)


def run(out, device, **changes):
    train(FIXTURE / "data", out, "hybrid-xs", device=device, **{**RUN, **changes})
    return losses(out)


def losses(out):
    with (out / "metrics.csv").open() as file:
        return [float(row["nll_nats"]) for row in csv.DictReader(file)]


def test_a_training_has_the_losses_of_the_cpu(gpu_that_trains, tmp_path, monkeypatch):
    """Of all steps and validations; float32's differences grow with the steps."""
    ours = run(tmp_path / "gpu", gpu_that_trains)
    monkeypatch.undo()  # the CPU is the CPU again
    plain = run(tmp_path / "cpu", "cpu", graph="auto")
    assert ours == pytest.approx(plain, rel=2e-3)
    assert ours[:2] == pytest.approx(plain[:2], rel=2e-5)


def test_bf16_trains_as_float32_does(gpu_that_trains, tmp_path):
    ours = run(tmp_path / "bf16", gpu_that_trains, dtype="bf16")
    assert ours == pytest.approx(run(tmp_path / "fp32", gpu_that_trains), rel=0.03)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(gpu_that_trains, tmp_path):
    with pytest.raises(RuntimeError, match="stopped here"):
        with_stop(tmp_path / "halves", gpu_that_trains)
    train(None, tmp_path / "halves", resume=True)
    whole = run(tmp_path / "whole", gpu_that_trains)
    assert losses(tmp_path / "halves") == pytest.approx(whole, rel=1e-4)


def with_stop(out, device):
    """A run that ends at step 8, after the checkpoint of step 5."""
    step = DeviceStep.run

    def stopping(self, number, batch):
        if number == 8:
            raise RuntimeError("stopped here")
        return step(self, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceStep, "run", stopping)
        run(out, device)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_graphs_have_the_figures_of_single_launches(gpu, dtype):
    made = {}
    for graph in ("on", "off"):
        torch.manual_seed(0)
        settings = dataclasses.replace(SETTINGS, dtype=dtype, graph=graph)
        shape = dataclasses.replace(SHAPE, dropout=0.1)
        step = step_on(gpu, shape, settings)
        made[graph] = [step(i, batches().batch(i))[0] for i in range(1, 9)]
    for a, b in zip(made["on"], made["off"], strict=True):
        assert a == pytest.approx(b, rel=1e-4 if dtype == "fp32" else 2e-2)


def step_on(device, shape, settings):
    chosen = torch.device(device)
    model = HybridModel(shape).to(chosen)
    stand_in = Gpu(chosen) if device == "cuda" else CpuGpu()
    return DeviceStep(model, settings, ProcessGroup(device=chosen), range(6), stand_in)


def test_a_batch_that_is_not_finite_stops_the_updates(gpu):
    step, batch = step_on(gpu, SHAPE, SETTINGS), batches().batch(1)
    for i in range(1, 6):
        step.run(i, batch)
    step.settle()
    before = [p.detach().clone() for p in step.model.parameters()]
    moments = [step.optimizer.state[p]["exp_avg"].clone() for p in step.model.parameters()]
    poisoned = dataclasses.replace(batch, frames=batch.frames * torch.nan)
    step.run(6, poisoned)
    step.run(7, batch)
    with pytest.raises(NotFiniteError, match="step 6: loss nan"):
        step.settle()
    for p, value, moment in zip(step.model.parameters(), before, moments, strict=True):
        assert torch.equal(p, value) and torch.equal(step.optimizer.state[p]["exp_avg"], moment)


@pytest.mark.parametrize("preset", ["hybrid-xs", "gpt-xs"])
def test_logits_are_those_of_the_cpu(gpu, preset):
    torch.manual_seed(0)
    model = HybridModel(presets.preset(preset)).eval()
    tokens = torch.randint(1024, (2, 70))
    frames = torch.randn(2, 70, 64) if model.config.mel_dim else None
    with torch.inference_mode():
        plain = model(tokens, frames)
        moved = model.to(gpu)
        ours = moved(tokens.to(gpu), None if frames is None else frames.to(gpu)).cpu()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_model_generates_the_tokens_of_the_cpu(gpu):
    wave = torch.sin(torch.arange(24_000) * (2 * torch.pi * 220 / 24_000)) * 0.3
    made = [
        [step.tokens[0] for step in
         wgpt.load(FIXTURE / "run", device=device).steps(wave, 8, Sampling(temperature=0))]
        for device in (gpu, "cpu")
    ]  # fmt: skip
    assert made[0] == made[1]
