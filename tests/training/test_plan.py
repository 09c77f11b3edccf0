"""`wgpt train` without flags: the plan for any audio, codec and machine, and its words."""

import dataclasses
import json
import shutil

import pytest

from wgpt.cli import main
from wgpt.config import ModelConfig, TrainConfig
from wgpt.data.dataset import Dataset
from wgpt.evaluation import evaluate
from wgpt.evaluation.scores import score
from wgpt.files import read_json
from wgpt.model import HybridModel
from wgpt.model.presets import preset
from wgpt.runs.run import Run
from wgpt.training import launch, plan, train
from wgpt.training.plan import Facts, describe, doubts, shape_for, steps_for

MINUTE = 60 * 75


def facts(minutes=15.0, **changes):
    known = {"start": "starter", "start_mel_source": "decoded-8"}
    defaults = {"train_steps": round(minutes * MINUTE), "valid_steps": MINUTE, "n_codebooks": 8,
                "mel_sources": ("wave", "decoded-8"), **known}  # fmt: skip
    return Facts(**{**defaults, **changes})


def planned(of, step_s=None, **given):
    chosen = shape_for(of)
    return chosen, TrainConfig(**steps_for(chosen, of, given, step_s))


def test_a_known_codec_starts_from_the_packaged_model():
    chosen, settings = planned(facts())
    assert chosen.preset is None and settings.init == "starter"
    assert settings.mel_source == "decoded-8" and chosen.model["end_of_clip"]
    assert settings.join_s == 60
    for other in (facts(start="", start_mel_source=""), facts(mel_sources=("wave",))):
        chosen, settings = planned(other)
        assert chosen.preset == "voice-xs" and settings.init == ""
    assert "--mel-sources decoded-8" in shape_for(facts(mel_sources=("wave",))).why
    shaped = shape_for(facts(), wants_shape=True)
    assert shaped.preset == "voice-xs" and "another shape than that of starter" in shaped.why


def test_size_and_codebooks_follow_audio_and_codec():
    for minutes, name in ((15, "voice-xs"), (179, "voice-xs"), (181, "voice"), (6000, "voice")):
        assert shape_for(facts(minutes, start="")).preset == name
    chosen, settings = planned(facts(start="", n_codebooks=4, mel_sources=("wave", "decoded-4")))
    assert chosen.model["n_fine"] == 3 and settings.mel_source == "decoded-4"
    alone = shape_for(facts(start="", n_codebooks=1, mel_sources=("wave",)))
    shape = dataclasses.replace(preset(alone.preset), **alone.model)
    assert (shape.n_fine, shape.latent_steps) == (0, 0)


@pytest.mark.parametrize("start", ["starter", ""])
def test_steps_follow_audio_and_never_take_too_long(start):
    epochs = []
    for minutes in (0.2, 2, 15, 95, 600, 6000):
        of = facts(minutes, start=start)
        _, settings = planned(of)
        epochs.append(settings.max_steps / plan.steps_per_epoch(of.train_steps, vars(settings)))
        assert settings.warmup_steps < settings.max_steps
        assert 10 <= settings.max_steps / settings.eval_every <= 30 or settings.max_steps < 40
        for step_s in (0.01, 1.0, 30.0):
            _, limited = planned(of, step_s)
            longest_s = max(plan.WORTH_IT_S, plan.WAIT_PER_AUDIO * minutes * 60)
            assert limited.max_steps <= settings.max_steps
            assert limited.max_steps * step_s <= 1.1 * longest_s or limited.max_steps == 10
    assert epochs[1:] == sorted(epochs[1:], reverse=True) and epochs[-1] >= 1.9
    assert planned(facts())[1].max_steps == pytest.approx(400, rel=0.1)


def test_what_is_given_goes_before_the_plan():
    _, settings = planned(facts(), 1.0, max_steps=60, lr=5e-4, eval_every=7, batch_size=2)
    assert (settings.max_steps, settings.lr, settings.eval_every) == (60, 5e-4, 7)
    assert settings.batch_size == 2 and settings.save_every == 3 and settings.warmup_steps == 3


def test_the_plan_in_words():
    words = describe(facts(), "from starter", preset("voice-xs"), TrainConfig(max_steps=390), 1.0)
    for part in ("15 min to train on, 60 s to validate", "from starter", "2.39 M parameters",
                 "8 codebooks", "3.4 s", "dropout 0.1", "390 steps", "6.5 minutes",
                 "5 validations"):  # fmt: skip
        assert part in words, part
    words = describe(facts(valid_steps=0), "", ModelConfig(), TrainConfig(), None)
    assert "the whole past" in words and "minutes" not in words and "last step" in words


def test_settings_that_cannot_work_are_doubted():
    assert doubts(TrainConfig(max_steps=400, warmup_steps=20), facts()) == []
    (warm,) = doubts(TrainConfig(max_steps=12), facts())
    assert "--warmup-steps 100 is no shorter than the run of 12 steps" in warm
    (short,) = doubts(TrainConfig(max_steps=1, warmup_steps=1), facts())
    assert short.endswith("--warmup-steps 0 would")  # not what was just refused
    (often,) = doubts(TrainConfig(max_steps=2000), facts(15))
    assert "178 times" in often
    (blind,) = doubts(TrainConfig(max_steps=400), facts(valid_steps=0))
    assert "no validation data" in blind


