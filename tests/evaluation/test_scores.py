"""Evaluation: every token once, baselines by hand, closed loop, and figures that agree."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from splits import codec_of, split_of

from wgpt.audio.mel import MelFrontend
from wgpt.data.dataset import Dataset
from wgpt.evaluation.baselines import baselines
from wgpt.evaluation.codec_ceiling import codec_ceiling, with_decoded_mel
from wgpt.evaluation.scores import Score, codebook_scores, paired_difference, score
from wgpt.model import HybridModel, presets


def test_baselines_by_hand():
    train, valid = split_of([[0, 1, 0, 1], [0, 0]]), split_of([[0, 1], [3]])
    uniform, unigram, bigram = baselines(train, valid)
    np.testing.assert_allclose(uniform.nll, [2 * math.log(4), math.log(4)])
    # Six tokens, 0 four times, 1 twice; plus one each: 5/10, 3/10, 1/10, 1/10.
    np.testing.assert_allclose(unigram.nll, [-math.log(0.5) - math.log(0.3), -math.log(0.1)])
    # After BOS: 0 twice (one kind), (2 + 1 * 0.5) / 3. After 0: 1 twice, 0 once (two kinds).
    first = -math.log(2.5 / 3) - math.log((2 + 2 * 0.3) / 5)
    np.testing.assert_allclose(bigram.nll, [first, -math.log(0.1 / 3)])
    assert bigram.correct.tolist() == [2, 0]


def test_baseline_probabilities_sum_to_one():
    train = split_of([[0, 1, 0, 2, 2, 1]], size=5)
    total = np.zeros(3)
    for token in range(5):
        total += [np.exp(-s.nll[0]) for s in baselines(train, split_of([[token]], 5))]
    np.testing.assert_allclose(total, 1.0)


@pytest.mark.parametrize("context", [7, 32, 10_000])
def test_score_counts_every_token_once(prepared, context):
    torch.manual_seed(0)
    split = Dataset(prepared).split("valid")
    model = HybridModel(presets.preset("hybrid-xs"))
    with torch.no_grad():
        model.head.weight.zero_()  # uniform: any token counted twice or left out shows in the sum
    scored = score("m", model, split, context_steps=context)
    row = scored.row()
    assert row["n_tokens"] == split.n_steps
    assert row["nll_nats"] == pytest.approx(math.log(1024), rel=1e-6)
    assert row["bits_per_s"] == pytest.approx(750, rel=1e-6)
    assert row["perplexity"] == pytest.approx(1024, rel=1e-5)
    astray = Score("x", np.array([1e6]), np.array([0]), np.array([100]), ["."])
    assert astray.row()["perplexity"] == float("inf")
    assert scored.n_tokens.tolist() == [split.clip_steps(i) for i in range(split.n_clips)]


@pytest.mark.parametrize("context", [7, 50])
def test_codebook_scores_count_every_code_once(prepared, context):
    torch.manual_seed(0)
    split = Dataset(prepared).split("valid")
    shape = dataclasses.replace(presets.preset("gpt-xs"), n_layers=1, n_fine=3, fine_dim=32)
    model = HybridModel(shape)
    scores = codebook_scores("m", model, split, context_steps=context)
    assert [s.name for s in scores] == ["m", *(f"m, codebook {k}" for k in (1, 2, 3))]
    coarse = score("m", model, split, context_steps=context)
    np.testing.assert_array_equal(scores[0].nll, coarse.nll)
    with torch.no_grad():
        model.fine.heads.zero_()  # uniform; the likeliest code is then 0
    for k, scored in enumerate(codebook_scores("m", model, split, context_steps=context)[1:], 1):
        assert scored.n_tokens.tolist() == [split.clip_steps(i) for i in range(split.n_clips)]
        assert scored.row()["nll_nats"] == pytest.approx(math.log(1024), rel=1e-6)
        zeros = [(split.clip(i)[0][k] == 0).sum().item() for i in range(split.n_clips)]
        assert scored.correct.tolist() == zeros


def test_score_does_not_depend_on_the_batch_size(prepared):
    torch.manual_seed(0)
    split = Dataset(prepared).split("valid")
    model = HybridModel(presets.preset("hybrid-xs"))
    one = score("m", model, split, context_steps=50, batch_size=1)
    many = score("m", model, split, context_steps=50, batch_size=5)
    np.testing.assert_allclose(one.nll, many.nll, rtol=1e-6)


def test_paired_difference_finds_a_shift_and_not_noise():
    rng = np.random.default_rng(0)
    n_tokens = np.full(40, 100)
    a = Score("a", rng.normal(400, 10, 40), n_tokens, n_tokens, ["g"] * 40)
    b = Score("b", a.nll + 20 + rng.normal(0, 5, 40), n_tokens, n_tokens, ["g"] * 40)
    found = paired_difference([a], [b])
    assert found["low"] < found["nll_nats"] < found["high"] < 0
    assert found["nll_nats"] == pytest.approx(-0.2, abs=0.03)
    assert (found["drawn"], found["n_drawn"]) == ("clips", 40)
    c = Score("c", a.nll + rng.normal(0, 5, 40), n_tokens, n_tokens, ["g"] * 40)
    found = paired_difference([a], [c])
    assert found["low"] < 0 < found["high"]


def test_paired_difference_draws_whole_groups():
    """Clips of a speaker are alike: 400 of them tell no more than their ten speakers."""
    rng = np.random.default_rng(0)
    groups = [f"{i // 40}" for i in range(400)]
    n_tokens = np.full(400, 100)
    shift = np.repeat(rng.normal(0, 10, 10), 40)
    a = Score("a", np.full(400, 400.0), n_tokens, n_tokens, groups)
    b = Score("b", a.nll + shift, n_tokens, n_tokens, groups)
    by_group = paired_difference([a], [b])
    assert (by_group["drawn"], by_group["n_drawn"]) == ("groups", 10)
    alone = [Score(s.name, s.nll, n_tokens, n_tokens, ["g"] * 400) for s in (a, b)]
    by_clip = paired_difference([alone[0]], [alone[1]])
    widths = [found["high"] - found["low"] for found in (by_group, by_clip)]
    assert widths[0] == pytest.approx(widths[1] * 40**0.5, rel=0.1)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_paired_difference_of_few_clips_has_no_interval(n):
    n_tokens = np.full(n, 100)
    a, b = (Score(k, np.full(n, v), n_tokens, n_tokens, ["g"] * n) for k, v in (("a", 9), ("b", 8)))
    found = paired_difference([a], [b])
    assert found["nll_nats"] == pytest.approx(0.01) and found["n_drawn"] == n
    assert (found["low"] is None) == (found["high"] is None) == (n < 5)


def test_paired_difference_knows_that_seeds_differ():
    n_tokens, groups = np.full(40, 100), ["g"] * 40
    twin = [Score("t", np.full(40, nll), n_tokens, n_tokens, groups) for nll in (390.0, 410.0)]
    arm = Score("a", np.full(40, 395.0), n_tokens, n_tokens, groups)
    found = paired_difference([arm], twin)
    assert found["nll_nats"] == pytest.approx(-0.05)
    assert (found["low"], found["high"]) == pytest.approx((-0.15, 0.05))


def test_decoded_mel_on_the_fly_equals_the_prepared_one(prepared):
    dataset = Dataset(prepared)
    split = dataset.split("valid")
    stored = split.mel.pop("decoded-1")
    made = with_decoded_mel(split, codec_of(dataset), MelFrontend(dataset.mel_config), 1).mel[
        "decoded-1"
    ]
    # Prepared in one thread, decoded here in all: float32 rounding, and a float16 step at most.
    np.testing.assert_allclose(made.astype(np.float32), stored, rtol=2e-3, atol=1e-3)


def test_codec_ceiling_is_lower_with_more_codebooks(prepared):
    dataset = Dataset(prepared)
    one, all_of_them = codec_ceiling(
        dataset.split("valid"), codec_of(dataset), MelFrontend(dataset.mel_config)
    )
    assert (one["codebooks"], all_of_them["codebooks"]) == (1, 8)
    assert 0 < all_of_them["log_mel_error_db"] < one["log_mel_error_db"] < 40


def test_eval_command_prints_every_row(tiny_run, capsys):
    from wgpt.cli import main

    assert main(["eval", str(tiny_run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [row["model"] for row in result["rows"] if row["group"] == "all"]
    assert names == ["uniform", "unigram", "bigram", "hybrid-xs (teacher-forced)",
                     "hybrid-xs (closed loop)"]  # fmt: skip
    n_tokens = {row["n_tokens"] for row in result["rows"] if row["group"] == "all"}
    assert n_tokens == {Dataset(result["data"]).split("valid").n_steps}
    assert result["codebooks"] == [] and result["rollout"] is None
    assert main(["eval", str(tiny_run)]) == 0
    assert capsys.readouterr().out.count("\n|") >= 6
    assert main(["eval", str(tiny_run.parent / "nothing")]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
