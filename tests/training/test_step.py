"""One optimizer step: bf16, clipping, decay, betas, parts of a batch. Each fails where ignored."""

import dataclasses

import numpy as np
import pytest
import torch
from step_cases import SETTINGS, SHAPE, batches, parameters, step_with

from wgpt.data.batches import Batch
from wgpt.errors import TrainError
from wgpt.training.step import TrainingStep


def run(step: TrainingStep, n_steps: int = 1) -> list[dict[str, float]]:
    drawn_from = batches(step.settings)
    return [step(i, drawn_from.batch(i))[0] for i in range(1, n_steps + 1)]


def test_bf16_runs_the_model_in_bf16_over_float32_parameters():
    seen = {}
    for dtype in ("fp32", "bf16"):
        step = step_with(dtype=dtype)
        kinds = seen.setdefault(dtype, set())
        score = step.model.score
        step.model.score = lambda hidden, targets, k=kinds, s=score: (
            k.add(hidden.dtype), s(hidden, targets),
        )[1]  # fmt: skip
        rows = run(step, 3)
        seen[dtype + " rows"] = [row["nll_nats"] for row in rows]
        assert {p.dtype for p in step.model.parameters()} == {torch.float32}
        moments = step.optimizer.state[step.model.head.weight]
        assert moments["exp_avg"].dtype == torch.float32
    assert seen["fp32"] == {torch.float32} and seen["bf16"] == {torch.bfloat16}
    exact, rounded = np.array(seen["fp32 rows"]), np.array(seen["bf16 rows"])
    assert (exact != rounded).all()
    np.testing.assert_allclose(rounded, exact, rtol=0.02)


def test_bf16_reaches_the_finer_codebooks():
    step, seen = step_with(dtype="bf16"), []
    forward = step.model.fine.forward

    def watching(hidden, codes):
        logits = forward(hidden, codes)
        seen.append(logits.dtype)
        return logits

    step.model.fine.forward = watching
    run(step)
    assert seen == [torch.bfloat16]


def applied_norm(step: TrainingStep) -> float:
    gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
    return float(torch.stack([g.norm() for g in gradients]).norm())


def test_grad_clip_bounds_the_global_norm_and_zero_does_not():
    (free,) = run(step := step_with(grad_clip=0.0))
    assert applied_norm(step) == pytest.approx(free["grad_norm"], rel=1e-4)
    limit = free["grad_norm"] / 7
    (row,) = run(step := step_with(grad_clip=limit))
    assert row["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-5)  # before clipping
    assert applied_norm(step) == pytest.approx(limit, rel=1e-3)
    run(step := step_with(grad_clip=10 * free["grad_norm"]))  # nothing to clip
    assert applied_norm(step) == pytest.approx(free["grad_norm"], rel=1e-4)


def test_weight_decay_shrinks_matrices_alone():
    """AdamW decays by lr * decay, whatever the gradient: the difference of two runs shows it."""
    plain, decayed = step_with(weight_decay=0.0), step_with(weight_decay=0.5)
    before = parameters(plain)
    run(plain), run(decayed)
    without, after = parameters(plain), parameters(decayed)
    for name, value in before.items():
        lost = without[name] - after[name]
        expected = SETTINGS.lr * 0.5 * value if value.dim() >= 2 else torch.zeros_like(value)
        torch.testing.assert_close(lost, expected, rtol=1e-3, atol=2e-7, msg=name)
    assert any(value.dim() < 2 for value in before.values())


def test_adam_moments_follow_the_betas():
    """By hand, over two steps: m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2."""
    step = step_with(beta1=0.6, beta2=0.8, grad_clip=0.0)
    weight, drawn_from = step.model.head.weight, batches()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in (1, 2):
        step(i, drawn_from.batch(i))
        m = 0.6 * m + 0.4 * weight.grad
        v = 0.8 * v + 0.2 * weight.grad**2
    state = step.optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], m, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(state["exp_avg_sq"], v, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 6, 50])