@pytest.fixture
def quick(monkeypatch):
    """Windows of a third of a second, so that planned trainings are short."""
    monkeypatch.setattr(plan, "BATCH_SIZE", 2)
    monkeypatch.setattr(plan, "CONTEXT_STEPS", 24)


def test_train_without_flags_states_its_plan_and_trains(prepared, tmp_path, quick, caplog, capsys):
    caplog.set_level("INFO")
    out = tmp_path / "run"
    command = ["train", f"--data={prepared}", f"--out={out}", "--max-steps=4", "--sample-s=0"]
    assert main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert not out.exists()
    assert "start: from scratch" in dry
    assert "4 steps of 2 windows" in dry and "minutes on this machine" in dry
    assert main(command) == 0
    said = [record.getMessage() for record in caplog.records]
    stated = next(i for i, line in enumerate(said) if line.startswith("start: from scratch"))
    assert stated < next(i for i, line in enumerate(said) if "step 0: validation" in line)
    run = Run.open(out)
    assert (run.preset, run.model.end_of_clip, run.model.window_steps) == ("voice-xs", True, 256)
    assert run.config.mel_source == "wave" and run.config.max_steps == 4


def test_train_without_flags_goes_on_from_a_model_that_knows_the_codec(
    prepared, tiny_run, tmp_path, quick, monkeypatch
):
    """Its weights, and an output more for the end of a clip."""
    monkeypatch.setattr(launch, "NAME", str(tiny_run))  # in place of the packaged one
    settings = {"max_steps": 1, "sample_s": 0.0, "eval_audio_s": 3.0, "device": "cpu"}
    train(prepared, tmp_path / "run", **settings)
    run = Run.open(tmp_path / "run")
    assert run.config.init == str(tiny_run) and run.config.mel_source == "wave"
    assert (run.preset, run.model.end_of_clip, run.model.dropout) == ("hybrid-xs", True, 0.2)
    scratch = train(prepared, tmp_path / "other", model={"n_layers": 1}, **settings)
    assert scratch["preset"] == "voice-xs" and not Run.open(tmp_path / "other").config.init


def test_a_run_trains_scores_and_is_evaluated_on_joined_clips(prepared, tmp_path, quick):
    """The presets of the paper keep clips apart."""
    settings = {"sample_s": 0.0, "device": "cpu", "eval_audio_s": 2.0, "max_steps": 1}
    small = {"n_layers": 1, "n_mel_layers": 1}
    train(prepared, tmp_path / "voice", model=small, **settings)
    run = Run.open(tmp_path / "voice")
    apart, together = Dataset(prepared).split("valid"), run.dataset().split("valid")
    assert together.n_clips < apart.n_clips and together.n_steps == apart.n_steps
    result = evaluate(tmp_path / "voice", prepared)
    model, steps = HybridModel.from_pretrained(run.model_folder), run.config.context_steps
    nll = {
        split: score("", model, split, context_steps=steps).row()["nll_nats"]
        for split in (together, apart)
    }
    row = next(row for row in result["rows"] if "teacher-forced" in row["model"])
    assert row["nll_nats"] == pytest.approx(nll[together]) != pytest.approx(nll[apart])
    assert TrainConfig().join_s == 0


def test_the_plan_is_measured_on_a_model_of_its_own(prepared, tmp_path, quick, monkeypatch):
    """The timed steps leave no trace: two runs of the same plan are the same."""
    monkeypatch.setattr(launch, "_time_steps", lambda job: (50.0, 1))
    settings = {"sample_s": 0.0, "device": "cpu", "eval_audio_s": 2.0}
    small = {"n_layers": 1, "n_mel_layers": 1}
    first = train(prepared, tmp_path / "a", model=small, **settings)
    assert first["steps"] <= 10
    monkeypatch.undo()
    monkeypatch.setattr(plan, "BATCH_SIZE", 2)
    monkeypatch.setattr(plan, "CONTEXT_STEPS", 24)
    settings["max_steps"] = Run.open(tmp_path / "a").config.max_steps
    train(prepared, tmp_path / "b", model=small, **settings)
    got, expected = ((tmp_path / n / "metrics.csv").read_bytes() for n in "ba")
    assert got == expected


def test_facts_of_data_know_a_model_of_their_codec(prepared, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "NAME", str(tiny_run))
    of = launch.facts_about(Dataset(prepared))
    assert (of.start, of.start_mel_source) == (str(tiny_run), "wave")
    other = shutil.copytree(prepared, tmp_path / "data")
    manifest = read_json(other / "manifest.json")
    manifest["codec"]["identity"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert launch.facts_about(Dataset(other)).start == ""
    assert of.mel_sources == ("wave", "decoded-1") and of.n_codebooks == 8


def test_dry_run_of_a_resumed_run_as_json(tiny_run, capsys):
    before = sorted(tiny_run.rglob("*"))
    command = ["train", f"--out={tiny_run}", "--resume", "--max-steps=50", "--dry-run", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["train"]["max_steps"] == 50 and "from step 3 of" in said["plan"]
    assert sorted(tiny_run.rglob("*")) == before and Run.open(tiny_run).config.max_steps == 3
