"""Starting a run from a trained model: its shape, its weights, and what the data must share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from wgpt.codec import same_tokens
from wgpt.config import ModelConfig, to_json
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError
from wgpt.files import read_json
from wgpt.model import HybridModel
from wgpt.runs.pretrained import model_folder

_FINE_FIELDS = ("n_fine", "fine_dim", "n_fine_layers", "fine_head_dim", "fine_ffn_dim")
_LATENT_FIELDS = ("n_fine", "latent_steps", "latent_dim", "latent_hidden")
# Fields of ModelConfig that may differ from those of --init.
CHANGEABLE_FIELDS = (*_FINE_FIELDS, *_LATENT_FIELDS, "dropout", "window_steps", "end_of_clip")


class InitialWeights:
    """The trained model of a run folder, of a model folder that a run wrote, or `starter`.

    Raises ConfigError naming the file that is missing or was not written by `wgpt train`.
    """

    def __init__(self, folder: str | Path) -> None:
        path = model_folder(folder)
        self.model = HybridModel.from_pretrained(path)
        self.path = path / "config.json"
        self.facts: dict[str, Any] = read_json(self.path)
        missing = [name for name in ("preset", "mel", "codec") if name not in self.facts]
        if missing:
            raise ConfigError(f"{self.path}: was not written by `wgpt train`: no {missing[0]}")

    @property
    def preset(self) -> str:
        """The preset the model was made from."""
        return str(self.facts["preset"])

    def check_data(self, data: Dataset) -> None:
        """Raises ConfigError unless the data's tokens and slices mean what the model learnt."""
        codec, source = self.facts["codec"]["identity"], self.facts["codec"]["source"]
        if not same_tokens(codec, data.codec_identity):
            raise ConfigError(
                f"init: the data of {data.path} must be prepared with the model's codec, {codec} "
                f"({self.path}), got {data.codec_identity}; run wgpt prepare with --codec {source}"
            )
        if self.facts["mel"] != to_json(data.mel_config):
            raise ConfigError(
                f"init: the data of {data.path} must be prepared with the model's mel settings, "
                f"{self.facts['mel']} ({self.path}), got {to_json(data.mel_config)}"
            )

    def load_into(self, model: HybridModel) -> None:
        """Copies the trunk, mel constants included; fine head and latents where shapes are equal,
        and of the head what both have (the end of a clip may be new).

        model: one of a `shape` of this start.
        """
        state, own = self.model.state_dict(), model.state_dict()
        for part, fields in (("fine.", _FINE_FIELDS), ("latent.", _LATENT_FIELDS)):
            if any(getattr(model.config, f) != getattr(self.model.config, f) for f in fields):
                state = {name: value for name, value in state.items() if not name.startswith(part)}
        n_rows = min(len(own["head.weight"]), len(state["head.weight"]))
        state["head.weight"] = torch.cat(
            [state["head.weight"][:n_rows].to(own["head.weight"]), own["head.weight"][n_rows:]]
        )
        model.load_state_dict({**own, **state})

    def shape(self, changes: dict[str, Any]) -> ModelConfig:
        """The model's configuration with changes that leave the trunk's weights their meaning.

        Raises ConfigError for a field that is not in CHANGEABLE_FIELDS.
        """
        for name, value in changes.items():
            own = getattr(self.model.config, name)
            if name not in CHANGEABLE_FIELDS and value != own:
                raise ConfigError(
                    f"model: {name} must be that of --init, {own} ({self.path}), got {value}"
                )
        return dataclasses.replace(self.model.config, **changes)
