"""Steps that no host waits for, captured in a graph: the same training, on a stand-in for a GPU.

cpu_graph.py replays what was recorded, so a number that Python holds or an input that is not
refilled shows as a difference. tests/cuda has the same on a GPU.
"""

import csv
import dataclasses
import logging
import math

import pytest
import torch
from cpu_graph import CpuGpu
from step_cases import SETTINGS, SHAPE, batches, parameters, step_with

from wgpt import commits
from wgpt.errors import ConfigError, NotFiniteError, TrainError
from wgpt.model import HybridModel
from wgpt.runs.run import Run
from wgpt.train import train
from wgpt.training import graph
from wgpt.training.distributed import ProcessGroup
from wgpt.training.graph import N_WARM, READ_EVERY, DeviceStep
from wgpt.training.launch import arithmetic

N_STEPS = 12  # of two shapes of batches
# A rate that float32 holds exactly, as a tensor on the GPU does, and no clipping, which divides
# there and multiplies on the CPU.
EXACT = {"lr": 2.0**-7, "warmup_steps": 0, "min_lr_ratio": 1.0, "grad_clip": 0.0}


def device_step(shape=SHAPE, **changes) -> DeviceStep:
    torch.manual_seed(0)
    settings = dataclasses.replace(SETTINGS, **changes)
    rows = range(settings.batch_size)
    return DeviceStep(HybridModel(shape), settings, ProcessGroup(), rows, CpuGpu())


def run(step, n_steps=N_STEPS):
    """The rows of metrics.csv. Of every third batch the rows are one segment each."""
    made, drawn_from = [], batches(step.settings)
    for i in range(1, n_steps + 1):
        batch = drawn_from.batch(i % 5)
        assert batch.first_key is not None
        made += step.run(i, batch if i % 3 else dataclasses.replace(batch, first_key=None))
    made += step.settle()
    assert [done.step for done in made] == list(range(1, n_steps + 1))
    return [done.values for done in made]


def state(step):
    """Everything an update writes."""
    moments = {
        (n, key): value.clone()
        for n, p in step.model.named_parameters()
        for key, value in step.optimizer.state[p].items()
    }
    return {**parameters(step), **moments}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_graphed_training_has_the_bits_of_the_cpus(dtype, accumulate):
    """With dropout, whose seed every replay takes anew, and a batch in parts of unequal size."""
    shape = dataclasses.replace(SHAPE, dropout=0.2)
    changes = {**EXACT, "dtype": dtype, "accumulate": accumulate}
    plain, graphed = step_with(shape, **changes), device_step(shape, **changes)
    for row, other in zip(run(plain), run(graphed), strict=True):
        assert row == pytest.approx(other, rel=1e-6)
    assert graphed.gpu.n_captured == 2 and graphed.gpu.n_replayed == N_STEPS - 2 * N_WARM
    if dtype == "fp32" or accumulate == 1:
        assert_same(state(plain), state(graphed))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_graph_computes_activations_again(dtype):
    changes = {**EXACT, "dtype": dtype}
    plain, graphed = step_with(**changes), device_step(**changes, activation_checkpointing=True)
    for row, other in zip(run(plain), run(graphed), strict=True):
        assert row == pytest.approx(other, rel=1e-6)
    assert graphed.gpu.n_captured == 2
    assert_same(state(plain), state(graphed))


def test_dropout_that_is_drawn_again_goes_without_a_graph():
    shape = dataclasses.replace(SHAPE, dropout=0.2)
    with pytest.raises(ConfigError, match=r"--graph on.*what dropout drew is drawn again"):
        device_step(shape, activation_checkpointing=True, graph="on")
    plain, again = step_with(shape, **EXACT), device_step(
        shape, **EXACT, activation_checkpointing=True, graph="off"
    )  # fmt: skip
    run(plain), run(again)
    assert_same(state(plain), state(again))


def test_a_frozen_trunk_stays_as_it_is():
    changes = {**EXACT, "freeze_trunk": True, "init": "another run"}
    plain, graphed = step_with(**changes), device_step(**changes)
    before = parameters(graphed)
    run(plain), run(graphed)
    assert graphed.gpu.n_captured == 2
    for name, value in parameters(graphed).items():
        assert torch.equal(value, parameters(plain)[name])
        assert torch.equal(value, before[name]) == (not name.startswith("fine."))


def test_every_step_has_its_learning_rate_and_is_clipped():
    """A warm-up and a half cosine, on tensors: against floats, to float32's rounding."""
    schedule = {"warmup_steps": 4, "max_steps": N_STEPS, "grad_clip": 0.5}
    plain, graphed = step_with(**schedule), device_step(**schedule)
    rows = run(plain), run(graphed)
    assert len({row["lr"] for row in rows[1]}) > 8
    for a, b in zip(*rows, strict=True):
        assert a["lr"] == b["lr"] and a["nll_nats"] == pytest.approx(b["nll_nats"], rel=1e-5)
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(graphed)[name], value, rtol=1e-3, atol=1e-5)
    constant = device_step(**schedule, min_lr_ratio=1.0)
    assert run(constant)[-1]["nll_nats"] != pytest.approx(rows[1][-1]["nll_nats"], rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"dtype": "bf16"}, {"graph": "off"}], ids=str)
