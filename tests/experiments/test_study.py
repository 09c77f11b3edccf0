"""The paper's comparison in small: every arm on the same data, signs of the gaps, the table."""

import json

import numpy as np
import pytest

from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.evaluation.scores import Score
from wgpt.experiments import study
from wgpt.runs.run import Run

TINY = {
    "max_steps": 2,
    "batch_size": 2,
    "context_s": 0.5,
    "warmup_steps": 0,
    "sample_s": 0.0,
    "seed": 3,
}


@pytest.fixture(scope="module")
def studied(prepared, tmp_path_factory):
    """(folder, result) of a study of two steps an arm."""
    out = tmp_path_factory.mktemp("study")
    return out, study.study(prepared, out, device="cpu", **TINY)


def nll_of(result, model, group="all"):
    (row,) = (r for r in result["rows"] if (r["model"], r["group"]) == (model, group))
    return row["nll_nats"]


def test_study_trains_every_arm_alike(studied, prepared):
    out, result = studied
    assert list(result["arms"]) == ["tokens", "hybrid", "decoded-1"]
    runs = {arm: Run.open(out / arm) for arm in result["arms"]}
    assert {arm: run.model.mel_dim > 0 for arm, run in runs.items()} == {
        "tokens": False, "hybrid": True, "decoded-1": True,
    }  # fmt: skip
    assert runs["hybrid"].config.mel_source == "wave"
    assert runs["decoded-1"].config.mel_source == "decoded-1"
    for run in runs.values():
        assert {name: getattr(run.config, name) for name in TINY} == TINY
    n_steps = Dataset(prepared).split("valid").n_steps
    assert {row["n_tokens"] for row in result["rows"] if row["group"] == "all"} == {n_steps}
    names = [row["model"] for row in result["rows"] if row["group"] == "all"]
    assert names == ["uniform", "unigram", "bigram", "tokens", "hybrid", "decoded-1"]


def test_study_gaps_are_the_arm_minus_its_twin(studied):
    _, result = studied
    assert [gap["arm"] for gap in result["gaps"]] == ["hybrid", "decoded-1"]
    for gap in result["gaps"]:
        expected = nll_of(result, gap["arm"]) - nll_of(result, "tokens")
        assert gap["nll_nats"] == pytest.approx(expected, abs=1e-9)
        assert abs(expected) > 1e-4, "too close to tell a swapped sign"
        assert gap["low"] <= gap["nll_nats"] <= gap["high"]


def test_study_gaps_by_hand():
    def score(name, nll):
        n_tokens = np.array([10, 10])
        return Score(name, np.array(nll), n_tokens, n_tokens, ["a", "b"])

    scores = [score("bigram", [50.0, 50.0]), score("tokens", [10.0, 20.0]),
              score("hybrid", [8.0, 25.0])]  # fmt: skip
    found = study.gaps({one.name: one for one in scores})
    assert [(gap["arm"], gap["group"]) for gap in found] == [
        ("hybrid", "all"), ("hybrid", "a"), ("hybrid", "b"),
    ]  # fmt: skip
    assert [gap["nll_nats"] for gap in found] == pytest.approx([0.15, -0.2, 0.5])
    assert (found[1]["low"], found[1]["high"]) == pytest.approx((-0.2, -0.2))  # one clip
    assert study.gaps({"hybrid": scores[2]}) == []  # nothing to compare with


def test_study_table_shows_better_as_minus():
    row = {"model": "hybrid", "group": "all", "nll_nats": 3.25, "accuracy": 0.25,
           "perplexity": 25.79, "bits_per_s": 351.6, "n_tokens": 4000}  # fmt: skip
    gaps = [
        {"arm": "hybrid", "group": "speech", "nll_nats": -0.25, "low": -0.3, "high": -0.2},
        {"arm": "decoded-1", "group": "all", "nll_nats": 0.125, "low": 0.1, "high": 0.15},
    ]
    shown = study.as_markdown({"rows": [row], "gaps": gaps}).splitlines()
    assert "| hybrid | all | 3.250 | 25.00 % | 25.79 | 352 | 4000 |" in shown
    assert "| hybrid | speech | -0.250 | -0.300 to -0.200 |" in shown
    assert "| decoded-1 | all | +0.125 | +0.100 to +0.150 |" in shown
    assert "minus that of the token-only twin" in "\n".join(shown)
    assert "twin" not in study.as_markdown({"rows": [row], "gaps": []})


def test_study_writes_what_it_returns(studied):
    out, result = studied
    assert json.loads((out / "study.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "study.md").read_text() == study.as_markdown(result) + "\n"
    assert (out / "loss.png").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "xxl"}, "size must be one of xs, s, got 'xxl'"),
        ({"arms": ["tokens", "decoded-7"]}, "arms must be some of tokens, hybrid, decoded-1"),
    ],
)
def test_study_refuses(prepared, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        study.study(prepared, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_study_command_prints_the_table(prepared, tmp_path, capsys):
    from wgpt.cli import main

    command = ["study", str(prepared), "--out", str(tmp_path), "--arms", "tokens", "--device=cpu"]
    command += ["--max-steps=1", "--batch-size=1", "--context-s=0.2"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gaps"] == [] and list(result["arms"]) == ["tokens"]
    assert result["settings"]["max_steps"] == 1