def test_a_batch_in_parts_is_the_batch(accumulate):
    """The same figures and gradients to rounding, also where parts differ in size (4 of 6)."""
    whole, parts = step_with(), step_with(accumulate=accumulate)
    sizes = []
    hidden = parts.model.hidden
    parts.model.hidden = lambda *a, **k: (sizes.append(len(a[0])), hidden(*a, **k))[1]
    assert run(whole)[0] == pytest.approx(run(parts)[0], rel=1e-5)
    assert max(sizes) == -(-6 // accumulate) and sum(sizes) == 6
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        error = (a.grad - b.grad).abs().max()
        assert error <= 1e-5 * a.grad.abs().max() + 1e-12, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointed_activations_change_what_is_kept_and_no_gradient(dtype):
    """Dropout draws the same again. What the blocks enter with is kept, not what they compute."""
    shape = dataclasses.replace(SHAPE, n_layers=4, dropout=0.2)
    steps = [step_with(shape, dtype=dtype, activation_checkpointing=c) for c in (False, True)]
    kept = [0, 0]

    def count(i, tensor):
        kept[i] += tensor.nbytes
        return tensor

    rows = []
    for i, step in enumerate(steps):
        with torch.autograd.graph.saved_tensors_hooks(lambda t, i=i: count(i, t), lambda t: t):
            rows.append(run(step, 3))
    assert rows[0] == rows[1]
    for name, value in parameters(steps[0]).items():
        assert torch.equal(value, parameters(steps[1])[name]), name
    assert kept[1] < kept[0] / 2


def test_tokens_are_counted_without_padding():
    drawn_from = batches()
    step = step_with()
    for i in range(drawn_from.windows.n_windows // 6 + 1):
        batch = drawn_from.batch(i)
        assert step(i + 1, batch)[1] == int((batch.clips >= 0).sum())


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    step = step_with()
    batch = batches().batch(0)
    assert isinstance(batch, Batch) and batch.frames is not None
    batch.frames[0, 0, 0] = torch.nan
    before = parameters(step)
    with pytest.raises(TrainError, match="step 1: loss nan"):
        step(1, batch)
    assert all(torch.equal(value, before[n]) for n, value in parameters(step).items())


def forbid(monkeypatch, step, error, n_rows):
    """Any part of more than n_rows does not fit: the allocator fails in the middle of the graph."""
    score, sizes = step.model.score, []

    def failing(hidden, targets):
        sizes.append(len(hidden))
        if len(hidden) > n_rows:
            raise error
        return score(hidden, targets)

    monkeypatch.setattr(step.model, "score", failing)
    return sizes


CPU_ERROR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
ERRORS = [CPU_ERROR, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to ...")]


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "python", "cuda"])
@pytest.mark.parametrize(("n_rows", "n_parts"), [(3, 2), (2, 4), (1, 6)])
def test_a_batch_that_does_not_fit_is_computed_in_parts(
    monkeypatch, caplog, error, n_rows, n_parts
):
    """The first step finds how many; the others keep to it; the result is that of --accumulate."""
    step, known = step_with(), step_with(accumulate=n_parts)
    sizes = forbid(monkeypatch, step, error, n_rows)
    rows = run(step, 3)
    assert step.n_parts == n_parts and step.settings.accumulate == 1
    assert sum(size > n_rows for size in sizes) == {2: 1, 4: 2, 6: 3}[n_parts]
    assert sizes.count(6) == 1
    lines = [r.message for r in caplog.records if "out of memory" in r.message]
    assert lines[-1].endswith(f"computed in {n_parts} parts (--accumulate {n_parts})")
    assert rows == run(known, 3)
    for name, value in parameters(known).items():
        assert torch.equal(parameters(step)[name], value), name


def test_parts_found_in_the_first_step_repeat_dropout(monkeypatch):
    shape = dataclasses.replace(SHAPE, dropout=0.3)
    step, known = step_with(shape), step_with(shape, accumulate=2)
    forbid(monkeypatch, step, CPU_ERROR, 3)
    assert run(step, 2) == run(known, 2)


def test_what_is_no_lack_of_memory_or_cannot_be_split_is_raised(monkeypatch):
    step = step_with()
    forbid(monkeypatch, step, RuntimeError("an illegal memory access was encountered"), 3)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(step)
    step = step_with()
    sizes = forbid(monkeypatch, step, CPU_ERROR, 0)
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(step)
    assert sizes == [6, 3, 2, 1]
    step = step_with()  # a later step is not the batch's size: windows are equally long
    run(step)
    forbid(monkeypatch, step, CPU_ERROR, 3)
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(step)