@pytest.mark.parametrize("bad", [2, N_WARM + 6])
def test_a_batch_that_is_not_finite_leaves_weights_and_moments_alone(changes, bad):
    """And so do those after it, until the host has read that. Then it goes on."""
    step, drawn_from = device_step(**changes), batches()
    batch = drawn_from.batch(1)  # one batch: one shape
    poisoned = dataclasses.replace(batch, frames=batch.frames.clone())
    poisoned.frames[0, 0, 0] = torch.nan
    for i in range(1, bad):
        step.run(i, batch)
    before = state(step) if bad > 1 else None
    step.run(bad, poisoned)
    step.run(bad + 1, batch)
    with pytest.raises(NotFiniteError, match=f"step {bad}: loss nan") as failed:
        step.settle()
    assert_same(state(step), before)
    assert failed.value.batch is poisoned
    assert [done.step for done in failed.value.finished] == list(range(1, bad))
    step.run(bad, batch)
    (row,) = step.settle()
    assert math.isfinite(row.values["nll_nats"])
    assert not torch.equal(step.model.head.weight, before["head.weight"])


def test_an_infinite_gradient_of_a_finite_loss_stops_too(monkeypatch):
    step, batch = device_step(), batches().batch(1)
    step.run(1, batch)
    step.settle()
    before = state(step)
    step.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    step.run(2, batch)
    with pytest.raises(NotFiniteError, match=r"step 2: loss [0-9.]+, gradient norm inf"):
        step.settle()
    assert_same(state(step), before)


def test_figures_are_read_together():
    step, drawn_from = device_step(), batches()
    sizes = [len(step.run(i, drawn_from.batch(i % 5))) for i in range(1, 2 * READ_EVERY + 4)]
    assert [n for n in sizes if n] == [READ_EVERY, READ_EVERY]
    assert sizes[READ_EVERY - 1] == READ_EVERY
    assert [done.step for done in step.settle()] == [2 * READ_EVERY + i for i in (1, 2, 3)]
    assert step.settle() == []


def test_tokens_are_counted_without_padding():
    step, drawn_from = device_step(), batches()
    for i in range(5):
        batch = drawn_from.batch(i)
        assert step(i + 1, batch)[1] == int((batch.targets >= 0).sum())


def waiting(step):
    """A model that asks the device something, as a graph cannot."""
    score = step.model.score
    step.model.score = lambda hidden, targets: (hidden.sum().item(), score(hidden, targets))[1]
    return step


def test_a_step_that_waits_is_not_captured_and_auto_says_why_once(caplog):
    step, plain = waiting(device_step(**EXACT)), step_with(**EXACT)
    run(step), run(plain)
    assert_same(state(step), state(plain))
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith("no CUDA graph: operation not permitted when stream is capturing")
    assert step.gpu.n_captured == 0


def at_the_backward(monkeypatch, step, hook):
    """Calls hook(gradient) amid each backward: that of the head's weight is done by then."""
    score = step.model.score

    def hooked(hidden, targets):
        hidden.register_hook(hook)
        return score(hidden, targets)

    monkeypatch.setattr(step.model, "score", hooked)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_backward_out_of_memory_leaves_no_gradients(monkeypatch, dtype):
    """The same batch in parts has the bits of --accumulate."""
    changes = {**EXACT, "dtype": dtype}
    step, known = device_step(**changes), device_step(**changes, accumulate=2)
    failed = []

    def fail(gradient):
        if len(gradient) > 3:
            failed.append(len(gradient))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to ...")

    at_the_backward(monkeypatch, step, fail)
    assert run(step) == run(known)
    assert failed == [6] and step.n_parts == 2
    assert_same(state(step), state(known))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_capture_that_fails_in_the_backward_leaves_no_gradients(monkeypatch, caplog, dtype):
    step, plain = device_step(**EXACT, dtype=dtype), step_with(**EXACT, dtype=dtype)
    at_the_backward(monkeypatch, step, lambda gradient: gradient + 0 * gradient.sum().item())
    run(step), run(plain)
    assert step.gpu.n_captured == 0
    assert "no CUDA graph: operation not permitted" in caplog.text
    assert_same(state(step), state(plain))


def test_a_weight_may_have_its_first_gradient_in_a_later_part(monkeypatch):
    weights = device_step(dtype="bf16").weights
    late, *others = weights.copies.values()
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
    for copies in (others, [late, *others]):
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        weights.collect()
    sums = [weight.grad for weight in weights.weights.values()]
    assert [(float(s.min()), float(s.max())) for s in sums] == [(1, 1)] + [(2, 2)] * len(others)


