"""Numbers out of range: every numeric flag takes them or refuses them in one line, none fails."""

import dataclasses

import pytest

from wgpt.cli import COMMANDS, main, parser_for
from wgpt.config import MelConfig, ModelConfig, TrainConfig
from wgpt.errors import ConfigError
from wgpt.training import train

ABSURD = {float: (float("inf"), float("-inf"), float("nan"), 1e12, -1.0), int: (-1, 10**12)}
FIELDS = [
    (kind, field.name, value)
    for kind in (TrainConfig, ModelConfig, MelConfig)
    for field in dataclasses.fields(kind)
    for value in ABSURD.get(type(field.default), ())
]
# What stands for "no limit" or is bounded elsewhere.
ENDLESS = {"eval_audio_s", "floor"}


@pytest.mark.parametrize(("kind", "name", "value"), FIELDS)
def test_settings_take_a_number_or_refuse_it_by_name(kind, name, value):
    try:
        kind(**{name: value})
    except ConfigError as error:
        assert name.split("_")[0] in str(error)
    else:
        assert abs(value) < float("inf") or (name in ENDLESS and value > 0), "not finite"


FLOATS = [
    (command, flag)
    for command in COMMANDS
    for action in parser_for(command)._actions
    for flag in action.option_strings[-1:]
    if action.type is float and flag not in ("--eval-audio-s",)
]
WHOLE = [
    (command, action.option_strings[-1])
    for command in COMMANDS
    for action in parser_for(command)._actions
    if action.type is int
]
START = {
    "prepare": ["prepare", "nowhere", "--out", "out"],
    "train": ["train", "--data", "nowhere", "--preset", "hybrid-xs", "--out", "out"],
    "eval": ["eval", "starter", "--data", "nowhere"],
    "generate": ["generate", "starter", "--seconds", "1", "--out", "y.wav"],
    "serve": ["serve", "starter", "--port", "0"],
    "study": ["study", "nowhere", "--out", "out"],
    "demo": ["demo", "--out", "out"],
    "codec-train": ["codec-train", "--data", "nowhere", "--work", "work", "--out", "out"],
}


@pytest.fixture
def no_work(tmp_path, monkeypatch):
    """Commands that miss nothing: the number alone can end them."""

    def never(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wgpt.generation.generator.AudioGenerator.load", never)
    monkeypatch.setattr("wgpt.experiments.demo.gather_audio", never)
    yield
    assert not (tmp_path / "out").exists()


def refusal(command, flag, value, capsys):
    """What `wgpt command flag=value` says, in one line, before any work."""
    assert main([*START[command], f"{flag}={value}"]) in (1, 2)
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1 and "Traceback" not in message
    return message


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(("command", "flag"), FLOATS)
def test_commands_end_in_one_line(command, flag, value, no_work, capsys):
    """What is out of range is refused, or what is missing is named."""
    refusal(command, flag, value, capsys)


@pytest.mark.parametrize("value", [-1, 10**30])
@pytest.mark.parametrize(("command", "flag"), WHOLE)
def test_commands_of_whole_numbers_end_in_one_line(command, flag, value, no_work, capsys):
    if flag in ("--top-k", "--fine-top-k") and value > 0:
        pytest.skip("more than all is all")
    refusal(command, flag, value, capsys)


NAMED = {  # what each flag refuses by name, where nothing else is asked first
    "study": {
        "--lr": ("nan", "inf", "-1", "0"),
        "--context-s": ("nan", "inf", "-1", "0", "1e12"),
        "--max-steps": (-1, 0, 10**30),
        "--batch-size": (-1, 0, 10**12),
        "--eval-every": (-1, 10**30),
        "--patience": (-1, 10**30),
        "--dropout": ("nan", "inf", "-1", "1"),
    },
    "demo": {"--steps": (-1, 0, 10**30)},
    "codec-train": {
        "--lr": ("nan", "inf", "-1", "0", "1e12"),
        "--filters": (-1, 0, 1, 10**12),
        "--hidden": (-1, 0, 10**12),
        "--batch": (-1, 0, 10**12),
        "--steps": (-1, 0),
        "--decay-steps": (-1,),
        "--warmup-steps": (-1, 10**12),
        "--seed": (-1, 10**12),
    },
    "generate": {"--n": (-1, 0, 10**12), "--seconds": (-1, 0, "nan", 1e12), "--seed": (-1, 2**63)},
}


@pytest.mark.parametrize(("command", "flag"), [(c, flag) for c in NAMED for flag in NAMED[c]])
def test_a_number_out_of_range_is_refused_by_name(command, flag, no_work, capsys):
    for value in NAMED[command][flag]:
        message = refusal(command, flag, value, capsys)
        assert main([*START[command], f"{flag}={value}"]) == 2
        assert flag.strip("-") in message.replace("_", "-"), value
        assert "got" in message and "must be" in message, value
        capsys.readouterr()


def test_every_numeric_flag_of_the_newer_commands_is_in_the_table():
    for command in ("study", "demo", "codec-train"):
        flags = {flag for name, flag in FLOATS + WHOLE if name == command}
        assert flags == set(NAMED[command])


def test_a_large_seed_trains_with_dropout(prepared, tmp_path):
    train(prepared, tmp_path / "run", "hybrid-xs", model={"dropout": 0.1}, seed=2**63 - 1,
          max_steps=1, batch_size=1, context_s=0.2, device="cpu", sample_s=0.0)  # fmt: skip


def test_whole_numbers_must_be_whole(capsys):
    for value in ("1e12", "nan", "inf", "2.5"):
        with pytest.raises(SystemExit) as left:
            main(["train", "--data", "d", "--out", "r", "--max-steps", value])
        assert left.value.code == 2
        assert "invalid int value" in capsys.readouterr().err
