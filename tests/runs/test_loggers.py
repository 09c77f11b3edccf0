"""Loggers get every figure; one that is unknown or not installed is refused before training."""

import sys
import types

import pytest

from wgpt.errors import ConfigError
from wgpt.runs import loggers


class Recorder(list):
    """Stands in for a package: remembers what it is told."""

    def __getattr__(self, name):
        return lambda *args, **options: self.append((name, args, options)) or self


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that records its calls."""
    recorder = Recorder()
    module = types.ModuleType("wandb")
    module.init = recorder.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return recorder


@pytest.fixture
def tensorboard(monkeypatch):
    """A torch.utils.tensorboard that records its calls."""
    recorder = Recorder()
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = recorder.SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return recorder


def test_wandb_runs_offline_in_the_run_folder(wandb, tmp_path):
    (logger,) = loggers.open_loggers("wandb", tmp_path, {"lr": 1.0}, 0)
    logger.add(3, "train", {"nll_nats": 4.5})
    logger.close()
    (init, _, options), log, finish = wandb
    assert (init, options["mode"], options["dir"]) == ("init", "offline", str(tmp_path))
    assert options["config"] == {"lr": 1.0}
    assert log == ("log", ({"train/nll_nats": 4.5},), {"step": 3})
    assert finish[0] == "finish"


def test_tensorboard_writes_below_the_run_and_forgets_what_is_done_again(tensorboard, tmp_path):
    (logger,) = loggers.open_loggers("tensorboard", tmp_path, {"lr": 1.0}, 7)
    logger.add(8, "valid", {"nll_nats": 4.5, "accuracy": 0.1})
    logger.close()
    opened, _, *scalars, closed = tensorboard
    assert opened == ("SummaryWriter", (tmp_path / "tensorboard",), {"purge_step": 8})
    assert [args for _, args, _ in scalars] == [
        ("nll_nats/valid", 4.5, 8), ("accuracy/valid", 0.1, 8),
    ]  # fmt: skip
    assert closed[0] == "close"


def test_unknown_and_missing_loggers_are_refused(monkeypatch):
    assert loggers.check_loggers("") == []
    with pytest.raises(ConfigError, match="tensorboard, wandb, got 'mlflow'"):
        loggers.check_loggers("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        loggers.check_loggers("wandb")
