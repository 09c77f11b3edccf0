"""The paper's comparison in small: every arm on the same data, resumed, collected, checked."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from wgpt.cli import main
from wgpt.data.dataset import SHUFFLED, Dataset, Split
from wgpt.errors import ConfigError, DataError, Interrupted, TrainError
from wgpt.evaluation.scores import Score
from wgpt.experiments import collected
from wgpt.experiments import study as studies
from wgpt.experiments.arms import PLANS, Arm
from wgpt.experiments.study import study
from wgpt.experiments.study_tables import as_markdown
from wgpt.files import locked
from wgpt.runs.run import Run

TINY = {
    "max_steps": 2,
    "batch_size": 2,
    "context_s": 0.5,
    "warmup_steps": 0,
    "eval_every": 1,
    "device": "cpu",
}
ARMS = ["tokens", "hybrid", "decoded-1"]


def seeds(plan, n):
    """The plan with n seeds of each arm."""
    return dataclasses.replace(
        plan, arms=tuple(dataclasses.replace(arm, n_seeds=n) for arm in plan.arms)
    )


@pytest.fixture(scope="module")
def studied(prepared, tmp_path_factory):
    """(folder, result) of a study of two steps an arm, two seeds each."""
    out = tmp_path_factory.mktemp("study") / "s"
    return out, study(prepared, out, seeds(PLANS["quick"], 2), **TINY)


def nll_of(result, model, group="all"):
    (row,) = (r for r in result["rows"] if (r["model"], r["group"]) == (model, group))
    return row["nll_nats"]


def test_study_trains_every_arm_and_seed_alike(studied, prepared):
    out, result = studied
    assert list(result["arms"]) == ARMS  # the data have no decoded-8
    assert result["missing"] == []
    for arm in ARMS:
        for seed in (0, 1):
            run = Run.open(out / "runs" / f"{arm}-{seed}")
            assert {name: getattr(run.config, name) for name in TINY} == TINY
            assert (run.config.seed, run.model.dropout) == (seed, 0.1)
            assert (run.model.mel_dim > 0) == (arm != "tokens")
            assert run.config.mel_source == ("decoded-1" if arm == "decoded-1" else "wave")
    n_steps = Dataset(prepared).split("valid").n_steps
    assert {row["n_tokens"] for row in result["rows"]} == {n_steps}
    assert [row["model"] for row in result["rows"]] == ["uniform", "unigram", "bigram", *ARMS]


def test_study_scores_are_means_over_seeds(studied):
    _, result = studied
    for name, arm in result["arms"].items():
        assert arm["seeds"] == [0, 1] and len(set(arm["nll_nats_by_seed"])) == 2
        assert nll_of(result, name) == pytest.approx(np.mean(arm["nll_nats_by_seed"]))
        assert (arm["closed_loop_nll_nats"] is None) == (name == "tokens")
    # What it reads is what a closed loop gives it.
    control = result["arms"]["decoded-1"]
    assert control["closed_loop_nll_nats"] == pytest.approx(nll_of(result, "decoded-1"), abs=1e-9)
    assert result["arms"]["hybrid"]["closed_loop_nll_nats"] != nll_of(result, "hybrid")


def test_study_gaps_are_the_arm_minus_its_twin(studied):
    _, result = studied
    assert [gap["arm"] for gap in result["gaps"]] == ["hybrid", "decoded-1"]
    for gap in result["gaps"]:
        expected = nll_of(result, gap["arm"]) - nll_of(result, "tokens")
        assert gap["nll_nats"] == pytest.approx(expected, abs=1e-9)
        assert abs(expected) > 1e-4, "too close to tell a swapped sign"
        assert (gap["low"], gap["high"], gap["drawn"]) == (None, None, "clips")  # too few
        assert gap["n_seeds"] == [2, 2]


def test_study_writes_what_it_returns(studied):
    out, result = studied
    assert json.loads((out / "study.json").read_text()) == json.loads(json.dumps(result))
    said = as_markdown(result)
    assert (out / "study.md").read_text() == said + "\n"
    page = (out / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "<!--" not in page
    for gap in result["gaps"]:
        shown = f"{gap['nll_nats']:+.3f} ({gap['n_drawn']} clips: too few)"
        assert shown in page and shown in said
    for sentence in result["conclusions"]:
        assert sentence in said


def test_study_that_is_done_trains_nothing(studied, prepared, monkeypatch):
    out, result = studied
    files = {path: path.read_bytes() for path in (out / "scores").iterdir()}
    monkeypatch.setattr(studies, "train", None)
    again = study(prepared, out, seeds(PLANS["quick"], 2), **TINY)
    assert again == result
    assert files == {path: path.read_bytes() for path in (out / "scores").iterdir()}
    assert study(prepared, out, seeds(PLANS["quick"], 2), collect=True, **TINY) == result


def test_study_goes_on_where_it_was_interrupted(studied, prepared, tmp_path, monkeypatch):
    """Stopped inside the second run, then in parts, in another order: the same scores."""
    plan = seeds(PLANS["quick"], 2)
    whole, _ = studied
    trained = []

    def stopping(data, folder, *args, **options):
        if not options.get("dry_run"):
            trained.append(folder.name)
            if len(trained) == 2:
                train(data, folder, *args, **{**options, "max_steps": 1})  # a step is committed
                raise Interrupted("stopped")
        return train(data, folder, *args, **options)

    train = studies.train
    monkeypatch.setattr(studies, "train", stopping)
    with pytest.raises(Interrupted):
        study(prepared, tmp_path, plan, only=["hybrid:0", "tokens"], **TINY)
    assert trained == ["tokens-0", "tokens-1"]
    monkeypatch.setattr(studies, "train", train)
    part = study(prepared, tmp_path, plan, only=["hybrid:0", "tokens"], **TINY)
    assert part["missing"] == ["hybrid:1", "decoded-1:0", "decoded-1:1"]
    assert "Not there: hybrid:1, decoded-1:0, decoded-1:1." in as_markdown(part)
    result = study(prepared, tmp_path, plan, **TINY)
    assert result["missing"] == []
    for path in (whole / "scores").iterdir():
        one, other = (json.loads((f / "scores" / path.name).read_text())["scores"]["forced"]
                      for f in (whole, tmp_path))  # fmt: skip
        assert one == other


def test_a_study_sweeps_and_writes_tables_under_a_lock(studied, prepared, monkeypatch):
    """Else it would remove what another process is just writing."""
    out, _ = studied
    is_locked = []

    def locks(folder, *args):
        with pytest.raises(ConfigError, match="is being collected"), locked(out, "collected"):
            pass
        is_locked.append(folder)
        return {"missing": []}

    monkeypatch.setattr(studies, "remove_leftovers", locks)
    monkeypatch.setattr(collected, "collect", locks)
    study(prepared, out, seeds(PLANS["quick"], 2), collect=True, **TINY)
    assert len(is_locked) == len(collected.TABLES) + 1


def test_an_arm_that_fails_stops_no_other(prepared, tmp_path, monkeypatch, capsys):
    train = studies.train

    def failing(data, folder, *args, **options):
        if folder.name == "tokens-0" and not options.get("dry_run"):
            raise MemoryError
        return train(data, folder, *args, **options)

    command = ["study", str(prepared), "--out", str(tmp_path), "--arms", "tokens", "decoded-1",
               "--device=cpu", "--max-steps=1", "--batch-size=1", "--context-s=0.2"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(studies, "train", failing)
        assert main(command) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("wgpt study: 1 runs failed, all others are done; ")
    assert "tokens:0: out of memory" in said
    result = json.loads((tmp_path / "study.json").read_text())
    assert list(result["arms"]) == ["decoded-1"] and result["missing"] == ["tokens:0"]
    assert main(command) == 0
    assert json.loads((tmp_path / "study.json").read_text())["missing"] == []


def test_a_study_where_all_fails_says_so(prepared, tmp_path, monkeypatch):
    def failing(*args, dry_run=False, **options):
        if dry_run:
            return {"step_s": 1.0}
        raise TrainError("step 1: not finite")

    monkeypatch.setattr(studies, "train", failing)
    with pytest.raises(TrainError, match=r"3 runs failed.*tokens:0: step 1: not finite; hybrid:0"):
        study(prepared, tmp_path, **TINY)


def test_study_dry_run_says_what_and_how_long(prepared, tmp_path, caplog):
    with caplog.at_level("INFO", "wgpt"):
        said = study(prepared, tmp_path / "s", dry_run=True, arms=["hybrid", "decoded-8"], **TINY)
    assert said["runs"] == ["hybrid:0"] and said["step_s"]["hybrid"] > 0
    assert "hybrid, seed 0: tokens and mel of the true audio; at most" in caplog.text
    assert "decoded-8: left out; prepare the data with --mel-sources ... decoded-8" in caplog.text
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("late", [1, -1])
def test_study_exposes_mel_beside_the_wrong_step(prepared, tmp_path, monkeypatch, late):
    """Slices a step late in the dataset class tell the model its answer: nothing is trained."""
    whole = Split.slice

    def shifted(self, i, start, stop, mel_source=None):
        tokens, _ = whole(self, i, start, stop)
        if mel_source is None:
            return tokens, None
        at = (np.arange(start, stop) + late).clip(0, self.clip_steps(i) - 1) + self.offsets[i]
        return tokens, torch.from_numpy(self.mel[mel_source][at].astype(np.float32))

    monkeypatch.setattr(Split, "slice", shifted)
    where = "1 step(s) after it" if late > 0 else "1 step(s) before it"
    with pytest.raises(DataError, match=re.escape(where)) as caught:
        study(prepared, tmp_path / "s", arms=["hybrid"], **TINY)
    assert ("told what it is to predict" in str(caught.value)) == (late > 0)
    assert not (tmp_path / "s" / "runs").exists()


def test_leak_check_tells_nothing_of_sound_that_does_not_change(prepared, monkeypatch, caplog):
    from wgpt import codec
    from wgpt.audio.mel import MelFrontend
    from wgpt.experiments.leak_check import leak_check

    data = Dataset(prepared)
    split = data.split("valid")
    split.mel["wave"] = np.zeros_like(split.mel["wave"])
    found = leak_check(split, "wave", codec.load("mini"), MelFrontend(data.mel_config), 50)
    assert max(found.values()) < 1.02 * min(found.values())
    assert "nothing can be told of such sound" in caplog.text or min(found, key=found.get) == 0


def test_shuffled_mel_is_that_of_other_sound(prepared):
    data = Dataset(prepared)
    split = data.split("train")
    wave, shuffled = (split.clip(0, source)[1].numpy() for source in ("wave", SHUFFLED))
    half = split.n_steps // 2
    every = np.asarray(split.mel_array("wave"), dtype=np.float32)
    np.testing.assert_array_equal(shuffled, every[half : half + len(wave)])
    last = split.clip(split.n_clips - 1, SHUFFLED)[1].numpy()
    np.testing.assert_array_equal(last[-1], every[(split.n_steps - 1 + half) % split.n_steps])
    for one, other in zip(data.normalisation("wave"), data.normalisation(SHUFFLED), strict=True):
        assert torch.equal(one, other)


def scored(name, nll, groups):
    n_tokens = np.full(len(nll), 10)
    return Score(name, np.array(nll, float), n_tokens, n_tokens, groups)


def test_study_gaps_by_hand():
    twin = [scored("tokens", nll, ["a", "b"]) for nll in ([10, 20], [14, 20])]
    hybrid = [scored("hybrid", [8, 25], ["a", "b"])]
    found = collected.gaps({"tokens": twin, "hybrid": hybrid}, "tokens")
    assert [(gap["arm"], gap["group"]) for gap in found] == [
        ("hybrid", "all"), ("hybrid", "a"), ("hybrid", "b"),
    ]  # fmt: skip
    assert [gap["nll_nats"] for gap in found] == pytest.approx([0.05, -0.4, 0.5])
    assert [gap["n_seeds"] for gap in found] == [[1, 2]] * 3
    assert all(gap["low"] is gap["high"] is None for gap in found)  # two clips tell nothing
    assert collected.gaps({"hybrid": hybrid}, "tokens") == []  # nothing to compare with


def test_conclusions_say_what_the_interval_allows():
    def gap(arm, nats, low, high, group="all"):
        return {"arm": arm, "group": group, "nll_nats": nats, "low": low, "high": high,
                "drawn": "clips", "n_drawn": 3,
                "n_seeds": [1, 3] if arm == "leaky" else [3, 3]}  # fmt: skip

    said = collected.conclusions(
        [gap("hybrid", -0.1, -0.12, -0.08), gap("leaky", 0.2, 0.1, 0.3), gap("x", 0.1, -0.1, 0.3),
         gap("hybrid", 0.3, 0.2, 0.4, "music"), gap("y", 0.1, None, None)], "twin",
    )  # fmt: skip
    assert said == [
        "hybrid is better than twin by 0.100 nats (-0.120 to -0.080).",
        "leaky is worse than twin by 0.200 nats (+0.100 to +0.300); what another seed would give "
        "is not known.",
        "Between x and twin no difference is shown: +0.100 nats (-0.100 to +0.300).",
        "Too few clips, 3, to compare y with twin: +0.100 nats.",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "quik"}, "--plan must be one of quick, paper, got 'quik'; did you mean quick"),
        ({"arms": ["tokens", "decoded-7"]}, "the plan quick has tokens, hybrid, decoded-1"),
        ({"arms": ["decoded-8"]}, "no arm can be trained; prepare it with --mel-sources decoded-8"),
        ({"only": ["hybrid:1"]}, "--only must be some of tokens:0, hybrid:0, decoded-1:0"),
        ({"collect": True}, "holds no score yet"),
    ],
)
def test_study_refuses(prepared, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        study(prepared, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_study_refuses_other_settings_and_other_data(studied, prepared, tmp_path):
    out, _ = studied
    plan = seeds(PLANS["quick"], 2)
    with pytest.raises(ConfigError, match=r"holds a study whose train is .* name another --out"):
        study(prepared, out, plan, **{**TINY, "lr": 0.5})
    (other := tmp_path / "other").mkdir()
    for path in prepared.iterdir():
        (other / path.name).symlink_to(path)
    (other / "manifest.json").unlink()
    (other / "manifest.json").write_bytes((prepared / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="holds a study whose manifest_sha256 is"):
        study(other, out, plan, **TINY)
    with pytest.raises(ConfigError, match="holds a study whose manifest_sha256 is"):
        study(other, out, plan, collect=True, **TINY)
    with pytest.raises(ConfigError, match="holds a study whose plan is quick, this one's is paper"):
        study(prepared, out, "paper", collect=True, **TINY)
    (copied := tmp_path / "copied").mkdir()  # scores brought together from other data
    shutil.copytree(out / "scores", copied / "scores")
    with pytest.raises(ConfigError, match="of other data"):
        study(other, copied, plan, collect=True, **TINY)


def test_study_command_prints_the_table(prepared, tmp_path, capsys):
    command = ["study", str(prepared), "--out", str(tmp_path), "--arms", "tokens", "--device=cpu"]
    command += ["--max-steps=1", "--batch-size=1", "--context-s=0.2", "--dropout=0"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gaps"] == [] and list(result["arms"]) == ["tokens"]
    assert result["train"]["max_steps"] == 1 and result["model"] == {"dropout": 0.0}
    assert main([*command, "--collect"]) == 0
    assert "| tokens | 1.0" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_plan_of_the_paper_in_small(recordings, tmp_path):
    """Every arm of --plan paper trains, scores and stands in the table; one layer, one step."""
    from wgpt.data.pipeline import prepare

    data = tmp_path / "data"
    sources = ("wave", "decoded-1", "decoded-8", "leaky-1024", "leaky-2048")
    prepare(recordings, data, mel_sources=sources, valid_fraction=0.3, progress=False)
    result = study(
        data, tmp_path / "s", "paper", model={"n_layers": 1, "n_mel_layers": 1},
        **{**TINY, "max_steps": 1},
    )  # fmt: skip
    plan = PLANS["paper"]
    assert result["missing"] == []
    assert list(result["arms"]) == [arm.name for arm in plan.arms]
    assert {n: len(arm["seeds"]) for n, arm in result["arms"].items()} == {
        arm.name: arm.n_seeds for arm in plan.arms
    }
    has_loop = {name for name, arm in result["arms"].items() if arm["closed_loop_nll_nats"]}
    assert has_loop == {"hybrid", "decoded-1", "decoded-8", "leaky-1024", "leaky-2048"}


def test_plans_name_presets_and_a_twin_of_equal_size():
    from wgpt.model.presets import preset
    from wgpt.training.plan import n_parameters

    for plan in PLANS.values():
        assert plan.arm(plan.twin).mel_source is None
        twin, hybrid = (
            n_parameters(dataclasses.replace(preset(arm.preset), **arm.model))
            for arm in (plan.arm(plan.twin), plan.arm("hybrid"))
        )
        assert twin == pytest.approx(hybrid, rel=0.002)
        assert all(isinstance(arm, Arm) and arm.purpose for arm in plan.arms)
