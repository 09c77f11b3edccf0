"""Our models through `AutoConfig` and `AutoModel` of transformers: importing this registers them.

    import wgpt.model.auto
    model = transformers.AutoModel.from_pretrained("RUN/model")   # or user/model
    logits = model(tokens, frames).logits

transformers itself decides what it downloads. It needs `pip install 'wgpt[transformers]'`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from wgpt.config import ModelConfig, from_json
from wgpt.model.hybrid import HybridModel


class WgptConfig(PretrainedConfig):
    """config.json of a model folder; the shape is under `model` (config.ModelConfig)."""

    model_type = "wgpt"


class WgptModel(PreTrainedModel):
    """HybridModel with the outputs of transformers.

    transformers' `generate` does not serve it: sound is made with `wgpt.load(...).generate`.
    """

    config_class = WgptConfig

    def __init__(self, config: WgptConfig) -> None:
        super().__init__(config)
        self.hybrid = HybridModel(from_json(ModelConfig, config.model, "config.model"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> WgptModel:
        """The model of a folder or of the Hub; of the keywords, config, revision and
        local_files_only count. Raises ConfigError for a damaged file."""
        name, revision = pretrained_model_name_or_path, kwargs.get("revision")
        download = not kwargs.get("local_files_only", False)
        hybrid = HybridModel.from_pretrained(name, revision=revision, download=download)
        config = kwargs.get("config")
        if config is None:
            config = WgptConfig.from_pretrained(
                name, revision=revision or "main", local_files_only=not download
            )
        model = cls(config)
        model.hybrid = hybrid
        return model.eval()

    def forward(self, tokens: Tensor, frames: Tensor | None = None) -> CausalLMOutput:
        """Logits (B, T, V), with the shapes of HybridModel.forward."""
        return CausalLMOutput(logits=self.hybrid(tokens, frames))


AutoConfig.register("wgpt", WgptConfig)
AutoModel.register(WgptConfig, WgptModel)
