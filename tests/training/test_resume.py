"""A run can be changed on the way, and every command that a message names works."""

import os
import re
import shlex
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from wgpt import commits
from wgpt.cli import main
from wgpt.data import prepare
from wgpt.data.dataset import Dataset
from wgpt.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainError
from wgpt.files import locked, read_json, write_sealed
from wgpt.model import HybridModel
from wgpt.runs.metrics import read_metrics
from wgpt.runs.run import Run
from wgpt.training import plan, train
from wgpt.training.record import RunRecord
from wgpt.training.step import TrainingStep
from wgpt.training.trainer import Trainer

SETTINGS = {
    "max_steps": 4,
    "batch_size": 2,
    "context_s": 0.32,
    "warmup_steps": 2,
    "eval_every": 2,
    "eval_audio_s": 2.0,
    "save_every": 2,
    "sample_s": 0.0,
    "device": "cpu",
}
SHORT = ["--max-steps=1", "--context-s=0.32", "--batch-size=2", "--sample-s=0", "--warmup-steps=1",
         "--eval-audio-s=2", "--device=cpu"]  # fmt: skip
TINY = {"n_layers": 1, "ffn_dim": 64, "dropout": 0.1}


def start(prepared, out, **changes):
    return train(prepared, out, "gpt-xs", model=TINY, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def done(prepared, tmp_path_factory):
    """A finished run of 4 steps."""
    out = tmp_path_factory.mktemp("resume") / "run"
    start(prepared, out)
    return out


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def command_in(message, tmp_path, *more):
    """The arguments of the command line that a message names, to run with a few more."""
    words = shlex.split(re.search(r"wgpt (train .*)$", str(message)).group(1))
    return [str(tmp_path / "new") if word == "NEW" else word for word in words] + list(more)


def train_rows(run):
    return [row for row in read_metrics(run / "metrics.csv") if row["split"] == "train"]


def test_a_run_is_extended(run, prepared, tmp_path):
    assert train(None, run, resume=True, max_steps=8)["steps"] == 8
    rows = train_rows(run)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    opened = Run.open(run)
    assert opened.config.max_steps == 8
    assert opened.changes == ({"from_step": 4, "changed": {"max_steps": [4, 8]}},)
    # The steps before are those of the first run, those after those of its new schedule.
    longer = tmp_path / "longer"
    start(prepared, longer, max_steps=8)
    assert [row["lr"] for row in rows[4:]] == [row["lr"] for row in train_rows(longer)[4:]]
    assert rows[3]["lr"] != train_rows(longer)[3]["lr"]


def test_every_change_is_recorded_with_its_step_and_takes_effect(run):
    train(None, run, resume=True, max_steps=6, lr=1e-4)
    train(None, run, resume=True, max_steps=8, batch_size=4, model={"dropout": 0.0})
    opened = Run.open(run)
    assert [change["from_step"] for change in opened.changes] == [4, 6]
    assert opened.changes[1]["changed"] == {
        "max_steps": [6, 8], "batch_size": [2, 4], "dropout": [0.1, 0.0],
    }  # fmt: skip
    assert (opened.config.lr, opened.config.batch_size, opened.model.dropout) == (1e-4, 4, 0.0)
    rates = [float(row["lr"]) for row in train_rows(run)]
    assert max(rates[:4]) == 1e-3 and max(rates[4:]) < 1e-4
    assert train(None, run, resume=True, max_steps=8, lr=1e-4)["steps"] == 8
    assert len(Run.open(run).changes) == 2  # what is as it was is no change


def test_a_changed_run_that_is_killed_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    other = shutil.copytree(run, tmp_path / "other")
    change = {"max_steps": 12, "lr": 3e-3, "batch_size": 4, "patience": 2}
    train(None, run, resume=True, **change)
    step = Trainer._step

    def fatal(self, number, batch):
        if number == 9:
            raise Killed
        return step(self, number, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_step", fatal)
        train(None, other, resume=True, **change)
    train(None, other, resume=True)
    for name in ("metrics.csv", "config.json", "model/model.safetensors"):
        assert (other / name).read_bytes() == (run / name).read_bytes(), name


def test_train_extends_from_the_command_line(run, capsys):
    assert main(["train", f"--out={run}", "--resume", "--max-steps=6"]) == 0
    assert len(train_rows(run)) == 6
    assert main(["train", f"--out={run}", "--resume", "--max-steps=5"]) == 2
    assert "--max-steps must be at least 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "model", "settings"),
    [
        (None, {"n_layers": 2}, {}),
        (None, {"n_fine": 2}, {}),
        (None, {}, {"seed": 5}),
        (None, {}, {"init": "starter"}),
        ("gpt-s", {}, {}),
    ],
    ids=str,
)
def test_another_model_is_refused_with_a_command_that_makes_it(
    prepared, run, tmp_path, preset, model, settings
):
    with pytest.raises(ConfigError, match="another") as refused:
        train(None, run, preset, resume=True, model=model, max_steps=6, **settings)
    assert Run.open(run).changes == () and len(train_rows(run)) == 4
    if "init" in settings:  # starter wants data that its codec made, with its mel
        assert "from nothing to starter" in str(refused.value)
        assert f"--data {prepared} --out NEW --init starter" in str(refused.value)
        return
    assert main(command_in(refused.value, tmp_path, *SHORT)) == 0
    made = Run.open(tmp_path / "new")
    assert preset in (None, made.preset)
    assert all(getattr(made.model, name) == value for name, value in model.items())
    assert all(getattr(made.config, name) == value for name, value in settings.items())


def test_mel_source_is_refused_with_a_command_that_goes_on_from_the_run(prepared, tmp_path):
    out = tmp_path / "run"
    shape = {"n_layers": 1, "n_mel_layers": 1, "ffn_dim": 64, "mel_ffn_dim": 64}
    train(prepared, out, "hybrid-xs", model=shape, **{**SETTINGS, "max_steps": 1})
    with pytest.raises(ConfigError, match="--mel-source from wave to decoded-1") as refused:
        train(None, out, resume=True, mel_source="decoded:1")
    assert main(command_in(refused.value, tmp_path, *SHORT)) == 0
    assert Run.open(tmp_path / "new").config.mel_source == "decoded-1"


def test_a_run_whose_first_step_fails_goes_on_as_its_message_says(prepared, tmp_path, monkeypatch):
    out, hidden = tmp_path / "run", HybridModel.hidden

    def broken(self, *args, **options):
        return hidden(self, *args, **options) * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(HybridModel, "hidden", broken)
        with pytest.raises(TrainError, match="lower rate") as failed:
            start(prepared, out)
    assert main(command_in(failed.value, tmp_path)) == 0
    rows = read_metrics(out / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert Run.open(out).config.lr == pytest.approx(3e-4)


def test_a_run_that_never_began_is_resumed_from_the_start(prepared, done, tmp_path, monkeypatch):
    """A failure before step 1 leaves a folder with config.json alone."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "fit", lambda *_: (_ for _ in ()).throw(MemoryError()))
        start(prepared, out)
    shutil.copytree(out, again := tmp_path / "again")
    train(prepared, out, "gpt-xs", resume=True, model=TINY, **SETTINGS)
    start(prepared, again)
    for folder in (out, again):
        assert (folder / "metrics.csv").read_bytes() == (done / "metrics.csv").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        start(prepared, out)


def test_resume_of_nothing_begins(prepared, done, tmp_path, caplog):
    out = tmp_path / "run"
    train(prepared, out, "gpt-xs", resume=True, model=TINY, **SETTINGS)
    assert (out / "metrics.csv").read_bytes() == (done / "metrics.csv").read_bytes()
    with pytest.raises(ConfigError, match="no such file"):
        train(None, tmp_path / "none", resume=True)


def test_what_is_derived_is_made_again_from_the_last_step(run, done):
    """At max_steps, where no step is left to write anything."""
    for name in ("config.json", "model/config.json", "metrics.csv", "plots/loss.png"):
        (run / name).unlink()
    (run / "model" / "model.safetensors").write_bytes(b"torn")
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / ".step-4.1.old")
    train(None, run, resume=True)
    for path in (p for p in done.rglob("*") if p.is_file() and p.suffix != ".png"):
        assert (run / path.relative_to(done)).read_bytes() == path.read_bytes(), path
    assert {p.relative_to(run) for p in run.rglob("*")} == {
        p.relative_to(done) for p in done.rglob("*")
    }


def test_a_sample_that_a_kill_took_is_made(prepared, tmp_path, monkeypatch):
    settings = {"sample_every": 2, "sample_s": 0.2}
    start(prepared, whole := tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(RunRecord, "sample", lambda *_: (_ for _ in ()).throw(MemoryError()))
        start(prepared, out := tmp_path / "out", **settings)
    train(None, out, resume=True)
    name = "samples/step-00000002.wav"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_other_data_are_refused_with_a_command_that_begins_on_them(
    prepared, recordings, run, tmp_path
):
    more = shutil.copytree(recordings, tmp_path / "recordings")
    (more / "0.wav").rename(more / "again.wav")
    prepare(more, tmp_path / "other", valid_fraction=0.3, progress=False,
            mel_sources=("wave", "decoded-1"))  # fmt: skip
    before = (run / "config.json").read_bytes()
    with pytest.raises(DataError, match=r"is not what .* was trained on") as refused:
        train(tmp_path / "other", run, resume=True, max_steps=6)
    assert (run / "config.json").read_bytes() == before
    assert main(command_in(refused.value, tmp_path, *SHORT)) == 0


def test_another_environment_is_told_once(run, caplog, restore_threads):
    state = commits.list_steps(run / "checkpoints")[-1] / "state.json"
    facts = read_json(state)
    facts["environment"]["torch"] = "1.0"
    write_sealed(state, facts)
    train(None, run, resume=True)
    told = [r.getMessage() for r in caplog.records if "bits" in r.getMessage()]
    assert len(told) == 1 and "torch: was 1.0 when step 4 was committed" in told[0]


def test_an_update_that_is_not_finite_is_never_committed(prepared, tmp_path, monkeypatch):
    step, out = TrainingStep.__call__, tmp_path / "run"

    def poisoning(self, number, batch):
        result = step(self, number, batch)
        if number == 4:
            next(self.model.parameters()).data[0] = float("inf")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", poisoning)
        with pytest.raises(TrainError, match="not finite; the step is not committed") as failed:
            start(prepared, out)
    assert commits.newest_step(out / "checkpoints") == 2
    assert main(command_in(failed.value, tmp_path)) == 0
    assert commits.newest_step(out / "checkpoints") == 4


def test_a_full_disk_is_said_with_what_is_safe(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(commits.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        said = r"needs \d+ bytes, and the disk has 1000 left.*all up to .*step-00000004 is safe"
        with pytest.raises(TrainError, match=said) as full:
            train(None, run, resume=True, max_steps=6)
    assert main(command_in(full.value, tmp_path)) == 0
    assert commits.newest_step(run / "checkpoints") == 6


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_schedulers_signals_commit_the_step(prepared, tmp_path, monkeypatch, name):
    step = Trainer._step

    def signalled(self, number, batch):
        signal.raise_signal(getattr(signal, name))
        return step(self, number, batch)

    monkeypatch.setattr(Trainer, "_step", signalled)
    with pytest.raises(Interrupted, match="stopped at step 1 of 4"):
        start(prepared, tmp_path / "run")
    assert commits.newest_step(tmp_path / "run" / "checkpoints") == 1


def test_a_run_that_began_from_another_begins_from_it_again(prepared, done, tmp_path, monkeypatch):
    expected, out = tmp_path / "expected", tmp_path / "run"
    settings = {**SETTINGS, "init": str(done), "max_steps": 2}
    train(prepared, expected, **settings)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "fit", lambda *_: (_ for _ in ()).throw(MemoryError()))
        train(prepared, out, **settings)
    train(None, out, resume=True)
    assert (out / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()


def test_a_batch_that_cannot_be_dealt_leaves_no_folder(prepared, run, tmp_path, monkeypatch):
    from wgpt.training import launch
    from wgpt.training.distributed import ProcessGroup

    monkeypatch.setattr(launch.ProcessGroup, "join", staticmethod(lambda _: ProcessGroup(0, 3)))
    with pytest.raises(ConfigError, match="divisible by the 3 processes"):
        start(prepared, tmp_path / "none", batch_size=8)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="divisible by the 3 processes"):
        train(None, run, resume=True, batch_size=8)
    assert Run.open(run).changes == ()


def test_ctrl_c_and_patience_name_commands_that_go_on(prepared, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "a run"
    step = Trainer._step

    def interrupting(self, number, batch):
        self.stop.came = number == 1
        return step(self, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupting)
        with pytest.raises(Interrupted) as stopped:
            start(prepared, out, patience=1, max_steps=40, lr=5.0)
    assert main(command_in(stopped.value, tmp_path)) == 0
    ended = len(train_rows(out))
    assert ended < 40
    message = next(r.getMessage() for r in caplog.records if "more patience" in r.getMessage())
    assert main(command_in(message, tmp_path)) == 0
    assert len(train_rows(out)) > ended
    assert Run.open(out).config.patience == 2


def test_checkpoints_all_damaged_can_be_left_behind(run):
    for path in commits.list_steps(run / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"delete .*/checkpoints, and --resume starts") as e:
        train(None, run, resume=True)
    shutil.rmtree(re.search(r"delete (\S+/checkpoints),", str(e.value)).group(1))
    assert train(None, run, resume=True)["steps"] == 4
    assert len(train_rows(run)) == 4


def test_a_second_process_is_kept_out_of_a_run(run):
    with (
        locked(run, "trained"),
        pytest.raises(ConfigError, match=rf"is being trained by process {os.getpid()} \("),
    ):
        train(None, run, resume=True, max_steps=6)
    assert Run.open(run).changes == ()


def test_data_that_moved_are_named_by_flag(prepared, run, tmp_path):
    description = read_json(run / "config.json")
    description["data"]["path"] = str(tmp_path / "gone")
    write_sealed(run / "config.json", description)
    with pytest.raises(DataError, match="with --data"):
        train(None, run, resume=True)
    assert train(prepared, run, resume=True)["steps"] == 4


def test_the_epoch_goes_on_through_changes_of_batch_and_window(run, prepared):
    n_steps = Dataset(prepared).split("train").n_steps

    def passes(context_s, n_windows):
        return n_windows / -(-n_steps // round(75 * context_s))

    train(None, run, resume=True, max_steps=6, batch_size=4)
    train(None, run, resume=True, max_steps=8, batch_size=1, context_s=0.64)
    got = [float(row["epoch"]) for row in train_rows(run)]
    expected = [passes(0.32, n) for n in (2, 4, 6, 8, 12, 16)]
    expected += [1 + passes(0.64, n) for n in (1, 2)]  # other windows begin with an epoch
    assert got == pytest.approx(expected) and 0 < expected[5] < 1


def memory_for(monkeypatch, n_positions):
    """More positions than these in a part of a batch, and the allocator fails."""
    score = HybridModel.score

    def failing(self, hidden, targets):
        if torch.is_grad_enabled() and targets.numel() > n_positions:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return score(self, hidden, targets)

    monkeypatch.setattr(HybridModel, "score", failing)


def test_windows_that_do_not_fit_name_a_command_that_works(prepared, tmp_path, monkeypatch):
    memory_for(monkeypatch, 13)  # not a window of 24 steps
    with pytest.raises(TrainError, match=r"step 1: out of memory.*Shorter windows") as refusal:
        start(prepared, tmp_path / "run")
    assert main(command_in(refusal.value, tmp_path)) == 0
    assert Run.open(tmp_path / "run").config.context_s == 0.16


def test_a_later_step_that_does_not_fit_names_a_command_that_works(run, monkeypatch):
    made = TrainingStep._backward

    def failing(self, batch, *rest):
        if self._fits and len(batch.tokens) > 1:
            raise MemoryError
        return made(self, batch, *rest)

    monkeypatch.setattr(TrainingStep, "_backward", failing)
    with pytest.raises(TrainError, match=r"step 6: out of memory .MemoryError.") as refusal:
        train(None, run, resume=True, max_steps=8)
    assert "smaller parts, 1 of its 2 windows at a time: " in str(refusal.value)
    assert "--accumulate 2" in str(refusal.value)
    assert main(command_in(refusal.value, run.parent)) == 0
    assert Run.open(run).config.accumulate == 2


@pytest.mark.parametrize("n_positions", [24, 13, 0])
def test_a_plan_finds_the_batch_that_fits(prepared, tmp_path, monkeypatch, n_positions):
    """In its timed steps; what does not fit at all leaves no run behind, and says what to add."""
    monkeypatch.setattr(plan, "BATCH_SIZE", 4)
    monkeypatch.setattr(plan, "CONTEXT_STEPS", 24)
    memory_for(monkeypatch, n_positions)
    command = ["train", f"--data={prepared}", f"--out={tmp_path / 'run'}", "--max-steps=1",
               "--sample-s=0", "--eval-audio-s=2", "--device=cpu", "--n-layers=1"]  # fmt: skip
    if n_positions < 24:
        with pytest.raises(TrainError, match="Shorter windows: the same command with") as refusal:
            train(prepared, tmp_path / "run", max_steps=1, model={"n_layers": 1})
        assert not (tmp_path / "run").exists()
        flags = str(refusal.value).partition("the same command with ")[2]
        assert flags == "--context-s 0.16"
        if n_positions:
            assert main([*command, *flags.split()]) == 0
        return
    assert main(command) == 0
    assert Run.open(tmp_path / "run").config.accumulate == 4


def test_a_rate_that_fails_while_it_is_timed_names_no_run(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "BATCH_SIZE", 2)
    monkeypatch.setattr(plan, "CONTEXT_STEPS", 24)
    with pytest.raises(TrainError, match=r"not finite.*lower rate: the same command with --lr"):
        train(prepared, tmp_path / "run", lr=1e30, warmup_steps=0, model={"n_layers": 1})
    assert not (tmp_path / "run").exists()
