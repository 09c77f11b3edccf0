"""A run folder: what a training run was asked to do, where its files lie, and how to open it again.

RUN/config.json        preset, model, training settings and what changed them on the way, data
                       folder and codec identity
    metrics.csv        one row per training step and per validation
    plots/loss.png     loss curves by step and by epoch
    samples/           audio sampled while training
    checkpoints/       the best by validation and the newest: for --resume, and RUN@step-N
    model/             config.json, model.safetensors and a card of the best: for from_pretrained
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wgpt import codec as codecs
from wgpt.config import ModelConfig, TrainConfig, from_json, to_json
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, DataError
from wgpt.files import write_atomically

_FORMAT = "wgpt-run-1"


@dataclass(frozen=True)
class Run:
    """A run folder and what its config.json says."""

    folder: Path
    preset: str
    model: ModelConfig
    config: TrainConfig
    data: dict[str, Any]  # facts_of(data)
    # What --resume changed: {"from_step": n, "changed": {field: [old, new]}}, in order.
    changes: tuple[dict[str, Any], ...] = ()

    def create(self) -> None:
        """Starts the run's folder. Raises ConfigError when it already holds a run."""
        self.refuse_existing(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Raises ConfigError when a folder already holds a run."""
        if (folder / "config.json").exists():
            raise ConfigError(
                f"{folder / 'config.json'}: this folder already holds a run; add --resume to "
                "continue it, or choose another --out"
            )

    def write(self) -> None:
        """Writes config.json: the settings as they are now, and `changes`."""
        description = {
            "format": _FORMAT,
            "preset": self.preset,
            "model": to_json(self.model),
            "train": to_json(self.config),
            "data": self.data,
            **({"changes": list(self.changes)} if self.changes else {}),
        }
        write_atomically(self.folder / "config.json", json.dumps(description, indent=2) + "\n")

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Reads a run folder. Raises ConfigError naming the file that is missing or wrong."""
        path = Path(folder) / "config.json"
        try:
            description = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; RUN is the --out of `wgpt train`") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(description, dict) or description.get("format") != _FORMAT:
            raise ConfigError(f"{path}: expected the format {_FORMAT!r}; is this a run folder?")
        try:
            return cls(
                Path(folder),
                str(description["preset"]),
                from_json(ModelConfig, description["model"], str(path)),
                from_json(TrainConfig, description["train"], str(path)),
                dict(description["data"]),
                tuple(description.get("changes", ())),
            )
        except KeyError as error:
            raise ConfigError(f"{path}: has no {error}") from None

    @property
    def model_folder(self) -> Path:
        """Where the trained model is, in from_pretrained's layout."""
        return self.folder / "model"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    def dataset(self, path: str | Path | None = None) -> Dataset:
        """The data of the run, or another folder whose tokens mean the same.

        Raises DataError when that folder was made with another codec or mel.
        """
        if path is None and not Path(self.data["path"]).is_dir():
            raise DataError(
                f"{self.folder}: its data are no longer at {self.data['path']}; name the folder "
                "they are in now with --data"
            )
        dataset = Dataset(path or self.data["path"])
        expected = self.data["codec"]["identity"]
        if not codecs.same_tokens(dataset.codec_identity, expected):
            raise DataError(
                f"{dataset.path}: its tokens come from the codec {dataset.codec_identity}, "
                f"this run's from {expected}; prepare it with the same codec"
            )
        if to_json(dataset.mel_config) != self.data["mel"]:
            raise DataError(
                f"{dataset.path}: its mel slices were made with {to_json(dataset.mel_config)}, "
                f"this run's with {self.data['mel']}; prepare it with the same settings"
            )
        return dataset.joined(self.config.join_s)

    def codec(self, device: str = "cpu") -> codecs.Codec:
        """The codec of the run. Raises CodecError when its weights are no longer the same."""
        source = self.data["codec"]["source"]
        return codecs.load(source, sha256=self.data["codec"]["identity"]["sha256"], device=device)


def facts_of(data: Dataset) -> dict[str, Any]:
    """What a run remembers of its data: where they are, and what their tokens and slices mean."""
    return {
        "path": str(data.path.resolve()),
        "codec": data.manifest["codec"],
        "mel": to_json(data.mel_config),
    }
