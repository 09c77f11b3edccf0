"""Where figures of a run go besides metrics.csv: TensorBoard and Weights & Biases, if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from wgpt.errors import ConfigError

LOGGERS = ("tensorboard", "wandb")


class Logger(Protocol):
    """Takes figures as they come."""

    def add(self, step: int, split: str, figures: dict[str, float]) -> None:
        """Figures of one training step or one validation."""

    def close(self) -> None:
        """Writes what is left."""


def check_loggers(names: str) -> list[str]:
    """Names from "tensorboard,wandb". Raises ConfigError for one that is unknown or missing."""
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in LOGGERS:
            raise ConfigError(f"train: loggers must be some of {', '.join(LOGGERS)}, got {name!r}")
        try:
            __import__(name)
        except ImportError:
            raise ConfigError(
                f"train: the logger {name} needs a package: pip install {name}"
            ) from None
    return chosen


def open_loggers(names: str, run: Path, settings: dict[str, Any], first_step: int) -> list[Logger]:
    """The loggers of a run folder; settings are shown beside the figures.

    first_step: figures of later steps that a killed process logged are done again.
    """
    made: dict[str, type[TensorBoardLogger] | type[WandbLogger]] = {
        "tensorboard": TensorBoardLogger, "wandb": WandbLogger,
    }  # fmt: skip
    return [made[name](run, settings, first_step) for name in check_loggers(names)]


class TensorBoardLogger:
    """Event files in RUN/tensorboard; see them with `tensorboard --logdir RUN`."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)
        self._writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def add(self, step: int, split: str, figures: dict[str, float]) -> None:
        """As `nll_nats/train`, one curve for each figure and split."""
        for name, value in figures.items():
            self._writer.add_scalar(f"{name}/{split}", value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbLogger:
    """An offline run in RUN/wandb: nothing is sent until its owner calls `wandb sync`."""

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        import wandb

        self._run: Any = wandb.init(mode="offline", dir=str(run), name=run.name, config=settings)

    def add(self, step: int, split: str, figures: dict[str, float]) -> None:
        """As `train/nll_nats`."""
        self._run.log({f"{split}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()