def test_graph_on_is_an_error_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"--graph on: .* when stream is capturing.*--graph off"):
        run(waiting(device_step(graph="on")))
    context = dataclasses.replace(SHAPE, mel_context_frames=2)
    with pytest.raises(ConfigError, match="mel_context_frames"):
        device_step(context, graph="on")
    settings = dataclasses.replace(SETTINGS, graph="on")
    with pytest.raises(ConfigError, match="needs a GPU, got the device cpu"):
        graph.training_step(HybridModel(SHAPE), settings, ProcessGroup(), range(6))


def test_several_processes_and_mel_context_launch_by_themselves(caplog):
    two = ProcessGroup(rank=0, size=2)
    assert "torchrun" in graph._why_no_graph(HybridModel(SHAPE), SETTINGS, two)
    step = device_step(dataclasses.replace(SHAPE, mel_context_frames=2), **EXACT)
    run(step)
    assert step.gpu.n_captured == 0 and "mel_context_frames" in caplog.text
    caplog.clear()
    step = device_step(graph="off")
    run(step)
    assert step.gpu.n_captured == 0 and not caplog.records


def test_mel_stays_as_it_is_stored():
    """A device step reads float16, half the bytes, and has the losses of the same float32."""
    drawn, stored = batches(), batches()
    stored.mel_dtype = torch.float16
    wide, narrow = drawn.batch(1), stored.batch(1)
    assert narrow.frames.dtype == torch.float16
    assert torch.equal(narrow.frames.float(), wide.frames)
    losses = [device_step()(1, batch)[0]["nll_nats"] for batch in (wide, narrow)]
    assert losses[0] == losses[1]


def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch):
    a100, t4, cpu = (torch.device(name) for name in ("cuda:0", "cuda:1", "cpu"))
    for has, gpu in ((True, a100), (False, t4)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, h=has: h)
        assert arithmetic("auto", gpu) == ("bf16" if has else "fp32")
        assert arithmetic("fp32", gpu) == "fp32" and arithmetic("bf16", gpu) == "bf16"
        assert arithmetic("auto", cpu) == "fp32"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`wgpt train` takes the CPU for a GPU; holds the steps that it made."""
    made = []

    def training_step(*given):
        made.append(DeviceStep(*given, CpuGpu()))
        return made[-1]

    monkeypatch.setattr("wgpt.training.trainer.training_step", training_step)
    return made


RUN = {
    "preset": "hybrid-xs", "max_steps": 12, "batch_size": 2, "context_s": 0.5, "sample_s": 0,
    "warmup_steps": 1, "eval_every": 7, "save_every": 5, "eval_audio_s": 3.0, "device": "cpu",
}  # fmt: skip


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(run, step):
    return (commits.path_of(run / "checkpoints", step) / "model.safetensors").read_bytes()


def test_a_graphed_run_records_every_step_and_resumes(prepared, tmp_path, on_a_gpu, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, step, batch, run=DeviceStep.run):
        if step == 9:
            raise Killed
        return run(self, step, batch)

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(prepared, whole, **RUN)
    assert on_a_gpu[0].gpu.n_replayed >= 12 - 2 * N_WARM
    trained = [int(row["step"]) for row in rows(whole) if row["split"] == "train"]
    assert trained == list(range(1, 13))
    places = [(int(row["step"]), row["split"]) for row in rows(whole)]
    assert places == sorted(places), "a validation stands behind the steps before it"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DeviceStep, "run", killed)
        train(prepared, halves, **RUN)
    assert commits.newest_step(halves / "checkpoints") in (5, 7)
    train(None, halves, resume=True)
    assert weights(halves, 12) == weights(whole, 12)
    assert (halves / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_failing_batch_is_named_with_its_run(prepared, tmp_path, on_a_gpu, monkeypatch):
    upload = CpuGpu.upload

    def poisoned(self, given):
        moved = upload(self, given)
        if len(on_a_gpu[0]._unread) == 3:  # step 4, or the fourth behind a validation
            moved["frames"][0, 0, 0] = torch.nan
        return moved

    monkeypatch.setattr(CpuGpu, "upload", poisoned)
    with pytest.raises(TrainError, match=r"step 4: loss nan.*\(clip, first step\) \[\(.*--lr") as e:
        train(prepared, tmp_path / "run", **{**RUN, "save_every": 0})
    assert "Go on from the last checkpoint" in str(e.value)
    trained = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert [int(row["step"]) for row in trained] == [1, 2, 3]
    assert commits.newest_step(tmp_path / "run" / "checkpoints") == 0
    config = Run.open(tmp_path / "run").config
    assert (config.graph, config.dtype) == ("auto", "fp32")  # what auto meant there, for ever
