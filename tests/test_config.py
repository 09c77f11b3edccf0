"""Settings: presets' sizes, rules checked at construction, JSON in and out."""

import dataclasses

import pytest

from wgpt import config
from wgpt.config import MelConfig, ModelConfig, TrainConfig
from wgpt.errors import ConfigError
from wgpt.model import presets
from wgpt.training.plan import n_parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt-s", 3.7),
        ("gpt-l", 40.0),
        ("hybrid", 4.0),
        ("hybrid-xs", 1.1),
        ("gpt-xs", 1.05),
        ("voice-l", 300.0),
    ],
)
def test_preset_has_the_parameters_it_promises(name, millions):
    assert n_parameters(presets.preset(name)) == pytest.approx(millions * 1e6, rel=0.02)


def test_preset_twins_are_as_large_as_the_hybrids():
    count = {name: n_parameters(presets.preset(name)) for name in presets.PRESETS}
    assert count["gpt-s-matched"] == pytest.approx(count["hybrid"], rel=0.02)
    assert count["gpt-xs"] == pytest.approx(count["hybrid-xs"], rel=0.04)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ModelConfig, "head_dim", 48),
        (ModelConfig, "token_dim", 100),
        (ModelConfig, "dropout", 1.0),
        (ModelConfig, "n_layers", 0),
        (ModelConfig, "mel_context_frames", -1),
        (TrainConfig, "max_steps", 0),
        (TrainConfig, "dtype", "fp8"),
        (TrainConfig, "context_s", 0.0),
        (TrainConfig, "lr", 0.0),
        (MelConfig, "f_max_hz", 13_000.0),
        (MelConfig, "frames_per_step", 3),
    ],
)
def test_config_error_names_the_field_and_the_value(kind, field, value):
    with pytest.raises(ConfigError) as error:
        kind(**{field: value})
    assert field in str(error.value) or "head_dim" in str(error.value)


def test_config_refuses_a_centred_window_that_leaks():
    MelConfig(window_samples=640, centered=True)
    with pytest.raises(ConfigError, match=r"192 samples past.*leaky=True"):
        MelConfig(window_samples=1024, centered=True)
    with pytest.raises(ConfigError, match="leaky"):
        MelConfig(window_samples=640, centered=True, frames_per_step=2)


def test_config_survives_json():
    for kind in (ModelConfig, TrainConfig, MelConfig):
        assert config.from_json(kind, config.to_json(kind()), "here") == kind()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "a.json: expected a JSON object, got list"),
        ({"token_dims": 3}, "a.json: unknown ModelConfig fields token_dims"),
        ({"token_dim": "3"}, "a.json: token_dim must be int, got '3'"),
        ({"token_dim": True}, "a.json: token_dim must be int, got True"),
        ({"head_dim": 48}, "a.json: model: head_dim must be one of"),
    ],
)
def test_config_from_bad_json_names_the_file(values, words):
    with pytest.raises(ConfigError) as error:
        config.from_json(ModelConfig, values, "a.json")
    assert words in str(error.value)


def test_config_every_field_is_documented():
    for kind in (ModelConfig, TrainConfig, MelConfig):
        for field in dataclasses.fields(kind):
            assert len(field.metadata["doc"]) > 8, field.name


def test_preset_unknown_lists_the_known():
    with pytest.raises(ConfigError, match="hybrid-xs"):
        presets.preset("hybrid-xl")
