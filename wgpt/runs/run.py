"""A run folder: what a training run was asked to do, where its files lie, and how to open it again.

RUN/config.json        preset, model, training settings and what changed them on the way, data
                       folder and its identity; sealed
    checkpoints/       committed steps, the best by validation and the newest: RUN@step-N
    metrics.csv        one row per training step and per validation
    samples/, plots/   audio sampled while training, loss curves
    model/             config.json, model.safetensors and a card of the best: for from_pretrained

A step is what checkpoint.commit put there by one rename. The rest is derived: at every open for
training it is made what the newest committed step says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wgpt import codec as codecs
from wgpt import commits
from wgpt.config import ModelConfig, TrainConfig, from_json, to_json
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, DataError
from wgpt.files import read_json, sha256_of, write_sealed

log = logging.getLogger(__name__)

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
        """Starts the run's folder. Raises ConfigError when it already holds a step of a run."""
        self.refuse_existing(self.folder)
        if (self.folder / "config.json").exists():
            log.info("%s: holds a run without a committed step; it starts afresh", self.folder)
        self.write()

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Raises ConfigError when a folder already holds a step of a run."""
        if commits.list_steps(folder / "checkpoints"):
            raise ConfigError(
                f"{folder}: this folder already holds a run; add --resume to continue it, or "
                "choose another --out"
            )

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds a run, were it one without a committed step."""
        return (folder / "config.json").exists() or bool(commits.list_steps(folder / "checkpoints"))

    def write(self) -> None:
        """Writes config.json."""
        write_sealed(self.folder / "config.json", self.description())

    def description(self) -> dict[str, Any]:
        """Content of config.json: the settings as they are now, and `changes`."""
        return {
            "format": _FORMAT,
            "preset": self.preset,
            "model": to_json(self.model),
            "train": to_json(self.config),
            "data": self.data,
            **({"changes": list(self.changes)} if self.changes else {}),
        }

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Reads a run folder; without config.json, what its newest committed step says.

        Raises ConfigError naming the file that is missing or wrong.
        """
        path = Path(folder) / "config.json"
        committed = commits.list_steps(path.parent / "checkpoints")
        try:
            description = read_json(path)
        except FileNotFoundError:
            state = commits.state_of(committed[-1]) if committed else {}
            if "run" not in state:
                raise ConfigError(
                    f"{path}: no such file; RUN is the --out of `wgpt train`"
                ) from None
            description = state["run"]
        except ConfigError as error:
            way_out = "; delete it, and the last committed step restores it" if committed else ""
            raise ConfigError(f"{error}{way_out}") from None
        if description.get("format") != _FORMAT:
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
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: must follow the format, got a bad entry: {error}") from None

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

    def check_same_data(self, data: Dataset) -> None:
        """Raises DataError unless `data` are those that the run was trained on, file by file."""
        expected, got = self.data.get("manifest_sha256"), facts_of(data)["manifest_sha256"]
        if expected not in (None, got):  # version 0.1 did not write it down
            raise DataError(
                f"{data.path}: is not what {self.folder} was trained on: the manifest.json had "
                f"sha256 {expected}, now {got}; other recordings were prepared there. Name the "
                "data it had with --data, or begin a run from this one: wgpt train "
                f"--data {data.path} --init {self.folder} --out NEW"
            )


def facts_of(data: Dataset) -> dict[str, Any]:
    """What a run remembers of its data: where and which, and what tokens and slices mean."""
    return {
        "path": str(data.path.resolve()),
        "manifest_sha256": sha256_of(data.path / "manifest.json"),
        "codec": data.manifest["codec"],
        "mel": to_json(data.mel_config),
    }
