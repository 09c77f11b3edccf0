"""What a model folder says of itself beside the weights: what the model was trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wgpt import codec as codecs
from wgpt.config import LIMIT, MelConfig, from_json, to_json
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, DataError
from wgpt.files import read_json
from wgpt.runs.run import Run


@dataclass(frozen=True)
class ModelRecord:
    """config.json of a model folder, without the model's shape.

    folder: where it is; preset: name of the shape; mel, mel_source: of its slices; codec: {source,
    identity, ...} of its tokens; context_steps: length T of its training windows, None where
    nobody wrote it down; treatment: of the recordings it was trained on (data.treatment.Treatment),
    empty where nobody wrote it down; run: the run whose folder it lies in, None elsewhere.
    """

    folder: Path
    preset: str
    mel: MelConfig
    mel_source: str | None
    codec: dict[str, Any]
    context_steps: int | None
    treatment: dict[str, Any]
    run: Run | None

    @classmethod
    def read(cls, folder: Path) -> ModelRecord:
        """Of a model folder. Raises ConfigError when `wgpt train` or `pack` did not write it."""
        path, run = folder / "config.json", _run_around(folder)
        try:
            facts = read_json(path)
            if "train" in facts:
                raise ConfigError(
                    f"{folder}: this run has saved no model yet; continue with "
                    f"`wgpt train --out {folder} --resume`"
                )
            mel, mel_source = from_json(MelConfig, facts["mel"], str(path)), facts["mel_source"]
            codec = facts["codec"]
            words = facts["preset"], codec["source"], codec["identity"]["sha256"]
            if not all(isinstance(word, str) for word in words):
                raise ConfigError(f"{path}: preset, codec, sha256 must be words, got {words}")
            if mel_source is not None and not re.fullmatch(r"[a-z]+(-\d+)?", str(mel_source)):
                raise ConfigError(f"{path}: mel_source must be a plain name, got {mel_source!r}")
            context_steps = facts.get("context_steps")
            if context_steps is not None and not (
                type(context_steps) is int and 0 < context_steps <= LIMIT
            ):
                raise ConfigError(f"{path}: context_steps must lie in [1, {LIMIT}]")
            if run is not None:  # version 0.1 wrote it there alone
                context_steps = context_steps or run.config.context_steps
            treatment = dict(facts.get("treatment") or {})
            return cls(
                folder, facts["preset"], mel, mel_source, codec, context_steps, treatment, run
            )
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; a model folder holds config.json and model.safetensors"
            ) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: was not written by `wgpt train`: no {error}") from None

    @property
    def codec_source(self) -> str:
        """Name or folder of the codec: a model of the Hub may have it in its own folder."""
        own = self.folder / "codec"
        return str(own if (own / "config.json").is_file() else self.codec["source"])

    def load_codec(self, device: str = "cpu", download: bool = False) -> codecs.Codec:
        """The codec of the model's tokens, by preference the one that lies in its folder.

        Raises CodecError when its weights are others by now.
        """
        expected = self.codec["identity"]["sha256"]
        return codecs.load(self.codec_source, sha256=expected, download=download, device=device)

    def dataset(self, path: str | Path | None = None) -> Dataset:
        """Prepared data whose tokens and slices are the model's; by default those of its run.

        Clips are joined as the run joined them (TrainConfig.join_s).

        Raises ConfigError when there is neither a path nor a run, DataError when the data were
        made with another codec or mel.
        """
        if path is None:
            if self.run is None:
                raise ConfigError(f"{self.folder}: is not in a run; name the data with --data")
            return self.run.dataset()
        dataset = Dataset(path)
        got, expected = dataset.codec_identity, self.codec["identity"]
        if got["sha256"] != expected["sha256"]:
            raise DataError(
                f"{dataset.path}: its tokens come from the codec {got}, this model's from "
                f"{expected}; prepare it with --codec {self.codec['source']}"
            )
        if dataset.mel_config != self.mel:
            raise DataError(
                f"{dataset.path}: its mel slices were made with {to_json(dataset.mel_config)}, "
                f"this model's with {to_json(self.mel)}; prepare it with the same settings"
            )
        return dataset.joined(self.run.config.join_s if self.run is not None else 0.0)


def _run_around(folder: Path) -> Run | None:
    """The run of RUN/model and RUN/checkpoints/step-N."""
    for run in (folder.parent, folder.parent.parent):
        try:
            return Run.open(run)
        except ConfigError:  # not a run
            continue
    return None
