"""Numbers out of range: every numeric flag takes them or refuses them in one line, none fails."""

import dataclasses

import pytest

from wgpt.cli import main, parser_for
from wgpt.config import MelConfig, ModelConfig, TrainConfig
from wgpt.errors import ConfigError

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
    for command in ("prepare", "train", "eval", "generate", "serve")
    for action in parser_for(command)._actions
    for flag in action.option_strings[-1:]
    if action.type is float and flag not in ("--eval-audio-s",)
]
START = {
    "prepare": ["prepare", "nowhere", "--out", "out"],
    "train": ["train", "--data", "nowhere", "--preset", "hybrid-xs", "--out", "out"],
    "eval": ["eval", "starter", "--data", "nowhere"],
    "generate": ["generate", "starter", "--seconds", "1", "--out", "y.wav"],
    "serve": ["serve", "starter", "--port", "0"],
}


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(("command", "flag"), FLOATS)
def test_commands_end_in_one_line(command, flag, value, tmp_path, monkeypatch, capsys):
    """Before any work: what is out of range is refused, or what is missing is named."""
    monkeypatch.chdir(tmp_path)
    if command in ("generate", "serve"):  # nothing there is missing: the number alone can end it

        def never(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("wgpt.generation.generator.AudioGenerator.load", never)
    assert main([*START[command], f"{flag}={value}"]) in (1, 2)
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1 and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_whole_numbers_must_be_whole(capsys):
    for value in ("1e12", "nan", "inf", "2.5"):
        with pytest.raises(SystemExit) as left:
            main(["train", "--data", "d", "--out", "r", "--max-steps", value])
        assert left.value.code == 2
        assert "invalid int value" in capsys.readouterr().err
